"""Methods that give every linear one format, of the budget's integers or by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kernels.linear import Inputs
from methods.base import Context, Quantized, Stat, UniformMethod
from methods.budget import Budget
from methods.formats.base import Format
from methods.formats.registry import named_format
from methods.inputs import input_format, input_roundings
from methods.network import Network


@dataclass(frozen=True)
class AnyFormat(UniformMethod):
    """A uniform method that works with every number format, and to which any rounding of inputs may be added.

    Subclasses say how weights are quantized.

    Args:
        format: such as `nf4` or `nvfp4`, of the budget's width; the budget's integers by default. A budget's group
            size and symmetry say nothing about such a format, whose scales are its own.
        inputs: what rounds the linears' inputs, such as `int8-token`, see `methods.inputs`; 16 bits by default.
            Weights are calibrated on inputs that are not rounded.
    """

    format: str = field(default="", kw_only=True)
    inputs: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.inputs:
            input_format(self.inputs)

    @property
    def statistics(self) -> frozenset[Stat]:
        return self.needs | (input_format(self.inputs).needs if self.inputs else frozenset())

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason or not self.format:
            return reason
        width = round(named_format(self.format).bits)
        return None if width == budget.bits else f"{self.format} has {width} bits, and the budget names {budget.bits}"

    def quantize(self, ctx: Context) -> Quantized:
        done = self.quantize_weights(ctx)
        return replace(done, inputs=self.input_roundings(ctx, done.input_scale))

    @abstractmethod
    def quantize_weights(self, ctx: Context) -> Quantized:
        """Quantize the weight of every linear of `ctx.network`, and leave inputs as they are."""

    def input_roundings(self, ctx: Context, input_scale: Mapping[str, Tensor]) -> dict[str, Inputs]:
        """What rounds each linear's input; `input_scale` as in `Quantized`."""
        return input_roundings(ctx, self.inputs, input_scale)

    def fitted(self, budget: Budget, **options: Any) -> Format:
        """The format to use; `options` are of integer formats.

        Raises:
            ValueError: options, of a named format.
        """
        if not self.format:
            return budget.format(**options)
        chosen = {name: value for name, value in options.items() if value}
        if chosen:
            raise ValueError(f"{' and '.join(chosen)} search ranges of integers; {self.format} has its own scales")
        return named_format(self.format)
