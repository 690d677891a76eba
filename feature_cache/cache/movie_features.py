"""The records of one movie: where the store and the backbones meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..augment import Augmentations
from ..engine import Progress, Tally, grid_spec
from ..errors import DrawError, MissingRecordError
from ..explain import Explanation, Stored, explain_miss
from ..key import Keys, Record
from ..store import Index, Span, Usage, read_asked, record_sources
from .movie_keys import MovieKeys
from .movie_requests import check_batch_size, compute_wanted


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where records of a movie are in the packs of a space, as one index had it.

    Attributes
    ----------
    index : Index
    rows : dict of int to (int, int)
        Number of pack and row for a frame; (-1, -1) where there was none.
    """

    index: Index
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, indices: Sequence[int], keys: Keys) -> None:
        """Look up frames by their keys."""
        packs, rows = self.index.find(keys)
        self.rows.update(zip(indices, zip(packs.tolist(), rows.tolist(), strict=True), strict=True))

    def runs(self, indices: Sequence[int]) -> list[tuple[int, range]]:
        """Group frames whose records lie side by side: number of pack, and rows in it."""
        runs: list[tuple[int, range]] = []
        for t in indices:
            pack, row = self.rows[t]
            before, rows = runs[-1] if runs else (-1, range(0))
            if pack == before >= 0 and row == rows.stop:
                runs[-1] = pack, range(rows.start, row + 1)
            else:
                runs.append((pack, range(row, row + 1)))
        return runs


@dataclass(eq=False)
class MovieFeatures(MovieKeys):
    """The records of one movie in one space under one draw; made by `FeatureCache.movie`.

    They are found by the keys, which says of frames and masks when they are read.
    """

    # Of no other draw or space: `replace` leaves out what `init` doesn't take.
    _places: Places | None = field(default=None, repr=False, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the places in open packs, too."""
        return {**super().__getstate__(), "_places": None}

    def get(self, indices: Sequence[int] | None = None) -> list[Record | None]:
        """Read records of some frames, by default all; None where there is none."""
        wanted = self.numbers(indices)
        if (span := self.span(wanted)) is not None:
            self.cache.counter.add(Usage(hits=len(span), bytes_read=span.features.nbytes))
            return list(span.records())
        records = self.space.read(self.keys(wanted))
        hits = [record for record in records if record is not None]
        size = sum(record.features.nbytes for record in hits)
        usage = Usage(hits=len(hits), misses=len(records) - len(hits), bytes_read=size)
        self.cache.counter.add(usage)
        return records

    def span(self, indices: Sequence[int]) -> Span | None:
        """Read records of some frames, those that lie side by side at once; count no hit.

        None where one is missing, or lies in a pack that is not open yet, and for several grids:
        `get` them.
        """
        if self.spec.pooling is None and len(indices) > 1:
            return None
        if self._places is None or self._places.index is not self.space.index:
            self._places = Places(self.space.index)
        # taken once: another thread may exchange it for that of another index
        places = self._places
        unknown = [t for t in indices if t not in places.rows]
        if unknown:
            places.add(unknown, self.keys(unknown))
        runs, spans = places.runs(indices), []
        if any(pack < 0 for pack, _ in runs):
            return None
        for pack, rows in runs:
            span = self.space.view(places.index, pack, rows.start, rows.stop)
            if span is None:
                return None
            spans.append(span)
        return Span.join(spans) if spans else None

    def get_or_compute(
        self,
        indices: Sequence[int] | None = None,
        *,
        batch_size: int | None = 8,
        keep_grids: bool = False,
    ) -> list[Record]:
        """Read records of some frames, by default all; compute and commit what is missing.

        Parameters as `compute`.

        Raises
        ------
        As `FeatureCache.get_or_compute`.
        """
        check_batch_size(batch_size)
        wanted, tally = self.numbers(indices), Tally()
        good = self.hash_frames(wanted, tally)
        records = dict(zip(good, self.get(good), strict=True))
        absent = [t for t, record in records.items() if record is None]
        if absent:
            self._compute(absent, tally, batch_size=batch_size, keep_grids=keep_grids, reads=True)
            # from the store: the engine keeps no records, and a miss gives what a hit would
            records.update(zip(absent, self.space.read(self.keys(absent)), strict=True))
        tally.check()
        return [self.expect(t, records[t]) for t in wanted]

    def warm(self, *, batch_size: int | None = 8, keep_grids: bool = False) -> int:
        """Compute and commit all that is missing; give the number of records computed.

        Parameters as `compute`.

        Raises
        ------
        As `FeatureCache.get_or_compute`.
        """
        tally = Tally()
        good = self.hash_frames(range(len(self)), tally)
        absent = [t for t, there in zip(good, self.contains(good), strict=True) if not there]
        self.cache.counter.add(Usage(hits=len(good) - len(absent), misses=len(absent)))
        if absent:
            self._compute(absent, tally, batch_size=batch_size, keep_grids=keep_grids)
        tally.check()
        return tally.computed

    def expect(self, t: int, record: Record | None) -> Record:
        """Give the record of frame `t` just computed or read, or raise if it is gone."""
        if record is None:
            raise MissingRecordError(
                f"{self.where(t)} was computed, and is gone from {self.cache!r}: "
                "is another process removing records?"
            )
        return record

    def compute(
        self,
        indices: Sequence[int],
        *,
        batch_size: int | None = 8,
        keep_grids: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """Compute and commit those records of some frames that are missing.

        Commits every 64 MB or 30 seconds, and what is complete when an error ends it. Records that
        another process is computing are waited for, as long as that process lives, and computed
        here too where none has come for ten minutes. Where a frame's grid is stored in float32,
        its record is pooled from it, and the backbone is not called.

        Parameters
        ----------
        indices : sequence of int
        batch_size : int or None
            Frames embedded at once, fewer where the device's memory does not suffice; None for as
            many as fit.
        keep_grids : bool
            Store the grid of what is computed too, in float32: other poolings and other masks
            then need no backbone.
        progress : callable, optional
            Called with the number of records just done.

        Returns
        -------
        int
            How many were computed here; fewer than asked for where frames are equal, or others
            computed them.

        Raises
        ------
        As `FeatureCache.get_or_compute`; FrameError also where a frame changed since it was hashed.
        An error that is a frame's own is raised when all others are computed, and names all such.
        """
        tally = Tally(progress)
        wanted = self.numbers(indices)
        self._compute(wanted, tally, batch_size=batch_size, keep_grids=keep_grids)
        tally.check()
        return tally.computed

    def _compute(
        self,
        indices: Sequence[int],
        tally: Tally,
        *,
        batch_size: int | None,
        keep_grids: bool,
        reads: bool = False,
    ) -> None:
        views, grids = [self], grid_spec(self.spec.backbone)
        if keep_grids and self.spec != grids:
            views.append(self.in_space(grids))
        wanted, grids_alone = ((t, views) for t in indices), views[1:]
        compute_wanted(wanted, tally, batch_size=batch_size, uncounted=grids_alone, reads=reads)

    def explain(
        self,
        augmentations: Augmentations | None = None,
        copy: int = 0,
        indices: Sequence[int] | None = None,
    ) -> list[Explanation]:
        """Say for some frames, by default all, why their records are there or not.

        Parameters
        ----------
        augmentations : Augmentations, optional
            Explain one of its copies, instead of this object's draw.
        copy : int
            Which one.
        indices : sequence of int, optional
            The frames.
        """
        frames = self.numbers(indices)
        if augmentations is None:
            return self._explain(frames, [])
        if not isinstance(augmentations, Augmentations):
            raise DrawError(
                f"augmentations is a {type(augmentations).__name__}: expected Augmentations, such "
                "as Augmentations('flips', copies=3)"
            )
        asked = self.with_draw(augmentations.draw(copy), augmentations.name_of(copy))
        return asked._explain(frames, [self.with_draw(draw) for draw in augmentations.draws()])

    def _explain(self, frames: Sequence[int], copies: Sequence[MovieFeatures]) -> list[Explanation]:
        for folder in self.space.folders:
            folder.refresh()
        there = self.contains(frames)
        present = [movie.contains(frames) for movie in copies]
        stored = [] if there.all() else list(self._stored())
        spec = self.spec.to_json()
        explanations = []
        for i, t in enumerate(frames):
            others = [k for k, found in enumerate(present) if found[i]]
            reason = "stored"
            if not there[i]:
                reason = explain_miss(
                    spec, self.provenance(t), stored, others, is_known=bool(there.any())
                )
            explanations.append(
                Explanation(self.where(t), self.key(t).hex(), bool(there[i]), reason)
            )
        return explanations

    def _stored(self) -> Iterator[Stored]:
        """Give the spaces of all folders, and what was asked for there."""
        for store in self.cache.stores():
            asked = list(read_asked(store.root))
            for space in store.spaces():
                sources = [source for _, source in record_sources(space)]
                wanted = [one for one in asked if space.name in one.wanted]
                yield Stored(space.spec, sources, space.name, wanted)
