"""When packs were last used, as all processes say."""

from __future__ import annotations

from pathlib import Path

from ..files import list_folder
from ..last_uses import KnownUses, read_uses
from ..process import join, living
from ..space import Space


def known_uses(root: Path) -> KnownUses:
    """Read what all processes used, this one up to now."""
    presence = join(root, create=False)
    presence.note()
    now = presence.now()
    names = list_folder(root / "processes")  # first: those that come later are running
    lives = {*living(root, now), presence.name}
    return read_uses(root, now, {name: name in lives for name in {*names, *lives}})


def last_uses(space: Space) -> dict[str, float]:
    """Give when each pack of a space was last used, or written, in seconds since 1970, by name."""
    times = known_uses(space.root).times
    noted = space.pack_times()
    return {name: max(time, times.get((space.name, name), time)) for name, time in noted.items()}
