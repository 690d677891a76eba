"""Verification: every file against what it should hold, and every record against its checksum."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CacheVersionError, CorruptRecordError, NotACacheError, StoreError
from ...hashing import DIGEST_BYTES, JSON, digest_json
from ..array import ArrayFile
from ..counters import read_run
from ..files import (
    TRANSIENT,
    group_text,
    list_folder,
    make_folders,
    read_each,
    read_file,
    reading,
    write_text,
    writing,
)
from ..pack import Pack, read_provenance
from ..pack_contents import OLD_ARRAYS, join_parts, missing_is_corrupt, read_contents
from ..process import join
from ..requested_movies import Asked
from ..space import PACK_NAME, Space, quarantine_folder
from ..store import OWN_NAMES, ROOT_TEXT, ROOT_TEXTS, TAG, read_spec, read_version
from ..writer import NewRecord
from .collect import choose_names, find_leftovers
from .compact import alone
from .pins import read_pin
from .removal import remove_tree

_SMALL_FILES: tuple[tuple[str, Callable[[Path], object], str], ...] = (
    ("pins", read_pin, "is no pin: pin again"),
    ("stats", read_run, "holds no counters"),
    ("asked", Asked.read, "names no movie"),
)
Progress = Callable[[int], None]
"""Called with the number of packs just verified."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, or left over.

    Attributes
    ----------
    kind : str
        ``"damaged"``, ``"missing"``, ``"unknown"``, ``"leftover"``, ``"duplicate"``, ``"spec"``, or
        ``"wrong"``: a record whose numbers are not those of its key (`feature_cache.recompute`).
    path : Path
    message : str
        What is wrong, and what `repair` does.
    lost : tuple of str
        The records that count as missing then, as far as is known: movie and frame.
    record : str
        Hex key of the one record that it is about; empty where it is about all of `path`.
    details : mapping
        What else is known of that record.
    """

    kind: str
    path: Path
    message: str
    lost: tuple[str, ...] = ()
    record: str = ""
    details: Mapping[str, JSON] = field(default_factory=dict)

    @property
    def is_wrong(self) -> bool:
        """Whether something should be done: what killed processes left is in nobody's way."""
        return self.kind != "leftover"

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        of_record = {"record": self.record, **self.details} if self.record else {}
        return {
            "kind": self.kind,
            "path": str(self.path),
            "message": self.message,
            "lost": list(self.lost),
            **of_record,
        }


def verify(
    root: Path,
    *,
    deep: bool = False,
    spaces: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Finding]:
    """Look at every file of a cache, and compare every record with its checksum. Changes nothing.

    Parameters
    ----------
    root : Path
    deep : bool
        Also read each pack through zarr-python, as any other tool would, and compare bit by bit.
    spaces : sequence of str
        Only these spaces: beginnings of their names.
    progress : callable, optional

    Returns
    -------
    list of Finding
        Empty where all is well.

    Raises
    ------
    StoreError
        It is no cache, a newer one, or can't be read.
    MissingRecordError
        No space of such a name.
    """
    root = root.absolute()
    with reading(root):
        findings = list(_check_root(root))
        for name in choose_names(_space_names(root), spaces):
            folder = root / "spaces" / name
            if not folder.is_dir():
                findings.append(_unknown(folder))
                continue
            findings += _check_space(Space(folder, {}, "r"), deep, progress)
        findings += [
            Finding("leftover", path, "left by a process that is gone; gc removes it")
            for path in find_leftovers(root)
        ]
    return findings


def count_packs(root: Path, spaces: Sequence[str] = ()) -> int:
    """Count the packs that `verify` will look at."""
    names = list_folder(root / "spaces")
    wanted = [n for n in names if not spaces or any(n.startswith(start) for start in spaces)]
    return sum(len(Space(root / "spaces" / n, {}, "r").pack_names()) for n in wanted)


def _space_names(root: Path) -> list[str]:
    names = list_folder(root / "spaces")
    return [name for name in names if name != "zarr.json" and not name.startswith(TRANSIENT)]


def _unknown(path: Path) -> Finding:
    return Finding("unknown", path, "no file of ours; repair moves it to quarantine")


def _check_root(root: Path) -> Iterator[Finding]:
    try:
        read_version(root)
        yield from _check_text(root / "zarr.json", *ROOT_TEXTS)
    except CacheVersionError:
        raise
    except FileNotFoundError as error:
        if not list_folder(root / "spaces"):
            found = "is not a feature cache" if root.exists() else "does not exist"
            raise NotACacheError(f"{root} {found}; name the folder of a feature cache") from error
        yield Finding("missing", root / "zarr.json", "missing; repair writes it anew")
    except StoreError as error:
        if not list_folder(root / "spaces"):
            raise
        yield Finding("damaged", root / "zarr.json", f"{error}; repair writes it anew")
    yield from _check_text(root / "CACHEDIR.TAG", TAG)
    if any(_is_made(root / "spaces" / name) for name in list_folder(root / "spaces")):
        yield from _check_text(root / "spaces" / "zarr.json", group_text({}))
    for name, read, what in _SMALL_FILES:
        damaged = read_each(root / name, read)[1]
        yield from (Finding("damaged", file, f"{what}; repair sets it aside") for file in damaged)
    for path in _find_unknown(root):
        yield _unknown(path)


def _find_unknown(root: Path) -> Iterator[Path]:
    """Find what is not ours in the root, and among small files."""

    def others(folder: Path, is_ours: Callable[[str], object]) -> Iterator[Path]:
        names = (name for name in list_folder(folder) if not name.startswith(TRANSIENT))
        return (folder / name for name in names if not is_ours(name))

    yield from others(root, OWN_NAMES.__contains__)
    for folder in (root / "asked", root / "pins", root / "stats"):
        yield from others(folder, lambda name: name.endswith(".json"))
    yield from others(root / "retired", lambda name: (root / "retired" / name).is_dir())
    for name in list_folder(root / "retired"):  # marks that version 1 to 3 knew
        yield from others(root / "retired" / name, PACK_NAME.fullmatch)
    yield from others(root / "tables", lambda name: (root / "spaces" / name).is_dir())


def _is_made(space: Path) -> bool:
    """Tell whether a space is whole: its spec is written last, and packs after it."""
    return (space / "zarr.json").exists() or bool(Space(space, {}, "r").pack_names())


def _check_text(file: Path, *expected: str) -> Iterator[Finding]:
    """Compare a file whose text is known."""
    try:
        found = read_file(file, 1 << 20)
    except (FileNotFoundError, NotADirectoryError):
        yield Finding("missing", file, "missing; repair writes it anew")
        return
    except ValueError:
        found = b""
    if found not in [text.encode() for text in expected]:
        yield Finding("damaged", file, "holds something else than it should; repair writes it anew")


def _check_space(space: Space, deep: bool, progress: Progress | None) -> Iterator[Finding]:
    if _is_made(space.path):
        yield from _check_spec(space.path)
        yield from _check_text(space.packs_folder / "zarr.json", group_text({}))
    if space.packs_folder.exists() and not space.packs_folder.is_dir():
        yield _unknown(space.packs_folder)
    for name in list_folder(space.path):
        if name not in ("zarr.json", "packs") and not name.startswith(TRANSIENT):
            yield _unknown(space.path / name)
    for name in list_folder(space.packs_folder):
        known = name == "zarr.json" or PACK_NAME.fullmatch(name) or name.startswith(TRANSIENT)
        if not known:
            yield _unknown(space.packs_folder / name)
    sound = []
    for name in space.pack_names():
        findings = _check_pack(space, name, deep)
        if all(finding.kind == "unknown" for finding in findings):
            sound.append(name)
        yield from findings
        if progress is not None:
            progress(1)
    yield from _find_duplicates(space, sound)


def _check_spec(folder: Path) -> Iterator[Finding]:
    file = folder / "zarr.json"
    how = "repair moves it to quarantine; it is written anew when the space is used again"
    try:
        spec = read_spec(folder)
        text = group_text({"feature_cache": {"space": spec}})
        if text.encode() != read_file(file, 1 << 20):
            yield Finding("damaged", file, f"is not as it was written; {how}")
        elif not folder.name.endswith(f"-{digest_json(spec).hex()[:8]}"):
            yield Finding("spec", file, f"holds another spec than the folder's name says; {how}")
    except FileNotFoundError:
        yield Finding("missing", file, "missing; it is written anew when the space is used again")
    except (StoreError, ValueError, TypeError, RecursionError) as error:
        yield Finding("damaged", file, f"{error}; {how}")


def _check_pack(space: Space, name: str, deep: bool) -> list[Finding]:
    findings = _look_at_pack(space, name, deep)
    # It may have been removed during the first look, and written anew.
    return findings and _look_at_pack(space, name, deep)


def _look_at_pack(space: Space, name: str, deep: bool) -> list[Finding]:
    folder = space.packs_folder / name
    try:
        with missing_is_corrupt(folder):
            pack = Pack(folder)
            pack.check()
            unknown = _check_files(pack)
            if len(read_provenance(folder)["records"]) != len(pack):
                raise CorruptRecordError(f"{folder} says where other records come from")
            if deep:
                _check_as_zarr(pack)
    except FileNotFoundError:
        return []  # removed or set aside meanwhile
    except CorruptRecordError as error:
        lost = _name_records(folder)
        text = f"{error}; repair moves the pack to quarantine, its records count as missing"
        return [Finding("damaged", folder, text, lost)]
    return [_unknown(file) for file in unknown]


def _check_files(pack: Pack) -> list[Path]:
    """Compare the files of a pack with those that its metadata promise; list the others."""
    arrays = {"features", "index"}
    if not (pack.path / "index").exists():  # of version 1 to 3
        regions = {"labels", "offsets"} if len(pack.features.shape) > 2 else set[str]()
        arrays = {"features", *OLD_ARRAYS} - regions
    expected = {pack.path / "zarr.json"}
    for name in arrays:
        array = ArrayFile.read(pack.path / name)
        expected.add(pack.path / name / "zarr.json")
        expected.update(array.chunk_file(*index) for index in array.file_indices())
    found = {file for file in pack.path.rglob("*") if file.is_symlink() or not file.is_dir()}
    for file in sorted(expected - found):
        # Where it is gone, this raises: perhaps with its pack, and that is no damage.
        file.lstat()
        raise CorruptRecordError(f"{file} is no plain file")
    return sorted(file for file in found - expected if not file.name.startswith(TRANSIENT))


def _check_as_zarr(pack: Pack) -> None:
    """Compare what zarr-python reads with what we read."""
    import zarr

    try:
        group = zarr.open_group(pack.path, mode="r", zarr_format=3, use_consolidated=False)
        features: Any = group["features"]
        contents = read_contents(pack.path)
        is_old = not (pack.path / "index").exists()
        name, ours = ("keys", contents.keys) if is_old else ("index", join_parts(contents))
        same, offsets = np.array_equal(np.asarray(group[name]), ours), contents.offsets
        for row in range(len(pack)):
            rows = row if offsets is None else slice(int(offsets[row]), int(offsets[row + 1]))
            same = same and features[rows].tobytes() == pack.record(row).features.tobytes()
    except (ValueError, RuntimeError, TypeError, LookupError, ArithmeticError) as error:
        raise CorruptRecordError(f"zarr-python can't read {pack.path}: {error}") from error
    if not same:
        raise CorruptRecordError(f"zarr-python reads other numbers from {pack.path}")


def _name_records(folder: Path) -> tuple[str, ...]:
    try:
        sources = read_provenance(folder)["records"]
    except (FileNotFoundError, CorruptRecordError):
        return ()
    return tuple(map(name_source, sources))


def name_source(source: Mapping[str, Any]) -> str:
    """Name a record for people by what its writer said: movie, frame, and copy."""
    movie, frame = source.get("movie") or "a movie", source.get("frame")
    return f"{movie} frame {frame} {source.get('origin') or ''}".rstrip()


def _find_duplicates(space: Space, packs: Sequence[str]) -> Iterator[Finding]:
    first: dict[bytes, tuple[str, int]] = {}
    for name in packs:
        try:
            pack = Pack(space.packs_folder / name)
        except (FileNotFoundError, CorruptRecordError):
            continue
        keys = [key.tobytes() for key in pack.keys]
        sums = pack.checksums.tolist()
        twice = [key for key in keys if key in first]
        differ = sum(first[k][1] != c for k, c in zip(keys, sums, strict=True) if k in first)
        if twice:
            others = ", ".join(sorted({first[key][0] for key in twice}))
            numbers = f", {differ} of them with other numbers" if differ else ""
            text = f"{len(twice)} of its {len(keys)} records are in {others} too{numbers}"
            yield Finding("duplicate", pack.path, f"{text}; compact keeps one of each")
        first.update({k: (name, c) for k, c in zip(keys, sums, strict=True) if k not in first})


def repair(root: Path, findings: Iterable[Finding]) -> None:
    """Mend what `verify` found: move what is damaged or unknown to quarantine, write texts anew.

    Nothing is deleted but left-overs, and the other records of a pack with wrong ones stay.
    Duplicates are left to `compact_space`.

    Raises
    ------
    StoreError
        The folder can't be written, or a space with wrong records is being compacted.
    """
    root = root.absolute()
    wrong: dict[Path, set[str]] = {}
    with writing(root):
        for finding in findings:
            if finding.kind == "wrong":
                wrong.setdefault(finding.path, set()).add(finding.record)
                continue
            path, text = finding.path, _known_text(root, finding.path)
            if finding.kind == "leftover":
                remove_tree(path, join(root).name)
            elif finding.kind in ("damaged", "missing") and text is not None:
                _write_anew(root, path, text)
            elif finding.kind == "damaged" and _is_pack(root, path):
                _set_pack_aside(path)
            elif finding.kind != "duplicate":
                _set_aside(root, path)
        for pack, records in wrong.items():
            _set_records_aside(pack, records)


def _known_text(root: Path, file: Path) -> str | None:
    """Give what a file should hold, where that is known."""
    if file in (root / "zarr.json", root / "CACHEDIR.TAG"):
        return TAG if file.name == "CACHEDIR.TAG" else ROOT_TEXT
    parts = file.relative_to(root).parts
    plain = parts == ("spaces", "zarr.json") or (
        len(parts) == 4 and (parts[0], *parts[2:]) == ("spaces", "packs", "zarr.json")
    )
    return group_text({}) if plain else None


def _is_pack(root: Path, path: Path) -> bool:
    return path.parent.name == "packs" and path.parents[2] == root / "spaces"


def _set_pack_aside(path: Path) -> None:
    space = Space(path.parent.parent, {}, "a")
    if _check_pack(space, path.name, deep=True):  # it may be another pack by now
        _move(path, quarantine_folder(space, path.name))


def _set_records_aside(path: Path, records: Collection[str]) -> None:
    """Set records of a pack aside, by their hex keys; where it was merged, those that hold them."""
    folder = path.parent.parent
    space = Space(folder, read_spec(folder), "a")
    with alone(space) as granted:
        if not granted:
            raise StoreError(f"{folder} is being compacted: repair it again when that is done")
        space.refresh()
        keys = np.frombuffer(bytes.fromhex("".join(records)), np.uint8).reshape(-1, DIGEST_BYTES)
        for name in [path.name] if path.is_dir() else space.holders(keys):
            with suppress(FileNotFoundError):
                _write_without(space, name, records)


def _write_without(space: Space, name: str, records: Collection[str]) -> None:
    """Commit the other records of a pack anew, and then move it to quarantine."""
    path = space.packs_folder / name
    pack, provenance = Pack(path), read_provenance(path)
    sources = provenance.pop("records")
    keys = [key.tobytes() for key in pack.keys]
    good = [row for row, key in enumerate(keys) if key.hex() not in records]
    entries = [NewRecord(keys[row], pack.record(row), sources[row]) for row in good]
    if entries:
        space.write(entries, provenance, pack.features.codec)
    _move(path, quarantine_folder(space, name))


def _set_aside(root: Path, path: Path) -> None:
    """Move away what is no pack, under a name that no pack in quarantine has: gc leaves it."""
    name = path.name[:100].replace("-", "_")
    _move(path, root / "quarantine" / f"{name}_{secrets.token_hex(4)}")


def _move(path: Path, target: Path) -> None:
    make_folders(target.parent, target.parents[1])
    with suppress(FileNotFoundError):
        shutil.move(path, target)


def _write_anew(root: Path, file: Path, text: str) -> None:
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
        _set_aside(root, file)
    make_folders(file.parent, root)
    write_text(file, text)
