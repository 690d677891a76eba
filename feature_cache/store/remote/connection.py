"""Connecting: clients of obstore, the processes that may have them, and what their errors say."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ...errors import StoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_CLIENT_KEYS = (
    *("allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only"),
    *("pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes"),
    *("proxy_url", "read_timeout", "timeout", "user_agent"),
)
_CLIENT_OPTIONS = {"connect_timeout": "5s", "timeout": "60s"}
_RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
_first_process: int | None = None


def connect(url: str, options: Mapping[str, Any]) -> ObjectStore:
    """Open the client of a URL, with bounded times."""
    from obstore.store import from_url

    asked = dict(options)
    if not url.startswith("file:"):
        given = {key: asked.pop(key) for key in _CLIENT_KEYS if key in asked}
        given = {**_environment(url), **asked.get("client_options", {}), **given}
        asked["client_options"] = {**_CLIENT_OPTIONS, **given}
        asked["retry_config"] = {**_RETRIES, **asked.get("retry_config", {})}
    return from_url(url, **asked)


def _environment(url: str) -> dict[str, str]:
    """Read the client's options from the environment, which obstore does only if none are given."""
    prefix = _VARIABLES.get(url.partition(":")[0])
    if prefix is None:
        return {"allow_http": "true"} if url.startswith("http://") else {}
    names = {key: f"{prefix}{key.upper()}" for key in _CLIENT_KEYS}
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def enter_process(url: str) -> None:
    """Refuse a process that was forked from one where obstore ran: a call would never return."""
    global _first_process
    if _first_process not in (None, os.getpid()):
        raise StoreError(
            f"can't open {url} in process {os.getpid()}: it was forked from one that had opened a "
            "remote; start processes with 'spawn', or pull first"
        )
    _first_process = os.getpid()


@contextmanager
def talking(doing: str, place: str) -> Iterator[None]:
    """Turn what obstore or the hub's library says into an error of ours."""
    try:
        yield
    except StoreError:
        raise
    except _errors() as error:
        raise StoreError(
            f"can't {doing} {place.rstrip('/')}: {_reason(error)}; check the address, the "
            "credentials and the network, and run it again: what was moved stays"
        ) from error


def _errors() -> tuple[type[Exception], ...]:
    """Give what is raised by what is loaded; huggingface_hub lets its client's errors through."""
    names = ("obstore.exceptions", "BaseError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError")
    own = (getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
    return (*own, OSError, ValueError, TypeError)


def _reason(error: Exception) -> str:
    """Give what obstore says in one line, without answers in full and without signed queries."""
    text = str(error).split("\n\nDebug source")[0]
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    head = re.sub(r"\?\S*", "", text.split("<")[0]).strip(" :\n")
    return " ".join(f"{head}: {said[1]}".split() if said else head.split())
