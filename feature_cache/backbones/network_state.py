"""What decides a network's numbers beside its weights: its own state, and what torch is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..errors import BackboneError
from ..forks import Lock
from ..system import in_forked_child

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SIMPLE = (bool, int, float, str, tuple, type(None))


class NetworkState:
    """What decides a network's numbers, taken down so that it is compared in microseconds.

    Of each module its submodules, parameters, buffers, hooks, training mode, and whether its
    forward is replaced or compiled; of those of torch itself the settings too, such as a layer's
    epsilon. Of each tensor its place in memory, its version, which counts changes in place, and one
    number, as changes of ``parameter.data`` are not counted.
    """

    def __init__(self, network: nn.Module) -> None:
        self._modules = dict(network.named_modules())
        self._settings = [_settings_of(module) for module in self._modules.values()]
        self._samples: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for path, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.numel():  # the view keeps the memory: no other tensor can get the same place
                alike = self._samples.setdefault((tensor.device, tensor.dtype), {})
                alike[path] = tensor.detach().as_strided((1,), (1,))
        self._rows, self._numbers = self._look(), self._sample()

    def check(self, name: str) -> None:
        """Raise BackboneError where anything is not as it was; says where."""
        rows = self._look()
        if rows != self._rows:
            pairs = zip((*self._modules, "all of torch"), rows, self._rows, strict=True)
            where = next(path for path, now, before in pairs if now != before)
            raise _changed(name, f"the module {where!r}" if where else "the module itself")
        groups = zip(self._samples.values(), self._sample(), self._numbers, strict=True)
        for views, now, before in groups:
            if now != before:
                size = len(now) // len(views)
                differing = (i for i, (a, b) in enumerate(zip(now, before, strict=True)) if a != b)
                raise _changed(name, f"the tensor {list(views)[next(differing) // size]!r}")

    def _look(self) -> list[tuple[Any, ...]]:
        shared: Any = torch_modules
        rows = [
            _describe(vars(module), settings)
            for module, settings in zip(self._modules.values(), self._settings, strict=True)
        ]
        rows.append(tuple(tuple(getattr(shared, f"_global{hooks}")) for hooks in _HOOKS))
        return rows

    def _sample(self) -> list[bytes]:
        alike = [torch.cat(list(views.values())) for views in self._samples.values()]
        return [tensor.cpu().view(torch.uint8).numpy().tobytes() for tensor in alike]


def _settings_of(module: nn.Module) -> tuple[str, ...]:
    """Name what a module of torch itself is set to; those of others may write on themselves."""
    if not type(module).__module__.startswith("torch."):
        return ()
    return tuple(n for n, v in vars(module).items() if isinstance(v, _SIMPLE) and n != "training")


def _describe(attributes: dict[str, Any], settings: tuple[str, ...]) -> tuple[Any, ...]:
    tensors = [
        (id(t), t._version, t.data_ptr())
        for kind in ("_parameters", "_buffers")
        for t in attributes[kind].values()
        if t is not None
    ]
    return (
        attributes["training"],
        *map(id, attributes["_modules"].values()),
        *tensors,
        *(tuple(attributes[hooks]) for hooks in _HOOKS if attributes[hooks]),
        "forward" in attributes,
        attributes.get("_compiled_call_impl") is not None,
        *map(attributes.get, settings),
    )


def _changed(name: str, where: str) -> BackboneError:
    return BackboneError(
        f"the network of {name} is not as it was loaded: {where} has changed (weights, buffers, "
        "training mode, hooks or settings); its keys say otherwise, so nothing of it is stored: "
        "load the backbone anew, and give weights of your own as a checkpoint"
    )


_lock = Lock()
_depth = 0
_before: list[tuple[Any, str, Any, Any]] = []


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 in float32: no TensorFloat-32, no bfloat16, whatever the process has chosen.

    What was chosen comes back when the last of the threads inside has left.

    BackboneError at the end where another thread has chosen otherwise meanwhile; that stays.
    """
    global _depth
    # not held in the block, in which other threads compute as well
    with _lock:
        if _depth == 0:
            _before[:] = [_switch(*switch) for switch in _precision_switches()]
        _depth += 1
    try:
        yield
        # while it is counted: afterwards the choice is the process's again
        if changed := [
            name for owner, name, off in _precision_switches() if getattr(owner, name) != off
        ]:
            raise BackboneError(
                f"torch's {changed[0]} was changed while features were computed, which are not "
                "stored, as their keys say float32: choose it before, or in another process"
            )
    finally:
        with _lock:
            _depth = max(0, _depth - 1)  # 0 already in a child that was forked in the block
            if _depth == 0:
                _switch_back()


@contextmanager
def undisturbed(device: torch.device | str) -> Iterator[None]:
    """Compute as if the process had set nothing: no autocast, no gradients, exact float32."""
    with exact_float32(), torch.no_grad(), ExitStack() as stack:
        for kind in {"cpu", torch.device(device).type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _switch_back() -> None:
    for owner, name, before, off in _before:
        if getattr(owner, name) == off:  # what somebody else has chosen meanwhile stays
            setattr(owner, name, before)
    _before.clear()


def _start_anew() -> None:
    """Give a forked child what its process has chosen, where a thread of its parent was inside."""
    global _depth
    _depth = 0
    _switch_back()


in_forked_child(_start_anew)


def _precision_switches() -> list[tuple[Any, str, Any]]:
    """Name torch's switches of lower precision and what turns each off, by its version."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # sums of float16 in float16: beyond what a key allows for
    half = [(matmul, name, False) for name in ["allow_fp16_accumulation"] if _has(matmul, name)]
    if not hasattr(torch.backends, "fp32_precision"):
        return [
            *half,
            (_MatmulPrecision(), "value", "highest"),
            *((owner, "allow_tf32", False) for owner in (matmul, cudnn)),
        ]
    onednn: Any = torch.backends.mkldnn
    owners = (matmul, cudnn.conv, cudnn.rnn, onednn.matmul, onednn.conv, onednn.rnn)
    return [*half, *((owner, "fp32_precision", "ieee") for owner in owners)]


def _has(owner: Any, name: str) -> bool:
    try:  # torch raises AssertionError or RuntimeError for what its build lacks
        return isinstance(getattr(owner, name), bool)
    except (AttributeError, AssertionError, RuntimeError):
        return False


class _MatmulPrecision:
    """The switch for all devices that torch had before 2.9."""

    @property
    def value(self) -> str:
        return torch.get_float32_matmul_precision()

    @value.setter
    def value(self, precision: str) -> None:
        torch.set_float32_matmul_precision(precision)


def _switch(owner: Any, name: str, off: Any) -> tuple[Any, str, Any, Any]:
    before = getattr(owner, name)
    setattr(owner, name, off)
    return owner, name, before, off
