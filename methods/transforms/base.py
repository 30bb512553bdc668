"""Transforms: how the function is rewritten, unchanged in full precision (but by `qat`), before rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from methods.base import Context, Registry, Stat
from methods.formats.base import Format
from methods.network import Group, Network


@dataclass
class Folds:
    """What a transform changed besides the weights of linears; see `methods.base.Quantized`."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    input_scale: dict[str, Tensor] = field(default_factory=dict)
    output_scale: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, network: Network, group: Group, scale: Tensor) -> None:
        """Fold `scale` [in] into the group's producer and remember it."""
        changed = {key: value.clone() for key, value in network.fold(group, scale).items()}
        self.input_scale |= dict.fromkeys(group.linears, scale)
        if group.producer in network.linears:
            self.output_scale[group.producer] = scale
            del changed[f"{group.producer}.weight"]
        self.parameters |= changed


@dataclass(frozen=True)
class Transform(ABC):
    """A way to rewrite. Fields are its options, defaults the paper's."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    """Calibration statistics that it reads."""

    @abstractmethod
    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        """Rewrite the weights of `ctx.network` in place, for a plan that gives every linear a format."""


TRANSFORMS: Registry[Transform] = Registry("transform", "methods.transforms")


@TRANSFORMS.register("none")
@dataclass(frozen=True)
class Identity(Transform):
    """Leaves the network as it is."""

    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        del ctx, plan
        return Folds()
