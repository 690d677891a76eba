"""What the design asks of the package, each as a ratio of two sides of a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .batches import MEMORY
from .harness import OURS, Case, quartiles
from .lazy import FIRST
from .pooling import THEIRS
from .warming import ALONE, CORES, WARM
from .witness import WITHOUT


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes
    ----------
    what : str
    benchmark, case : str
        Where it is measured; the case's name begins so.
    side, against : str
        Measured is how many times longer `side` takes; seconds, where `against` is empty.
    most, least : float
        The bounds that are asked for.
    """

    what: str
    benchmark: str
    case: str
    side: str
    against: str
    most: float = float("inf")
    least: float = 0.0

    @property
    def asked(self) -> str:
        """The bound, for people."""
        unit = "x" if self.against else "s"
        bound = f"at least {self.least:.4g}" if self.least else f"at most {self.most:.4g}"
        return f"{bound} {unit}"

    def measure(
        self, results: Mapping[str, Mapping[str, Case]]
    ) -> tuple[float, float, float] | None:
        """Give the quartiles of what was measured; None where it was not."""
        for name, case in results.get(self.benchmark, {}).items():
            if name.startswith(self.case) and {self.side, self.against or self.side} <= set(
                case.values
            ):
                values = (
                    case.ratios(self.side, self.against) if self.against else case.values[self.side]
                )
                return quartiles(values)
        return None


WINDOW = "8 x 50 x 256"
TARGETS = (
    Target(
        "a window in memory, against np.memmap", "windows", f"{WINDOW} warm", OURS, "np.memmap", 1.1
    ),
    Target(
        "HDF5 file a sample, against us",
        "windows",
        f"{WINDOW} warm",
        "HDF5 file a sample",
        OURS,
        least=20,
    ),
    Target(
        "zarr-python, best chunks, against us",
        "windows",
        f"{WINDOW} warm",
        "zarr-python, best chunks",
        OURS,
        least=40,
    ),
    Target(
        "zarr-python, array a frame, against us",
        "windows",
        f"{WINDOW} warm",
        "zarr-python, array a frame",
        OURS,
        least=40,
    ),
    Target("a window from disk, against pread", "windows", f"{WINDOW} cold", OURS, "pread", 1.25),
    Target(
        "batches of 8, 0 workers, from memory sample by sample, against us",
        "batches",
        "features, 0 workers",
        MEMORY,
        OURS,
        least=1.2,
    ),
    Target(
        "batches of 8, 2 workers, from memory sample by sample, against us",
        "batches",
        "features, 2 workers",
        MEMORY,
        OURS,
        least=1.2,
    ),
    Target(
        "a grid of 2 MB in memory, against np.memmap",
        "dense",
        "a frame of 64 x 64 x 256, warm",
        OURS,
        "np.memmap",
        1.2,
    ),
    Target(
        "a grid of 2 MB from disk, against pread",
        "dense",
        "a frame of 64 x 64 x 256, cold",
        OURS,
        "pread",
        1.1,
    ),
    Target(
        "writing a large pack, fsync aside, against write()",
        "writing",
        "large pack",
        OURS,
        "write()",
        1.25,
    ),
    Target("opening 1,000,000 records", "opening", "1,000,000 records: opening", OURS, "", 1),
    Target(
        "a lookup in bulk among 1,000,000",
        "opening",
        "1,000,000 records: a lookup",
        f"{OURS}, in bulk",
        "",
        2e-6,
    ),
    Target(
        "trackastra-pretrained-feats' pooling, 150 regions, against ours",
        "pooling",
        "mean_patches_exact, 150 regions, 64",
        THEIRS,
        OURS,
        least=20,
    ),
    Target(
        "warming 15 copies: processor time a record, beside backbone and draws of pixels",
        "warming",
        "processor time",
        WARM,
        "",
        0.02,
    ),
    Target(
        "the same at 10 ms a frame, against the backbone alone, were there cores enough (a model)",
        "warming",
        f"10 ms a frame, 15 copies, {CORES}",
        WARM,
        ALONE,
        1.1,
    ),
    Target(
        "the same at 1 ms a frame",
        "warming",
        f"1 ms a frame, 15 copies, {CORES}",
        WARM,
        ALONE,
        1.5,
    ),
    Target(
        "warming, against warming without the witness", "witness", "warming", OURS, WITHOUT, 1.01
    ),
    Target("a lazy first epoch, against warming first", "lazy", "", OURS, FIRST, 1.05),
    Target(
        "a training epoch, against features in memory", "batches", "an epoch", OURS, MEMORY, 1.02
    ),
    Target(
        "hashing, against reading the TIFFs",
        "hashing",
        "frame and mask",
        OURS,
        "reading the TIFFs",
        0.02,
    ),
)
