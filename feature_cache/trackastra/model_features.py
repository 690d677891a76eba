"""The features that a model was trained on, named in full in the model's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import yaml

from ..errors import BackboneError
from ..hashing import JSON, canonical_json
from ..spec import KEY_VERSION, BackboneSpec, SpaceSpec, describe, differences
from ..store.files import write_text

if TYPE_CHECKING:
    from ..backbones.base import Backbone

FILE = "features.json"
_FOLDER = ("config.yaml", "model.pt")
KEY = "pretrained_feats_spec"
"""The same, as text, in train_config.yaml: what Trackastra hands on to whoever tracks."""


def find_model(model: str | os.PathLike[str], *more: str) -> Path:
    """Find a model's folder, which holds `more` too, or fetch one of Trackastra's own by its name.

    Raises
    ------
    BackboneError
        There is none, or it can't be fetched.
    """
    from trackastra.model.pretrained import _MODELS, download_pretrained

    folder = Path(model).expanduser()
    if str(model) in _MODELS and not folder.is_dir():
        try:
            return Path(download_pretrained(str(model)))
        except (OSError, BadZipFile) as error:
            raise BackboneError(
                f"Trackastra's model {model} is not on this machine, and can't be fetched from "
                f"{_MODELS[str(model)]}: is there a network? ({type(error).__name__})"
            ) from error
    if not folder.is_dir():
        raise BackboneError(
            f"no model at {model}: expected the folder of a training, such as runs/hela, or one of "
            f"Trackastra's own: {', '.join(_MODELS)}"
        )
    for name in (*_FOLDER, *more):
        if not (folder / name).is_file():
            raise BackboneError(
                f"{model} is no model: it has no {name}; name the folder that a training wrote"
            )
    return folder


@dataclass(frozen=True, slots=True)
class ModelFeatures:
    """What must be equal in training and in tracking.

    Parameters
    ----------
    space : mapping
        `SpaceSpec.to_json`: the backbone in full, pooling, storage dtype, and the key version.
    additional_props : str or None
        The shallow features.
    rotate_features : bool
    weights : str or None
        By which word the backbone's weights were loaded, to do so again. Not compared: their
        digest is in `space`.
    """

    space: Mapping[str, Any]
    additional_props: str | None
    rotate_features: bool
    weights: str | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, spec: SpaceSpec, backbone: Backbone, additional_props: str | None, rotated: bool
    ) -> ModelFeatures:
        """Name the features of a space and its backbone."""
        weights = getattr(backbone, "weights", None)
        if weights is not None and not str(weights).startswith("random:"):
            weights = str(Path(weights).expanduser().absolute())
        return cls(spec.to_json(), additional_props, rotated, weights)

    @classmethod
    def of_data(cls, data: Any) -> ModelFeatures | None:
        """Name the features of what `wrap` made; None for other data.

        Raises
        ------
        BackboneError
            Its sets have different ones.
        """
        first, *others = [_name_one(part) for part in getattr(data, "datasets", [data])]
        if first is not None:
            for one in others:
                what = "the parts of a dataset have different features"
                check_equal(first, one, what, words=("in one", "in another"))
        return first

    @classmethod
    def of_model(cls, train_args: Mapping[str, Any]) -> ModelFeatures | None:
        """Read what training wrote into a model's train_config.yaml; None where there is nothing.

        Raises
        ------
        BackboneError
            It can't be read, or the keys of feature_cache have changed since.
        """
        text = train_args.get(KEY)
        return None if text is None else cls._read(str(text), f"{KEY} of the model")

    @classmethod
    def of_folder(cls, folder: Path) -> ModelFeatures | None:
        """Read ``features.json`` of a model's folder; None where there is none. Errors alike."""
        try:
            text = (folder / FILE).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls._read(text, str(folder / FILE))

    @classmethod
    def _read(cls, text: str, where: str) -> ModelFeatures:
        try:
            found = cls(**json.loads(text))
            version = found.space["key_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise BackboneError(f"{where} names no features: {error}; train the model again") from (
                error
            )
        if version != KEY_VERSION:
            raise BackboneError(
                f"{where} has key version {version}, and this feature_cache {KEY_VERSION}: the "
                "same options may give other numbers; use the version it was trained with, or "
                "train the model again"
            )
        return found

    @property
    def backbone(self) -> BackboneSpec:
        """The backbone's own spec."""
        return BackboneSpec.from_json(self.space["backbone"])

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return asdict(self)

    def unlike(
        self, other: ModelFeatures, words: tuple[str, str] = ("in training", "now")
    ) -> list[str]:
        """Say of each field that differs how it does; `words` call the one and the other."""
        return list(differences(self._compared(), other._compared(), words))

    def _compared(self) -> dict[str, JSON]:
        rest = self.to_json()
        del rest["space"], rest["weights"]
        return {**self.space, **rest}

    def write(self, folder: Path) -> None:
        """Write ``features.json``, and the same into a train_config.yaml that is there."""
        text, config = canonical_json(self.to_json()), folder / "train_config.yaml"
        write_text(folder / FILE, f"{text}\n")
        if config.is_file():
            plain = yaml.load(config.read_text(), yaml.FullLoader) or {}  # as Trackastra reads it
            write_text(config, yaml.dump({**plain, KEY: text}))


def _name_one(data: Any) -> ModelFeatures | None:
    extras = getattr(data, "feature_cache_extras", None)
    if extras is None:
        return None
    movie = extras.tokens.movies[0]
    return ModelFeatures.of(
        movie.spec, movie.backbone, data.additional_props, extras.rotate_features
    )


def check_equal(
    trained: ModelFeatures,
    given: ModelFeatures | None,
    what: str,
    advice: str = "",
    words: tuple[str, str] = ("in training", "now"),
) -> None:
    """Compare the features of two trainings, or of training and tracking.

    Raises
    ------
    BackboneError
        They differ; says what does, field by field.
    """
    unlike = [
        f"there were pretrained features of {describe(trained.space)}, and now there are none"
    ]
    if given is not None:
        unlike = trained.unlike(given, words)
    if unlike:
        raise BackboneError(f"{what}: {'; '.join(unlike)}{advice and f'; {advice}'}")


def check_resumed(folder: Path, features: ModelFeatures | None) -> None:
    """Raise BackboneError where the model of a folder was trained on other features than these."""
    before = ModelFeatures.of_folder(folder)
    if before is not None:
        what = f"{folder} holds a model that was trained on other features"
        check_equal(before, features, what, "train into another folder, or on the same features")
