"""Run the command line: ``python -m feature_cache.cli``."""

from . import main

main()
