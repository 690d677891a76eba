"""Train Trackastra on cached features: what ``feature-cache train`` does."""

from feature_cache.trackastra.train import main

if __name__ == "__main__":
    main()
