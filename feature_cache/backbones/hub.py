"""Checkpoints of the Hugging Face hub: from its local cache, else downloaded."""

from __future__ import annotations

from pathlib import Path

from ..errors import BackboneError, MissingDependencyError


def hub_file(repo: str, filename: str) -> Path:
    """Find a file of a hub's repository, downloading it where it is not in the hub's own cache.

    A file that is there is taken as it is, with no question to the network; what a key says of
    the weights is a digest of their content, whatever revision they came from.

    Parameters
    ----------
    repo : str
        Such as ``"facebook/sam2.1-hiera-tiny"``.
    filename : str
        Inside the repository, such as ``"sam2.1_hiera_tiny.pt"``.

    Raises
    ------
    BackboneError
        It is neither in the local cache nor to be had from the hub.
    MissingDependencyError
        huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            "huggingface_hub", f"{filename} of {repo}", "pip install huggingface_hub"
        ) from error
    try:
        return Path(hf_hub_download(repo, filename, local_files_only=True))
    except LocalEntryNotFoundError:
        return _download(repo, filename)


def _download(repo: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise unreachable(f"{filename} of the hub's repository {repo}", error) from error


def unreachable(what: str, error: Exception) -> BackboneError:
    """Make the error for weights that can't be downloaded."""
    first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return BackboneError(
        f"can't get {what}: {type(error).__name__}, {first}; "
        "pass weights=<path of a checkpoint> or weights='random:<seed>'"
    )
