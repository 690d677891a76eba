"""Claims of frames: whoever computes a frame's records claims it once, not record by record."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ..augment import Draw
from ..hashing import Digest, digest_bytes, digest_json
from ..store.claims import Claims
from .request import Request, Wanted

ASKED_SECONDS = 0.25
"""How often is looked whether another process waits."""


@dataclass(slots=True, eq=False)
class Claim:
    """A claim, and the records that it is held for."""

    name: str
    keys: set[Digest] = field(default_factory=set)


@dataclass(frozen=True, slots=True, eq=False)
class ClaimedPart:
    """What of a request is this engine's to do, and what other processes are at.

    Attributes
    ----------
    held : tuple of str
        The claims of others.
    """

    mine: Sequence[Wanted]
    others: Sequence[Wanted]
    held: tuple[str, ...] = ()


class FrameClaims:
    """Claims what an engine computes, and lets go of it when it is committed.

    Who wants one draw of a frame claims ``<frame>.<draw>``; who wants several claims
    ``<frame>`` as a whole. Each makes its claim first and looks for the other kind then, so that
    of two at once at least one sees the other. May be called by any thread.

    Parameters
    ----------
    claims : Claims
    """

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._of_key: dict[Digest, Claim] = {}
        self._by_name: dict[str, Claim] = {}
        self._looked = self._asked = float("-inf")
        self._lock = threading.RLock()

    @property
    def any(self) -> bool:
        """Whether anything is claimed."""
        return bool(self._of_key)

    def take(self, requests: Sequence[Request]) -> list[ClaimedPart]:
        """Claim frames; what this object claimed before is shared. StoreError as `Claims.take`."""
        named = [_name_all(request) for request in requests]
        tops = [unit if len(draws) > 1 else next(iter(draws)) for unit, draws in named]
        own = [self._join(top, r.wanted) for top, r in zip(tops, requests, strict=True)]
        # each once: `Claims.take` doesn't give a claim of this process a second time
        new = dict.fromkeys(top for top, is_own in zip(tops, own, strict=True) if not is_own)
        won = dict(zip(new, self._claims.take(new), strict=True))
        shares = []
        for request, (unit, draws), top, is_own in zip(requests, named, tops, own, strict=True):
            if is_own:
                shares.append(ClaimedPart(request.wanted, ()))
            elif won[top] or self._join(top, request.wanted):
                shares.append(self._share(request, unit, draws, top))
            else:
                shares.append(ClaimedPart((), request.wanted, (top,)))
        return shares

    def _join(self, name: str, wanted: Sequence[Wanted]) -> bool:
        # joining and giving up exclude each other: no claim is given up with a new key in it
        with self._lock:
            claim = self._by_name.get(name)
            if claim is not None:
                claim.keys.update(one.key for one in wanted)
                self._of_key.update((one.key, claim) for one in wanted)
            return claim is not None

    def _share(
        self, request: Request, unit: str, draws: Mapping[str, Sequence[Wanted]], top: str
    ) -> ClaimedPart:
        """Leave out what others claimed in the other way; `top` is claimed."""
        # a claim of this engine's own in the other way is in nobody's way
        held = tuple(
            name
            for name in ([unit] if top in draws else draws)
            if name not in self._by_name and self._claims.is_held(name)
        )
        others = [
            wanted for name, group in draws.items() for wanted in group if {name, unit} & {*held}
        ]
        mine = [wanted for wanted in request.wanted if wanted not in others]
        if mine:
            claim = Claim(top, set())
            with self._lock:
                # another request of this call may have made it
                self._by_name.setdefault(top, claim)
            self._join(top, mine)
        # claimed for nothing, unless another request needs it
        elif top not in self._by_name:
            self._claims.release([top])
        return ClaimedPart(mine, others, held)

    def holder(self, name: str) -> str:
        """Name who holds a claim, for people."""
        return self._claims.holder(name) or "nobody any more"

    def ask(self, names: Sequence[str]) -> None:
        """Ask whoever holds claims to commit soon."""
        self._claims.ask(names)

    def asked(self) -> float:
        """Give when somebody asked this process to commit, by `time.monotonic`."""
        if time.monotonic() - self._looked >= ASKED_SECONDS:
            self._asked, self._looked = self._claims.asked(), time.monotonic()
        return self._asked

    def settle(self, keys: Sequence[Digest]) -> None:
        """Let go of records; a claim is given up with its last one."""
        done = []
        with self._lock:
            for key in keys:
                claim = self._of_key.pop(key, None)
                if claim is not None:
                    claim.keys.discard(key)
                    if not claim.keys:
                        # the name goes before the file: what is joined must have a file
                        del self._by_name[claim.name]
                        done.append(claim.name)
        # outside the lock, as it reads and removes files. Wanted again before its file is gone, a
        # frame counts as somebody else's, and is set aside for a moment
        self._claims.release(done)

    def close(self) -> None:
        """Give up everything."""
        with self._lock:
            left = list(self._of_key)
        self.settle(left)
        self._claims.ask_no_more()


def claim_name(backbone: Digest, frame: Digest, draw: Draw | None = None) -> str:
    """Name the claim of a frame with all its draws, or under one of them."""
    unit = digest_bytes(backbone, frame).hex()
    return unit if draw is None else f"{unit}.{_name_of(draw)}"


@lru_cache(maxsize=1024)
def _name_of(draw: Draw) -> str:
    return digest_json(draw.to_json()).hex()[:16]


def _name_all(request: Request) -> tuple[str, dict[str, list[Wanted]]]:
    """Name a request's frame, and each of its draws with what is wanted of it."""
    unit = claim_name(request.model.digest, request.digest)
    draws: dict[str, list[Wanted]] = defaultdict(list)
    for wanted in request.wanted:
        draws[f"{unit}.{_name_of(wanted.draw)}"].append(wanted)
    return unit, draws
