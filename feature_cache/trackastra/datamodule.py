"""Trackastra's Lightning data module, with cached features; its samplers and loader with epochs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from trackastra.data import distributed as _distributed
from trackastra.data.data import CTCData

from ..augment import Augmentations
from ..backbones import load_backbone
from ..cache import FeatureCache
from ..dataset import Drawn, OnMiss, warm_tokens
from ..service import ReadAhead
from .collation import collate
from .ctc_options import check_options
from .ctc_source import check_inputs
from .seeds import mix_seeds, seeded_numpy
from .shallow import Props
from .training_data import load_all
from .wrapping import Geometry, PlacedCTCData, wrap

if TYPE_CHECKING:
    from ..backbones.base import Backbone

_logger = logging.getLogger(__name__)


def set_epoch(dataset: Any, epoch: int) -> None:
    """Choose other copies in a dataset, or in the parts of a concatenated one, that have copies.

    For indices that no sampler of ours draws.
    """
    for part in getattr(dataset, "datasets", [dataset]):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


class EpochBatchSampler(_distributed.BalancedBatchSampler):  # type: ignore[misc]
    """Upstream's balanced batches, of indices that know their place (`Drawn`).

    Batches and samples are a function of (seed, epoch, position). An epoch that is not set is the
    one after the last.

    Parameters
    ----------
    dataset, *args, **kwargs
        As upstream.
    seed : int, optional
        By default from NumPy's global generator.
    """

    def __init__(
        self, dataset: Dataset[Any], *args: Any, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.dataset, self.seed, self.epoch = dataset, _choose_seed(seed), 0

    @property
    def sampler(self) -> EpochBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Draw those of an epoch next."""
        self.epoch = epoch
        set_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[list[int]]:
        """Draw an epoch's batches."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        with seeded_numpy(mix_seeds("batches", self.seed, epoch, 0)):
            batches = [*super().__iter__()]
        positions = count()
        for batch in batches:
            places = ((epoch, next(positions), 0) for _ in batch)
            yield [Drawn(n, self.seed, place) for n, place in zip(batch, places, strict=True)]


class EpochDistributedSampler(_distributed.BalancedDistributedSampler):  # type: ignore[misc]
    """Upstream's balanced indices of a rank, which know their place; as `EpochBatchSampler`."""

    def __init__(
        self, dataset: Dataset[Any], *args: Any, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(dataset, *args, **kwargs, seed=seed or 0)
        self.draw_seed = _choose_seed(seed)

    def set_epoch(self, epoch: int) -> None:
        """Draw those of an epoch next."""
        super().set_epoch(epoch)
        set_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[int]:
        """Draw an epoch's indices."""
        epoch, rank = self.epoch, self.rank
        with seeded_numpy(mix_seeds("batches", self.draw_seed, epoch, rank)):
            drawn = [*super().__iter__()]
        self.epoch += 1
        for position, n in enumerate(drawn):
            yield Drawn(n, self.draw_seed, (epoch, position, rank))


def _choose_seed(seed: int | None) -> int:
    return int(np.random.randint(1 << 31)) if seed is None else seed


class LateDataLoader(DataLoader[Any]):
    """A `DataLoader` that begins to read with its first batch, not when it is iterated.

    Lightning iterates the loader of its first epoch, also after a resume, before it says which
    epoch that is; workers would read ahead with another.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Give the batches."""
        yield from super().__iter__()


class CachedDataModule(_distributed.BalancedDataModule):  # type: ignore[misc]
    """Trackastra's `BalancedDataModule`, its samples with cached features.

    Training samples have augmented copies and validation samples have none. The epoch reaches the
    copies by itself: a sample, its crop, augmentation and copy, is a function of (seed, epoch,
    position in the epoch's draws, rank), with any number of workers, persistent or not, and after a
    resume; one of validation is a function of (seed, index), the same in every epoch.

    Parameters
    ----------
    input_train, input_val : sequence of path
        CTC folders.
    cachedir : path, optional
        Not used. It is where upstream pickles loaded datasets, under a name made of arguments and
        not of contents, so that changed movies are served stale.
    augment : int
        Level of upstream's augmentation of coordinates, for training.
    distributed : bool
        Whether training indices are divided among ranks.
    dataset_kwargs, sampler_kwargs, loader_kwargs : mapping
        As upstream; without a ``collate_fn``, batches are made by `collate`.
    cache, backbone, pooling, augmentations, geometry, additional_props, rotate_features, dtype
        As `wrap`. Without a backbone, samples are Trackastra's own; without a cache, which features
        need, datasets are built each time.
    on_miss, batch_size, progress
        As `wrap`. `batch_size` is the number of frames embedded at once.
    warm : bool
        Compute all that is missing, in every copy, before training: on one process of each node,
        while the others wait. Without, it is computed when a sample needs it.
    seed : int, optional
        Of all that is drawn; by default from NumPy's global generator. Copies have that of
        `augmentations` beside it.

    Attributes
    ----------
    datasets : dict
        ``"train"`` and ``"val"``, once `setup` has loaded them: once a process.

    Raises
    ------
    TypeError
        Options that are no mappings, or a seed that is no whole number.
    UnknownNameError
        There is no such option of the dataset.
    ValueError
        No movies; options of the dataset that are not what they have to be; without `distributed`,
        sampler and loader without a batch size, or with different ones.
    """

    def __init__(
        self,
        input_train: Sequence[str | os.PathLike[str]],
        input_val: Sequence[str | os.PathLike[str]],
        cachedir: str | os.PathLike[str] | None,
        augment: int,
        distributed: bool,
        dataset_kwargs: Mapping[str, Any],
        sampler_kwargs: Mapping[str, Any],
        loader_kwargs: Mapping[str, Any],
        *,
        cache: FeatureCache | str | os.PathLike[str] | None,
        backbone: Backbone | str | None,
        pooling: str = "mean_patches_exact",
        augmentations: Augmentations | None = None,
        geometry: Geometry = "map",
        additional_props: Props | None = "regionprops2",
        rotate_features: bool = False,
        dtype: str = "float16",
        on_miss: OnMiss = "compute",
        batch_size: int = 8,
        progress: bool = True,
        warm: bool = False,
        seed: int | None = None,
    ) -> None:
        if backbone is not None and cache is None:
            raise ValueError("features of a backbone need a cache: name its folder (cache)")
        for name, movies in (("input_train", input_train), ("input_val", input_val)):
            if isinstance(movies, str | os.PathLike) or not movies:
                raise ValueError(f"{name} is {movies!r}: expected a list of movies' folders")
        _check_arguments(dataset_kwargs, sampler_kwargs, loader_kwargs, distributed, seed)
        super().__init__(
            input_train, input_val, None, augment, distributed,
            dict(dataset_kwargs), dict(sampler_kwargs), {"collate_fn": collate, **loader_kwargs},
        )  # fmt: skip
        if cachedir is not None:
            _logger.info("cachedir %s is not used: its pickles may be stale", cachedir)
        self.datasets: dict[str, Any] = {}
        self.warm, self.seed = warm, seed
        self._cache = FeatureCache(cache) if isinstance(cache, str | os.PathLike) else cache
        self._backbone, self._augmentations = backbone, augmentations
        self._options: dict[str, Any] = {
            "pooling": pooling,
            "geometry": geometry,
            "additional_props": additional_props,
            "rotate_features": rotate_features,
            "dtype": dtype,
            "on_miss": on_miss,
            "batch_size": batch_size,
            "progress": progress,
        }

    def prepare_data(self) -> None:
        """Warm the cache, if that was asked for."""
        if self.warm:
            self.setup("fit")
            tokens = [getattr(data, "all_tokens", []) for data in self.datasets.values()]
            warm_tokens([one for some in tokens for one in some])

    def setup(self, stage: str) -> None:
        """Load both datasets, if this process has not loaded them; their names are checked first.

        They are kept in the cache, as by `load_ctc`; what is missing there is built in parallel.

        Parameters
        ----------
        stage : str
            Makes no difference.

        Raises
        ------
        MovieError, FrameError, UnknownNameError, ValueError
            As `wrap`.
        """
        if self.datasets:
            return
        inputs = {"train": self.input_train, "val": self.input_val}
        roots = [root for split in inputs.values() for root in split]
        check_inputs(roots, self.dataset_kwargs.get("detection_folders", ["TRA"]))
        augment = {"train": self.augment, "val": 0}
        movies = [
            (root, {"augment": augment[split], **self.dataset_kwargs})
            for split, some in inputs.items()
            for root in some
        ]
        if self._cache is None:
            loaded = iter([CTCData(root=Path(root), **options) for root, options in movies])
        else:
            loaded = iter(load_all(movies, self._cache))
        self.datasets = {
            split: self._wrap(ConcatDataset(list(islice(loaded, len(some)))), split)
            for split, some in inputs.items()
        }

    def train_dataloader(self) -> LateDataLoader:
        """Give balanced batches of the training set; what those to come miss is computed ahead."""
        data, options = self.datasets["train"], {"generator": _own(self.seed), **self.loader_kwargs}
        if self.distributed:
            sampler = EpochDistributedSampler(data, seed=self.seed, **self.sampler_kwargs)
            return LateDataLoader(data, sampler=sampler, **options)
        batch_sampler = EpochBatchSampler(data, seed=self.seed, **self.sampler_kwargs)
        del options["batch_size"]
        ahead: Any = ReadAhead(batch_sampler, data) if hasattr(data, "prefetch") else batch_sampler
        return LateDataLoader(data, batch_sampler=ahead, **options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Give the validation set in order, a sample the same in every epoch."""
        options = {"generator": _own(self.seed), **self.loader_kwargs, "persistent_workers": False}
        return DataLoader(self.datasets["val"], shuffle=False, **{**options, "num_workers": 1})

    def _wrap(self, data: Any, split: str) -> Any:
        if isinstance(self._backbone, str):
            self._backbone = load_backbone(self._backbone)
        if self._backbone is None or self._cache is None:
            wrapped: Any = ConcatDataset([PlacedCTCData(part) for part in data.datasets])
        else:
            augmentations = self._augmentations if split == "train" else None
            wrapped = wrap(
                data, self._cache, self._backbone, augmentations=augmentations, **self._options
            )
        if split == "val":
            for part in wrapped.datasets:
                part.fix_samples(self.seed or 0)
        return wrapped


def _check_arguments(
    dataset: Any, sampler: Any, loader: Any, distributed: bool, seed: object
) -> None:
    """Say what is wrong with a data module's options while nothing is loaded yet."""
    named = {"dataset_kwargs": dataset, "sampler_kwargs": sampler, "loader_kwargs": loader}
    for name, options in named.items():
        if not isinstance(options, Mapping):
            raise TypeError(f"{name} is {options!r}: expected a dict, such as {{}}")
    check_options(dataset)
    sizes = [options.get("batch_size") for options in (sampler, loader)]
    if not distributed and (sizes[0] is None or sizes[0] != sizes[1]):
        raise ValueError(
            f"batch_size is {sizes[0]} in sampler_kwargs and {sizes[1]} in loader_kwargs: expected "
            "the same number in both"
        )
    if not (seed is None or isinstance(seed, Integral)):
        raise TypeError(f"seed is {seed!r}: expected a whole number, or None")


def _own(seed: int | None) -> torch.Generator:
    """Make a loader's generator: workers' seeds come from none that a model draws from."""
    generator = torch.Generator()
    generator.manual_seed(_choose_seed(seed))
    return generator
