"""Cached features for training scripts that are not changed: `patch`."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache as memoize
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackastra.data import distributed as _distributed
from trackastra.data.data import CTCData
from trackastra.model import TrackingTransformer

from ..augment import Augmentations, Policy
from ..backbones import load_backbone
from ..cache import FeatureCache
from ..dataset import OnMiss
from ..errors import BackboneError
from ..train_options import AUGMENTED, POOLING, PRETRAINED, copies_of
from .datamodule import EpochBatchSampler, EpochDistributedSampler, LateDataLoader
from .model_features import ModelFeatures, check_resumed
from .wrapping import CachedCTCData, Geometry, check_words, wrap

if TYPE_CHECKING:
    from ..backbones.base import Backbone

Arguments = Mapping[str, Any]
_log = logging.getLogger(__name__)


@contextmanager
def patch(
    cache: FeatureCache | str | os.PathLike[str],
    *,
    backbone: Backbone | str | None = None,
    weights: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float16",
    seed: int = 0,
    policy: str | Policy = "default",
    geometry: Geometry = "map",
    on_miss: OnMiss = "compute",
    batch_size: int = 8,
) -> Iterator[None]:
    """Give cached features to a Trackastra training that is written for pull request 61.

    Inside, a `CTCData` with ``features="pretrained_feats"`` or ``"pretrained_feats_aug"`` is loaded
    as ``"wrfeat"`` and becomes a `CachedCTCData`, as by `wrap`, whichever Trackastra is installed.
    Everything else stays as it is. What was loaded inside goes on working afterwards, also in
    DataLoader workers; what was replaced is restored, after errors too.

    ============================================  =================================================
    what the script passes to `CTCData`           what it gets
    ============================================  =================================================
    ``pretrained_feats_model``                    `backbone`, one for all sets
    ``pretrained_feats_mode``                     `pooling`
    ``pretrained_feats_additional_props``         `additional_props`
    ``rotate_features``                           `rotate_features`
    ``pretrained_n_augs``                         augmented copies, if ``"pretrained_feats_aug"``
                                                  and ``augment`` is above 0 (in training)
    ============================================  =================================================

    A model of pretrained features that is saved inside has them named in full beside it, as by
    `BestModel`.

    A `BalancedDataModule` used inside pickles no such datasets (upstream's names for them say
    nothing of their contents), loads them once, and passes the epoch on to the copies.

    Parameters
    ----------
    cache : FeatureCache or path
    backbone : Backbone or str, optional
        In the place of the script's ``pretrained_feats_model``.
    weights, device
        As `load_backbone`, where the backbone is a name.
    dtype, geometry, on_miss, batch_size
        As `wrap`.
    seed, policy
        Of the copies, as `Augmentations`.

    Warns
    -----
    UserWarning
        Copies are asked for, but the first set that is loaded has ``augment=0``.

    Raises
    ------
    UnknownNameError, DrawError
        No such backbone, policy, geometry or `on_miss`.
    BackboneError
        Inside: neither `backbone` nor ``pretrained_feats_model`` names a backbone; a model is saved
        where one of other features is. Inside, all that `wrap` raises too.

    Notes
    -----
    Classes that inherit from `CTCData` are left alone. The names and defaults are those of
    Trackastra's pull request 61 (``scripts/train.py`` and ``trackastra/data/data.py``).
    """
    check_words(geometry, on_miss)
    load = memoize(lambda name: load_backbone(name, weights, device))
    provider = _Provider(
        cache=cache if isinstance(cache, FeatureCache) else FeatureCache(cache),
        backbone=load(backbone) if isinstance(backbone, str) else backbone,
        load=load,
        augmentations=Augmentations(policy, seed=seed),
        options={
            "dtype": dtype,
            "geometry": geometry,
            "on_miss": on_miss,
            "batch_size": batch_size,
        },
    )
    module = _distributed.BalancedDataModule
    replacements = [
        (CTCData, "__init__", _loading(CTCData.__init__, provider)),
        (module, "prepare_data", _preparing(module.prepare_data)),
        (_distributed, "cache_class", _pickling(_distributed.cache_class)),
        (_distributed, "BalancedBatchSampler", EpochBatchSampler),
        (_distributed, "BalancedDistributedSampler", EpochDistributedSampler),
        (_distributed, "DataLoader", LateDataLoader),
        (TrackingTransformer, "save", _saving(TrackingTransformer.save, provider)),
    ]
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(replaced(owner, name, value))
        yield


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass
class _Provider:
    """Gives features to datasets: from one cache, each backbone made once."""

    cache: FeatureCache
    backbone: Backbone | None
    load: Callable[[str], Backbone]
    augmentations: Augmentations
    options: Mapping[str, Any]
    augmented: bool = field(default=False, init=False)
    given: list[ModelFeatures] = field(default_factory=list, init=False)

    def provide(self, data: Any, asked: Arguments) -> CachedCTCData:
        cached: CachedCTCData = wrap(
            data,
            self.cache,
            self._backbone_of(asked),
            pooling=asked.get("pretrained_feats_mode", POOLING),
            augmentations=self._augmentations_of(asked),
            additional_props=asked.get("pretrained_feats_additional_props"),
            rotate_features=asked.get("rotate_features", False),
            **self.options,
        )
        named = ModelFeatures.of_data(cached)
        if named is not None and named not in self.given:
            self.given.append(named)
        return cached

    def features_of(self, model: Any) -> ModelFeatures | None:
        """Give the features that a model is trained on; None where that can't be told."""
        width = model.config.get("pretrained_feat_dim", 0)
        fitting = [one for one in self.given if one.backbone.width == width]
        if len(fitting) > 1:
            _log.warning(
                "%d kinds of features were given to datasets of width %d: a model that is saved "
                "names none; use a patch() for each training", len(fitting), width,
            )  # fmt: skip
        return fitting[0] if len(fitting) == 1 else None

    def _backbone_of(self, asked: Arguments) -> Backbone:
        if self.backbone is not None:
            return self.backbone
        name = asked.get("pretrained_feats_model")
        if name is None:
            raise BackboneError(
                f"features={asked['features']!r} and no pretrained_feats_model: name a backbone "
                "there, or as backbone of patch()"
            )
        return self.load(name)

    def _augmentations_of(self, asked: Arguments) -> Augmentations | None:
        copies = copies_of(asked)
        if copies:
            self.augmented = True
            return replace(self.augmentations, copies=copies)
        level = asked.get("augment", 0)
        if asked["features"] == AUGMENTED and level == 0 and not self.augmented:
            warnings.warn(
                f"{asked.get('root')} is loaded with features='pretrained_feats_aug' and "
                "augment=0, so without augmented copies, as for validation; training sets need "
                "augment above 0 to have them",
                stacklevel=2,
            )
        return None


def _loading(original: Callable[..., None], provider: _Provider) -> Callable[..., None]:
    signature = inspect.signature(original)

    @wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        named = signature.bind(self, *args, **kwargs).arguments
        given = named.pop("kwargs", {}) | named
        asked = {name: value for name, value in given.items() if value is not None}
        if type(self) is not CTCData or asked.get("features") not in PRETRAINED:
            original(self, *args, **kwargs)
            return
        original(**{**asked, "features": "wrfeat"})
        # the script has this object already, so it becomes the other in place
        self.__dict__ = provider.provide(self, asked).__dict__
        self.__class__ = CachedCTCData

    return load


def _saving(original: Callable[..., None], provider: _Provider) -> Callable[..., None]:
    @wraps(original)
    def save(self: Any, folder: str | os.PathLike[str]) -> None:
        features, target = provider.features_of(self), Path(folder)
        if features is not None:
            # before anything is written: after an error, what is there stays as it was
            check_resumed(target, features)
            target.mkdir(parents=True, exist_ok=True)
            features.write(target)
        original(self, folder)

    return save


def _preparing(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(original)
    def prepare_data(self: Any) -> None:
        """Pickle the datasets for `setup`, except those that `patch` provides."""
        if self.dataset_kwargs.get("features") not in PRETRAINED:
            original(self)

    return prepare_data


def _pickling(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def cache_class(cachedir: Any = None) -> Callable[..., Any]:
        pickled = original(cachedir)

        def load(*args: Any, **kwargs: Any) -> Any:
            plain = kwargs.get("features") in PRETRAINED
            return (CTCData if plain else pickled)(*args, **kwargs)

        return load

    return cache_class
