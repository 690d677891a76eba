"""The options of a training, and its configuration: one reader for whoever trains or warms.

The names are those of ``scripts/train.py`` of weigertlab/trackastra, and of its pull request 61.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from .augment.policy import PRESETS
from .errors import MovieError, UnknownNameError
from .movies.text import read_text, read_yaml
from .pooling import POOLINGS
from .system import count_cores

PROPS = ("regionprops_small", "regionprops", "regionprops2")
AUGMENTED = "pretrained_feats_aug"
PRETRAINED = ("pretrained_feats", AUGMENTED)
"""The features that are read from a cache."""
COPIES, POOLING = 3, "mean_patches_exact"
"""What pull request 61 takes where nothing is said."""
PLAIN = ("none", "regionprops", "regionprops2", "patch_regionprops", "wrfeat")
MODEL_PACKAGE = "trackastra-pretrained-feats"
MODEL_INSTALL = f"pip install --no-deps {MODEL_PACKAGE}==0.0.2"
"""Brings the model for pretrained features: no extra, since it names as a need, and can do without,
sam2, which would be built from source."""
NOTHING = ("", "~", "null", "Null", "NULL", "None")


def _boolean(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value < 1:
        return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to below 1")


def _from(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value >= least:
            return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} on")

    return read


def _even(text: str) -> int:
    value = _from(2)(text)
    if value % 2 == 0:
        return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected an even number")


def _one_or_even(text: str) -> int:
    return 1 if text == "1" else _even(text)


def _path(text: str) -> Path:
    return Path(text).expanduser()  # no shell has done that in a file


def _movie(text: str) -> str:
    return str(_path(text))


def _optional(text: str) -> str | None:
    return None if text in NOTHING else text


def _one_of(known: Collection[str], *, optional: bool = False) -> dict[str, Any]:
    """Let an option be one of these names, or nothing; another is told the nearest."""

    def choose(text: str) -> str | None:
        if text in known:
            return text
        if optional and text in NOTHING:
            return None
        raise argparse.ArgumentTypeError(str(UnknownNameError("value", text, known)))

    return {"type": choose, "choices": [*known, None] if optional else [*known]}


_How: TypeAlias = dict[str, Any]
_NUMBER: _How = {"type": _from(0)}
_COUNT: _How = {"type": _from(1)}
_BOOLEAN: _How = {"type": _boolean}
_Architecture: TypeAlias = Mapping[str, tuple[_How, Any]]
ARCHITECTURE: _Architecture = {  # option: what it may be, default where training from scratch
    "d_model": (_COUNT, 256),
    "window": ({"type": _from(2)}, 10),
    "num_encoder_layers": (_NUMBER, 6),
    "num_decoder_layers": (_NUMBER, 6),
    "pos_embed_per_dim": ({"type": _even}, 32),
    "feat_embed_per_dim": ({"type": _one_or_even}, 8),
    "dropout": ({"type": _probability}, 0.0),
    "spatial_pos_cutoff": (_COUNT, 256),
    "attn_positional_bias": (_one_of(("rope", "bias", "none")), "rope"),
    "attn_positional_bias_n_spatial": (_NUMBER, 16),
    "attn_dist_mode": ({}, "v0"),
    "causal_norm": (_one_of(("none", "linear", "softmax", "quiet_softmax")), "quiet_softmax"),
}
PRETRAINED_ARCHITECTURE: _Architecture = {  # of models for pretrained features alone
    "reduced_pretrained_feat_dim": (_COUNT, 128),
    "disable_xy_coords": (_BOOLEAN, False),
    "disable_all_coords": (_BOOLEAN, False),
}
IGNORED = {
    "cachedir": "its pickles may be stale",
    "example_images": "",
    "from_subfolder": "upstream ignores it too",
    "input_test": "upstream ignores it too",
    "preallocate": "",
    "profile": "",
    "tracking_frequency": "",
}


class _Ignored(argparse.Action):
    """Keeps in mind that an option was given, and why it is ignored."""

    def __call__(self, _: Any, options: argparse.Namespace, *others: Any) -> None:
        options.ignored = {**options.ignored, self.dest: self.help}


class _CacheFolder(argparse.Action):
    """Takes a folder; upstream's option of this name tells whether to pickle what is loaded."""

    def __call__(self, _: Any, options: argparse.Namespace, value: Any, *others: Any) -> None:
        if str(value).lower() in ("true", "false"):
            why = "upstream's, of its pickles; here it names a folder"
            options.ignored = {**options.ignored, f"cache {value}": why}
        else:
            options.cache = value


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and in which file."""

    where = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {self.where}{message.removeprefix('argument ')}\n")

    def check_names(self, kind: str, names: Collection[str]) -> None:
        """End with the first that is no option's."""
        known = [one[2:] for one in self._option_string_actions if one.startswith("--")]
        for name in names:
            if name not in known:
                listing = "feature-cache train --help"
                self.error(str(UnknownNameError(kind, name, known, listing)))


def parse_training(words: Sequence[str], *, prog: str | None = None) -> argparse.Namespace:
    """Read the options of a training; what stands in ``-c FILE`` counts less than what is given.

    Parameters
    ----------
    words : sequence of str
        As on a command line; the first may be the configuration itself.
    prog : str, optional
        What the command is called.

    Raises
    ------
    SystemExit
        With what is wrong on stderr, status 2; or help was asked for.
    MovieError
        The configuration can't be read.
    """
    parser = make_parser(prog)
    words = [_underscored(one) if one.startswith("--") else one for one in words]
    if words and not words[0].startswith("-"):
        words = ["-c", *words]
    options, file = argparse.Namespace(), _find_file(words)
    if file is not None:
        plain = _read_training(file)
        parser.where = f"{file}: "
        parser.check_names("key", plain)
        parser.parse_args([*_words_of(plain, parser)], options)
        parser.where = ""
    _, unknown = parser.parse_known_args(words, options)
    if unknown:
        parser.check_names("option", [unknown[0].split("=")[0].lstrip("-")])
        parser.error(f"{unknown[0]!r} belongs to no option")
    if options.features not in PRETRAINED and options.pretrained_feats_model is not None:
        why = f"features: {options.features}, has none; {AUGMENTED} or {PRETRAINED[0]} have"
        options.ignored = {**options.ignored, "pretrained_feats_model": why}
    return options


def _underscored(word: str) -> str:
    """Give an option by its name here: other commands have hyphens in theirs."""
    name, sign, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}"


def check_training(options: argparse.Namespace) -> None:
    """Find what a training can't begin with; ValueError says what."""
    for name in ("input_train", "input_val"):
        if not getattr(options, name):
            raise ValueError(
                f"no movies in {name}: name at least one, in the configuration ({name}: [data/01]) "
                f"or as --{name} data/01"
            )
    paths = dict.fromkeys(map(Path, options.input_train + options.input_val))
    files = [str(path) for path in paths if path.is_file()]
    if files:
        raise ValueError(
            f"{', '.join(files)}: a training reads folders of one TIFF a timepoint, with tracks; "
            "feature_cache.movies.write_movie writes such a folder"
        )
    missing = [str(path) for path in paths if not path.is_dir()]
    if missing:
        raise ValueError(f"no such movie folder: {', '.join(missing)}")
    if options.name is None and not options.dry:
        raise ValueError("the training has no name: pass --name, or write name: into the file")
    for name in ("cache", "pretrained_feats_model") if options.features in PRETRAINED else ():
        if getattr(options, name) is None:
            raise ValueError(f"--features {options.features} needs --{name}")
    if options.feature_dropout and options.features not in PRETRAINED:
        raise ValueError(
            f"--feature_dropout with --features {options.features}, which has no pretrained "
            f"features: leave it out, or pass --features {AUGMENTED}"
        )
    if options.train_samples < options.batch_size:
        raise ValueError(
            f"--train_samples {options.train_samples} and --batch_size {options.batch_size} make "
            "no batch: expected at least as many samples as a batch has"
        )


def find_training(words: Sequence[str]) -> argparse.Namespace | None:
    """Read the options of a training where words name nothing but its configuration."""
    if len(words) != 1 or Path(words[0]).suffix.lower() not in (".yaml", ".yml"):
        return None
    file = Path(words[0]).expanduser()
    if not file.is_file() or not re.search(r"""\binput_\w+["']?\s*:""", read_text(file)):
        return None
    return parse_training(["-c", str(file)])


def find_seed(words: Sequence[str]) -> int:
    """Read the seed of a training script: what its words say, or its configuration, or 0."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    file = _find_file(words)
    plain = _read_training(file) if file is not None and file.is_file() else {}
    return int(parser.parse_known_args([*_words_of(plain, parser), *words])[0].seed)


def copies_of(options: Mapping[str, Any]) -> int:
    """Count the augmented copies of a movie in ``input_train``; others have none."""
    augmented = options.get("features") == AUGMENTED and options.get("augment", 0) > 0
    return int(options.get("pretrained_n_augs", COPIES)) if augmented else 0


def data_options(options: argparse.Namespace) -> dict[str, Any]:
    """Give what `CTCData` is made with, beside movie, level of augmentation and window."""
    return {
        "ndim": options.ndim,
        "detection_folders": options.detection_folders,
        "max_tokens": options.max_tokens,
        "features": "wrfeat" if options.features in PRETRAINED else options.features,
        "slice_pct": tuple(options.slice_pct),
        "downscale_temporal": options.downscale_temporal,
        "downscale_spatial": options.downscale_spatial,
        "sanity_dist": options.sanity_dist,
        "crop_size": options.crop_size,
        "compress": options.compress,
    }


def _find_file(words: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", type=Path, nargs="?")
    file: Path | None = parser.parse_known_args(words)[0].config
    return file


def _read_training(file: Path) -> dict[str, Any]:
    if file.is_dir():
        raise MovieError(
            f"{file} is a folder: expected a configuration in YAML, which names movies "
            "(input_train, input_val)"
        )
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise MovieError(f"{file} is no configuration of a training: expected names and values")
    return plain


def _words_of(plain: Mapping[str, Any], parser: argparse.ArgumentParser) -> Iterator[str]:
    """Give what a configuration says as words of a command line."""
    known = {name: action for action in parser._actions for name in action.option_strings}
    for name, value in plain.items():
        action = known.get(f"--{name}")
        if (value in NOTHING or value == []) and not isinstance(action, _Ignored):
            continue
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif action is not None and action.nargs == 0:
            try:
                wanted = _boolean(value)
            except argparse.ArgumentTypeError as error:
                parser.error(f"--{name}: {error}")
            yield from [f"--{name}"] * wanted
        elif action is not None and action.nargs in ("+", "*"):
            yield from (f"--{name}", str(value))
        else:
            yield f"--{name}={value}"


def make_parser(prog: str | None) -> _Parser:
    """Give the parser of a training's options."""
    parser = _Parser(
        prog=prog,
        description="Train or fine-tune Trackastra on cached features. CONFIG is a YAML file of "
        "these options, as for Trackastra's own train.py; what stands on the command line counts "
        "before it.",
        usage="%(prog)s CONFIG [options]",
        epilog="Example: feature-cache train train.yaml --cache features --epochs 100",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", type=Path, help="YAML with any of these")

    out = parser.add_argument_group("what is written")
    out.add_argument("-o", "--outdir", type=_path, default=Path("runs"))
    out.add_argument("--name", help="of the folder in --outdir")
    out.add_argument("--timestamp", type=_boolean, default=True, help="put before --name")
    out.add_argument(
        "--resume", type=_boolean, default=True,
        help="go on from the last checkpoint of this folder (needs --timestamp false)",
    )  # fmt: skip
    loggers = ("tensorboard", "csv", "wandb", "none")
    out.add_argument("--logger", **_one_of(loggers), default="tensorboard")
    out.add_argument("--wandb_project", default="trackastra")
    out.add_argument("--dry", action="store_true", help="write nothing")
    out.add_argument("--only_prechecks", action="store_true", help="load all, and end")

    data = parser.add_argument_group("movies, in the layout of the Cell Tracking Challenge")
    data.add_argument("--input_train", type=_movie, nargs="+", default=[])
    data.add_argument("--input_val", type=_movie, nargs="+", default=[])
    data.add_argument("--detection_folders", nargs="+", default=["TRA"])
    data.add_argument("--ndim", type=int, choices=(2, 3), default=2)
    data.add_argument("--slice_pct", type=float, nargs=2, default=[0.0, 1.0], help="of each movie")
    data.add_argument("--downscale_temporal", type=int, default=1)
    data.add_argument("--downscale_spatial", type=int, default=1)
    data.add_argument("--crop_size", type=int, nargs="+", help="of random crops")
    data.add_argument("--augment", type=int, default=3, help="level, of the coordinates")
    data.add_argument("--compress", type=_boolean, default=True)
    data.add_argument("--sanity_dist", action="store_true")
    data.add_argument("--max_tokens", type=int)

    features = parser.add_argument_group("features")
    features.add_argument(
        "--features", **_one_of((*PLAIN, *PRETRAINED)),
        default="wrfeat", help="Trackastra's own, or pretrained ones too, or their copies too",
    )  # fmt: skip
    features.add_argument(
        "--cache", type=_path, action=_CacheFolder, help="folder of the feature cache"
    )
    features.add_argument("--pretrained_feats_model", type=_optional, help="the backbone")
    features.add_argument("--weights", help="of the backbone: a checkpoint, or random:<seed>")
    features.add_argument(
        "--pretrained_feats_mode", **_one_of(POOLINGS), default=POOLING, help="pooling"
    )
    features.add_argument("--pretrained_feats_additional_props", **_one_of(PROPS, optional=True))
    features.add_argument("--pretrained_n_augs", type=int, default=COPIES, help="augmented copies")
    features.add_argument("--policy", **_one_of(PRESETS), default="default", help="of the copies")
    features.add_argument("--rotate_features", type=_boolean, default=True)
    features.add_argument(
        "--feature_dropout", type=_probability, default=0.0,
        help="part of the windows that are trained on without pretrained features",
    )  # fmt: skip
    features.add_argument(
        "--warm", action="store_true", help="compute all that is missing before training"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", "--model", "--pretrained_model_path", type=_optional,
        help="fine-tune this model folder, or one of Trackastra's by its name",
    )  # fmt: skip
    short = {"d_model": ["-d"], "window": ["-w"]}
    for name, (allowed, default) in {**ARCHITECTURE, **PRETRAINED_ARCHITECTURE}.items():
        said = f"default {default}, or the model's"
        model.add_argument(*short.get(name, []), f"--{name}", **allowed, help=said)

    how = parser.add_argument_group("training")
    how.add_argument("--epochs", **_COUNT, default=100)
    how.add_argument("--warmup_epochs", **_NUMBER, default=10)
    how.add_argument("--train_samples", **_COUNT, default=50000, help="in an epoch")
    how.add_argument("--batch_size", **_COUNT, default=8)
    how.add_argument("--lr", type=float, default=1e-4)
    how.add_argument("--weight_decay", type=float, default=1e-5)
    how.add_argument("--delta_cutoff", **_COUNT, default=2, help="frames that a link may span")
    how.add_argument("--div_upweight", type=float, default=2)
    how.add_argument("--n_pool_sampler", **_COUNT, default=8)
    how.add_argument("--weight_by_ndivs", type=_boolean, default=True)
    how.add_argument("--weight_by_dataset", type=_boolean, default=False)
    how.add_argument(
        "--patience", **_NUMBER, help="epochs without a better one; a sixth of all; 0: any"
    )
    how.add_argument(
        "--num_workers", **_NUMBER, default=min(4, count_cores()), help="that load samples"
    )
    how.add_argument("--device", **_one_of(("cuda", "cpu")), default="cuda", help="if there is one")
    how.add_argument("--distributed", type=_boolean, default=False, help="all GPUs of this host")
    how.add_argument("--mixedp", type=_boolean, default=True, help="float16 on a GPU")
    how.add_argument("--seed", type=int, default=0)

    ignored = parser.add_argument_group("known, and ignored")
    parser.set_defaults(ignored={})
    for name, why in IGNORED.items():
        ignored.add_argument(f"--{name}", nargs="*", action=_Ignored, help=why or None)
    return parser
