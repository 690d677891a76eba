"""Checkpoints of the Hugging Face hub: from its local cache, else downloaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BackboneError, importing
from .catalogue import BACKBONES

_log = logging.getLogger(__name__)


def hub_file(repo: str, filename: str, revision: str | None = None) -> Path:
    """Find a file of a hub's repository, downloading it where it is not in the hub's own cache.

    A file that is there is taken as it is, with no question to the network; what a key says of
    the weights is a digest of their content, whatever revision they came from.

    A revision is a branch, tag or commit; by default what the local cache has as ``main``.

    Raises
    ------
    BackboneError
        There is no such name, or it is neither in the local cache nor to be had from the hub.
    MissingDependencyError, BrokenDependencyError
        huggingface_hub is not installed, or can't be imported.
    """
    with importing("huggingface_hub", *_name_need(repo, filename)):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    try:
        return Path(hf_hub_download(repo, filename, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise BackboneError(
            f"{repo!r} is no repository of the hub: expected <owner>/<name>, such as "
            "facebook/dinov2-small"
        ) from error
    except LocalEntryNotFoundError:
        return _download(repo, filename, revision)


def _name_need(repo: str, filename: str) -> tuple[str, str]:
    """Say what needs the hub's package for a file, and what brings it: the backbone's own extra."""
    for info in BACKBONES:
        if info.hub == (repo, filename) and info.missing:
            return f"the backbone {info.name!r}", info.install
    return f"{filename} of {repo}", "pip install huggingface_hub"


def _download(repo: str, filename: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    _log.warning("%s of %s is not on this machine: asking the hub", filename, repo)
    try:
        with _without_retries():
            return Path(hf_hub_download(repo, filename, revision=revision))
    except LocalEntryNotFoundError as error:
        raise BackboneError(
            f"no weights: {filename} of {repo} is not in the hub's cache on this machine "
            f"({HF_HUB_CACHE}), and the hub can't be reached; where there is a network: "
            f"hf download {repo} {filename}; or pass weights=<path of a checkpoint> (--weights)"
        ) from error
    except GatedRepoError as error:
        raise BackboneError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then: "
            f"hf auth login && hf download {repo} {filename}; or pass weights=<path of a "
            "checkpoint> (--weights)"
        ) from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        # RuntimeError: the hub's client tries once more after it was closed
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BackboneError(
            f"can't get {filename} of {repo} on the hub: {type(error).__name__}, {first}; "
            "pass weights=<path of a checkpoint> or weights='random:<seed>'"
        ) from error


@contextmanager
def _without_retries() -> Iterator[None]:
    """Keep the hub's lines about each of its attempts away: what comes of them is said once."""
    theirs = logging.getLogger("huggingface_hub")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(before)
