"""What a backbone is, and the common part of those that run a torch module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BackboneError, FrameError, UnknownNameError
from ..forks import Lock, cached_property
from ..hashing import Digest, state_digest
from ..memo import Memo, remembered_digest
from ..spec import BackboneSpec
from .name import COMPUTE_DTYPES
from .network_state import NetworkState, exact_float32
from .preprocessing import round_up

ROUND_UP = "round-up-"
"""Before the rule of a resize: to the least size of whole cells, where a spec has no input size."""
_loading = Lock()


@runtime_checkable
class Backbone(Protocol):
    """A frozen model that maps frames to grids of embeddings: the one plug point."""

    @property
    def spec(self) -> BackboneSpec:
        """Everything that changes this backbone's numbers."""
        ...

    def embed(self, frames: Tensor) -> Tensor:
        """Embed frames.

        Parameters
        ----------
        frames : (B, H, W) float32
            Normalised as ``spec.normalization`` says; not changed. Where ``spec.context`` is not
            (0, 0), windows (B, T, H, W): each frame of the movie after those before it, all under
            one draw; beyond the movie's ends the nearest is repeated.

        Returns
        -------
        (B, gh, gw, C)
            Grids that span the frames. The same for a frame whatever else is in the batch.
        """
        ...


def find_device(device: str | None = None) -> torch.device:
    """Give the device asked for, or the best there is: cuda, mps, cpu.

    A CUDA device has its number: which one has none is another in each thread.

    Raises
    ------
    BackboneError
        There is no such device here.
    """
    if device is not None:
        return _number(_check_device(device))
    if torch.cuda.is_available():
        return _number(torch.device("cuda"))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _number(device: torch.device) -> torch.device:
    """Give a CUDA device its number: this thread's, where CUDA is in use, else the first."""
    if str(device) != "cuda":
        return device
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.device("cuda", torch.cuda.current_device() if in_use else 0)


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0].partition(". ")[0]
        if first.startswith("Expected one of"):  # all kinds that there ever were
            first = "torch knows cpu, cuda, mps and others"
        raise BackboneError(
            f"no device {name!r} here ({first}); leave it out for the best there is, or use cpu"
        ) from error
    return device


class Frozen:
    """What made a key can't be changed: attributes are fixed as soon as the spec is known.

    Those that begin with an underscore, or came after the spec, are not in it, and free.
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse to change what the spec says, or how it is computed."""
        if self._is_fixed(name):
            raise AttributeError(
                f"{name} of a {type(self).__name__} can't be changed: its keys say what it was; "
                "make another backbone"
            )
        super().__setattr__(name, value)

    def _is_fixed(self, name: str) -> bool:
        owner = next((kind for kind in type(self).__mro__ if name in vars(kind)), None)
        value = vars(owner)[name] if owner is not None else None
        if isinstance(value, cached_property):
            return True
        if "spec" not in vars(self):
            return False
        # attributes are kept in the order in which they were set: those before the spec made it
        before = takewhile(lambda known: known != "spec", vars(self))
        in_spec = name == "spec" or (name in before and not name.startswith("_"))
        return in_spec or callable(value) or (owner is not None and _is_ours(owner))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A network on its device, the hex digest of its weights, and the state in which it is."""

    network: nn.Module
    weights: str
    state: NetworkState


class TorchBackbone(Frozen, ABC):
    """A backbone around a torch module that is built when it is first needed.

    Parameters
    ----------
    name : str
        As users write it.
    weights : str, Path or None
        None for the model's own; a path to a checkpoint; ``"random:<seed>"`` for the real
        architecture with seeded random weights.
    device : str, optional
        Such as ``"cuda:0"``; by default the best there is.
    dtype : str, optional
        Of the computation: ``"float32"`` (default), or ``"bfloat16"``, ``"float16"`` by autocast.
    """

    revision: ClassVar[int] = 1
    _shared: TorchBackbone | None = None

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.name = name
        self.weights = str(weights) if weights is not None else None
        self.device = find_device(device)
        self.dtype = dtype or "float32"
        if self.dtype not in COMPUTE_DTYPES:
            raise UnknownNameError("compute dtype", self.dtype, COMPUTE_DTYPES)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the loaded module, and what was found: another process finds its own."""
        owners = (vars(kind).items() for kind in type(self).__mro__)
        found = {name for own in owners for name, v in own if isinstance(v, cached_property)}
        left_out = {"_kept", *found} - {"spec"}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @cached_property
    def spec(self) -> BackboneSpec:
        """Everything that changes this backbone's numbers; loads no weights that are known."""
        return self.describe(self._weights_digest().hex())

    def describe(self, weights: str) -> BackboneSpec:
        """Give the spec that this backbone has with weights of such a digest; loads none."""
        spec = self._describe(weights)
        extra = {**spec.extra, **name_subclass(type(self), "_describe")}
        return replace(spec, extra=extra)

    @property
    def module(self) -> nn.Module:
        """The network, loaded, frozen and on its device."""
        return self._loaded.network

    @property
    def is_loaded(self) -> bool:
        """Whether the network is in memory."""
        return "_kept" in vars(self)

    def share(self, other: TorchBackbone) -> None:
        """Use the network of another backbone, which was made alike but for what is read of it."""
        self._shared = other

    @property
    def _loaded(self) -> _Loaded:
        with _loading:
            if "_kept" not in vars(self):
                self._kept = self._load()
            return self._kept

    def _load(self) -> _Loaded:
        if self._shared is not None:
            return self._shared._loaded
        # tensors of inference mode have no version, by which `NetworkState` sees changes
        with torch.inference_mode(False):
            network = self._build().eval().requires_grad_(False)
            weights = self._digest_network(network).hex()
            network = network.to(self.device)
        return _Loaded(network, weights, NetworkState(network))

    def check(self) -> None:
        """Check that the network is the one that the spec says, as it was when it was loaded.

        Asked before each batch that is computed for a cache; takes less than a millisecond.

        Raises
        ------
        BackboneError
            Other weights were loaded, as from a file that was replaced meanwhile, or the network
            was changed since.
        """
        expected, loaded = self.spec.weights, self._loaded
        if loaded.weights != expected:
            # the spec's digest may be the memo's, of a file that was replaced and left no trace
            file = self._weights_file()
            if file is not None:
                with Memo() as memo:
                    memo.forget((file,), self._weights_purpose())
            raise BackboneError(
                f"the weights of {self.name} are not those that its keys were made of: xxh3 "
                f"{loaded.weights[:8]}… was loaded{f' from {file}' if file else ''}, expected "
                f"{expected[:8]}…; nothing of it is stored: load the backbone anew"
            )
        loaded.state.check(self.name)

    def embed(self, frames: Tensor) -> Tensor:
        """Embed frames (B, H, W) float32 into grids (B, gh, gw, C) float32, on the device.

        Raises
        ------
        FrameError
            The frames have channels, or are smaller than a cell.
        """
        [grids] = self.embed_parts([frames])
        return grids

    def embed_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Embed frames of several sizes in one pass, where the network's input has a fixed one.

        Gives for each part (B, H, W) what `embed` gives for it alone; errors as there.
        """
        images = self.take_images(parts)
        with self.computing():
            grids = self._forward(self.make_inputs(images)).float()
        return self.split(grids, images)

    def take_images(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Bring frames to the device, and check their shapes; errors as `embed`."""
        images = [torch.as_tensor(part, dtype=torch.float32).to(self.device) for part in parts]
        for part in images:
            self._check_frames(part)
        return images

    def make_inputs(self, images: Sequence[Tensor]) -> Tensor:
        """Make the network's input of images on the device."""
        inputs = [self._as_input(part) for part in images]
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs)

    def split(self, grids: Tensor, images: Sequence[Tensor]) -> list[Tensor]:
        """Give each of the images its grids."""
        slices = torch.split(grids, [len(part) for part in images])
        return [
            self._crop(own, (part.shape[-2], part.shape[-1]))
            for own, part in zip(slices, images, strict=True)
        ]

    def _crop(self, grids: Tensor, shape: tuple[int, int]) -> Tensor:
        """Cut grids to what spans frames of a shape."""
        return grids

    def _check_frames(self, images: Tensor) -> None:
        spec = self.spec
        seen = [1 + sum(spec.context)] if any(spec.context) else []
        if list(images.shape[1:-2]) != seen or images.ndim < 3:
            expected = "(B, T, H, W)" if seen else "(B, H, W)"
            raise FrameError(
                f"frames of shape {tuple(images.shape)} for {spec.name}: expected {expected}, "
                f"{f'T = {seen[0]}, ' if seen else ''}one channel; make grey images of coloured "
                "ones first"
            )
        height, width = images.shape[-2:]
        if spec.input_size is None and min(height, width) < spec.stride:
            raise FrameError(
                f"frames of {height}x{width} pixels for {spec.name}: smaller "
                f"than one cell of its grid, {spec.stride} pixels"
            )

    @abstractmethod
    def _describe(self, weights: str) -> BackboneSpec:
        """Complete the spec, given the hex digest of the weights."""

    def _make_spec(self, weights: str, **terms: Any) -> BackboneSpec:
        return BackboneSpec(self.name, self.revision, weights, dtype=self.dtype, **terms)

    @abstractmethod
    def _build(self) -> nn.Module:
        """Build the network with its weights, on the CPU."""

    @abstractmethod
    def _forward(self, inputs: Tensor) -> Tensor:
        """Map the network's input to grids (B, gh, gw, C)."""

    def _as_input(self, images: Tensor) -> Tensor:
        """Map frames (B, H, W) to the network's input, as the spec says: resized, standardised."""
        spec = self.spec
        rule, size = spec.resize.removeprefix(ROUND_UP), spec.input_size
        if spec.resize.startswith(ROUND_UP):
            size = round_up(images.shape[-2:], spec.stride)
        if rule != "none" and size is not None:
            images = resize_frames(images, size, rule)
        return standardize(images, spec.mean, spec.std)

    def _weights_file(self) -> Path | None:
        """Name the file the weights come from, where they come from one."""
        if self._seed() is not None:
            return None
        return self._own_weights() if self.weights is None else model_file(Path(self.weights))

    def _own_weights(self) -> Path | None:
        """Find the file of the model's own weights, where they come from one."""
        return None

    def _seed(self) -> int | None:
        if self.weights is None or not self.weights.startswith("random:"):
            return None
        text = self.weights.removeprefix("random:")
        if not (text.isascii() and text.isdecimal() and int(text) < 1 << 63):
            raise BackboneError(
                f"weights {self.weights!r}: expected random:<seed>, a whole number below 2**63"
            )
        return int(text)

    def _weights_digest(self) -> Digest:
        if self._shared is not None:
            return bytes.fromhex(self._shared.spec.weights)
        file = self._weights_file()
        if file is None:
            return self._loaded_digest()
        if not file.is_file():
            raise BackboneError(f"no weights at {file}: name a checkpoint file, or random:<seed>")
        return remembered_digest(file, self._weights_purpose(), self._loaded_digest)

    def _weights_purpose(self) -> str:
        """Say what, besides the file, decides which weights the network gets."""
        return f"weights of {self.name}, revision {self.revision}"

    def _loaded_digest(self) -> Digest:
        return bytes.fromhex(self._loaded.weights)

    def _digest_network(self, network: nn.Module) -> Digest:
        return state_dict_digest(network.state_dict())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in this backbone's dtype, whatever the process has set."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), exact_float32(), autocast:
            yield


def name_subclass(kind: type, describe: str = "") -> dict[str, str]:
    """Give a class of another package that changes one of ours, and not its spec, its own keys.

    Its spec is its own where it has a method of the name `describe`.
    """
    describing = next((one for one in kind.__mro__ if describe in vars(one)), None)
    if kind is describing or _is_ours(kind):
        return {}
    return {"class": f"{kind.__module__}.{kind.__qualname__}"}


def mixes_sizes(backbone: Backbone) -> bool:
    """Tell whether a backbone embeds frames of several sizes in one pass (`embed_parts`)."""
    is_ours = isinstance(backbone, TorchBackbone) and type(backbone).embed is TorchBackbone.embed
    return is_ours and backbone.spec.input_size is not None


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def state_dict_digest(state: Mapping[str, Tensor]) -> Digest:
    """Digest a network's weights: names, dtypes, shapes and bytes of its state dict."""
    return state_digest((name, _as_array(tensor)) for name, tensor in state.items())


def _as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    plain = tensor.detach().cpu().contiguous()
    # NumPy has no bfloat16
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy()
    return plain.numpy()


def model_file(path: Path) -> Path:
    """Name the checkpoint that a path stands for: a file, or a folder as save_pretrained writes.

    Raises
    ------
    BackboneError
        The folder holds no ``model.safetensors``.
    """
    if not path.is_dir():
        return path
    file = path / "model.safetensors"
    if not file.is_file():
        raise BackboneError(
            f"no model.safetensors in {path}: name the folder that save_pretrained wrote "
            "(in one shard), or a checkpoint file"
        )
    return file


def load_checkpoint(file: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, executing nothing in it.

    A checkpoint that holds the state dict under ``"model"`` or ``"state_dict"`` gives that.

    Raises
    ------
    BackboneError
        If the file holds anything but named tensors.
    """
    state = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    for name in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{file} holds a {type(state).__name__}, expected named tensors")
    return state


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of what is no pickle, the unpickler raises anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(f"{file} is no state dict that can be read safely: {first}") from error


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{file} is no safetensors file: {error}") from error


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Give a network its weights, every one and no other; `source` is where they come from.

    Raises
    ------
    BackboneError
        Names or shapes differ; says which.
    """
    wanted = module.state_dict()
    differing = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            name for name in wanted if name in state and state[name].shape != wanted[name].shape
        ],
    }
    parts = [f"{len(v)} {kind} ({_some(v)})" for kind, v in differing.items() if v]
    if parts:
        raise BackboneError(
            f"{source} does not fit {type(module).__name__}: of its {len(wanted)} tensors "
            + ", ".join(parts)
        )
    module.load_state_dict(state)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def standardize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map frames (B, H, W) to (B, 3, H, W), less the mean and divided by the deviation of each.

    Both may be empty: then the three channels are the frame. The host does not wait for the
    device, as it would for a tensor made of numbers there.
    """
    channels = images[:, None].expand(-1, 3, -1, -1)
    if not mean:
        return channels
    subtracted, divisor = (
        torch.stack([images.new_full((1, 1), number) for number in numbers])
        for numbers in (mean, std)
    )
    return (channels - subtracted) / divisor


def resize_frames(images: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """Resize frames (B, H, W) to (height, width); those that have it already stay as they are.

    The rule is ``"bilinear"`` or ``"bicubic"``, either with ``"-antialias"`` (which makes a
    difference only where frames shrink). Corners are not aligned: pixels are areas.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    resized = nn.functional.interpolate(
        images[:, None],
        size,
        mode=rule.removesuffix("-antialias"),
        align_corners=False,
        antialias=rule.endswith("-antialias"),
    )
    return resized[:, 0]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's CPU generator seeded, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        # not `torch.manual_seed`, which seeds the generators of devices too
        torch.default_generator.manual_seed(seed)
        yield
