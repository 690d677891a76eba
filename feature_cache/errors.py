"""Every error that feature_cache raises on purpose.

::

    FeatureCacheError
    ├── FrameError              ValueError       a frame or mask that can't be embedded
    │   └── FrameTypeError      TypeError        pixels or labels that are no numbers of use
    ├── DrawError               ValueError       a draw or policy that is not defined
    ├── MovieError              ValueError       a movie whose parts are missing or disagree
    │   ├── MovieNotFoundError  FileNotFoundError
    │   └── NoMasksError                         a movie without the detections asked for
    ├── UnknownNameError        LookupError      no backbone, pooling, dtype of that name
    ├── MissingDependencyError  ImportError      an optional package is not installed
    ├── BrokenDependencyError   ImportError      it is, and can't be imported
    ├── BackboneError           RuntimeError     weights that don't fit, a wrong embedding
    ├── MissingRecordError      LookupError      not in the cache, and not to be computed
    ├── ServiceError            ConnectionError  the process that computes is gone or refuses
    ├── SchedulerGoneError      ConnectionError  no Dask scheduler answers
    ├── NotWrittenError                          a page, picture or report can't be written
    └── StoreError              OSError
        ├── NotACacheError                       the folder is something else
        ├── CacheVersionError                    a newer feature_cache wrote it
        ├── ReadOnlyCacheError  PermissionError
        └── CorruptRecordError                   the bytes are not those that were written

Whatever can't enter a key is a plain ``TypeError``, raised where the key is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_MANY = 12
"""More names than these are not all shown."""


class FeatureCacheError(Exception):
    """Base of all errors of this package."""


class FrameError(FeatureCacheError, ValueError):
    """A frame or a mask that can't be embedded: NaN pixels, wrong shape or dtype."""


class FrameTypeError(FrameError, TypeError):
    """A frame or a mask of a dtype that can't be embedded or enter a key."""


class DrawError(FeatureCacheError, ValueError):
    """An augmentation (operation, draw or policy) that is not defined."""


class MovieError(FeatureCacheError, ValueError):
    """A movie whose frames or masks are missing, unreadable, or don't belong together."""


class MovieNotFoundError(MovieError, FileNotFoundError):
    """No folder at the path of a movie."""


class NoMasksError(MovieError):
    """A movie that has no folder of the detections asked for."""


class UnknownNameError(FeatureCacheError, LookupError):
    """A name that stands for nothing here.

    Parameters
    ----------
    kind : str
        What was asked for, such as ``"backbone"``.
    name : str
        The name that is unknown.
    known : iterable of str
        The names that would have been right.
    listing : str
        The command that lists them, where they are many.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], listing: str = "") -> None:
        self.kind, self.name, self.known, self.listing = kind, name, tuple(known), listing
        close = find_nearest(str(name), self.known)
        hint = f"did you mean {close[0]!r}? " if close else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}Known: {_enumerate(self.known, listing)}")

    def __reduce__(self) -> tuple[type, tuple[str, str, tuple[str, ...], str]]:
        return type(self), (self.kind, self.name, self.known, self.listing)


def find_nearest(name: str, known: Collection[str], count: int = 1) -> list[str]:
    """Find the names that were probably meant: those that contain it, or are spelled much alike.

    Those that begin with it are equally near, and the first of them counts.

    Examples
    --------
    >>> find_nearest("fp16", ["float16", "float32"]), find_nearest("channel", ["halo", "dtype"])
    (['float16'], [])
    """
    holding = [one for one in known if len(name) > 2 and name.casefold() in one.casefold()]
    alike = [one for one in known if one[:1].casefold() == name[:1].casefold()]
    close = [one for one in holding if one.casefold().startswith(name.casefold())][:count]
    close += get_close_matches(name, holding, count, cutoff=0.0)
    close += get_close_matches(name, known, count) or get_close_matches(name, alike, count, 0.5)
    return list(dict.fromkeys(close))[:count]


def _enumerate(known: tuple[str, ...], listing: str) -> str:
    if len(known) <= _MANY:
        return ", ".join(known) or "none"
    see = f": see {listing}" if listing else ""
    return f"{', '.join(known[:3])}, … ({len(known)} in all{see})"


class MissingDependencyError(FeatureCacheError, ImportError):
    """An optional package is needed and not installed.

    Parameters
    ----------
    package : str
        The distribution that is missing.
    purpose : str
        What needs it.
    install : str
        The command that brings it.
    """

    def __init__(self, package: str, purpose: str, install: str) -> None:
        self.package, self.purpose, self.install = package, purpose, install
        super().__init__(f"{purpose} needs the package {package!r}; install it with: {install}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.package, self.purpose, self.install)


class BrokenDependencyError(FeatureCacheError, ImportError):
    """An optional package is installed and can't be imported, as another one that it needs is not.

    Parameters
    ----------
    package : str
        The distribution that can't be imported.
    purpose : str
        What needs it.
    reason : str
        What its import said.
    """

    def __init__(self, package: str, purpose: str, reason: str) -> None:
        self.package, self.purpose, self.reason = package, purpose, reason
        super().__init__(
            f"{purpose} needs the package {package!r}, which is installed and can't be imported: "
            f"{reason}; 'pip check' names what doesn't fit together"
        )

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.package, self.purpose, self.reason)


@contextmanager
def importing(package: str, purpose: str, install: str) -> Iterator[None]:
    """Say what is wrong where an optional package is imported and isn't there, or is broken.

    Parameters
    ----------
    package : str
        The distribution; its module has the same name, with ``_`` for ``-``.
    purpose : str
        What needs it.
    install : str
        The command that brings it.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    BrokenDependencyError
        It is, but its import fails.
    """
    try:
        yield
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name
        if absent and absent.partition(".")[0] == package.replace("-", "_"):
            raise MissingDependencyError(package, purpose, install) from error
        reason = f"{type(error).__name__}: {error}"
        raise BrokenDependencyError(package, purpose, reason) from error


class BackboneError(FeatureCacheError, RuntimeError):
    """A backbone that can't be built from its weights, or whose output is wrong."""


class MissingRecordError(FeatureCacheError, LookupError):
    """A record that is not in the cache and may not be computed here."""


class ServiceError(FeatureCacheError, ConnectionError):
    """The process that computes for others is gone, does not answer, or refuses."""


class SchedulerGoneError(FeatureCacheError, ConnectionError):
    """A Dask scheduler that can't be reached, or not any more."""


class StoreError(FeatureCacheError, OSError):
    """The cache directory can't be used as asked."""


class NotACacheError(StoreError):
    """A folder that is not a feature cache."""


class CacheVersionError(StoreError):
    """A cache written in a format that this version does not know."""


class ReadOnlyCacheError(StoreError, PermissionError):
    """A write to a cache that was opened, or is, read-only."""


class CorruptRecordError(StoreError):
    """Bytes on disk differ from those that were committed."""
