"""Seeing that a backbone computes what its spec, and so every key made of it, says.

A digest in a spec says nothing of the network that is loaded later, or of what is done to it then.
So a network is digested when it is loaded (`TorchBackbone.check`), its state is taken down, and
compared before each batch. What a process sets for all of torch is held off, or refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import BackboneError
from ..spec import BackboneSpec, differences
from .network_state import NetworkState
from .several_layers import specs_of
from .tiles import Tiled

if TYPE_CHECKING:
    from .base import Backbone
    from .several_layers import Layers


class Witness:
    """Sees that a backbone is the one that keys were made of; asked before each batch.

    Parameters
    ----------
    backbone : Backbone
        One with a method ``check`` is asked for itself, as `TorchBackbone`. Of others, networks
        that are attributes are compared with what they are when the witness is made.
    specs : tuple of BackboneSpec
        Of its layers, of which the keys were made.
    """

    def __init__(self, backbone: Backbone | Layers, specs: tuple[BackboneSpec, ...]) -> None:
        self.backbone, self.specs = backbone, specs
        self._inner = backbone.backbone if isinstance(backbone, Tiled) else backbone
        held = {} if hasattr(self._inner, "check") else getattr(self._inner, "__dict__", {})
        self._networks = [value for value in held.values() if isinstance(value, nn.Module)]
        self._states = [NetworkState(network) for network in self._networks]

    def check(self) -> None:
        """Check the backbone.

        Raises
        ------
        BackboneError
            Says what is not as the keys say.
        """
        self._check_spec()
        if torch.get_default_dtype() != torch.float32:
            raise BackboneError(
                f"torch's default dtype is {torch.get_default_dtype()}, with which networks give "
                "other numbers: torch.set_default_dtype(torch.float32)"
            )
        own = getattr(self._inner, "check", None)
        if own is not None:
            own()
        else:
            self._check_networks()

    def _check_spec(self) -> None:
        specs = specs_of(self._inner)
        if isinstance(self.backbone, Tiled):
            specs = tuple(map(self.backbone.add_terms, specs))
        for spec, before in zip(specs, self.specs, strict=True):
            if spec is not before and spec != before:
                words = ("when keys were made", "now")
                differing = "; ".join(differences(before.to_json(), spec.to_json(), words))
                raise BackboneError(
                    f"the spec of {before.name} has changed: {differing}; nothing is stored under "
                    "keys that say otherwise: make another backbone"
                )

    def _check_networks(self) -> None:
        name = self.specs[0].name
        for network in self._networks:
            if any(module.training for module in network.modules()):
                raise BackboneError(
                    f"the network of {name} is in training mode, in which numbers depend on chance "
                    "and on the batch: call eval() on it before it is asked for its spec"
                )
        for state in self._states:
            state.check(name)
