"""What rounds the inputs of linears at run time, by names such as `int8-token`: an element and a scope.

The scope is what shares a scale: each `token`, the whole `tensor` of a call, or, with `static`, all inputs that will
ever come, by the largest magnitude in the calibration text. With `block` (`mxfp4-block`, `nvfp4-block`) the number
format scales as it does for weights. Grids are symmetric. The inputs of all linears of the blocks are rounded;
attention's own products are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.activations import InputRounding, StaticScale, TensorScale, TokenScale, integers
from kernels.linear import Inputs
from kernels.minifloat import Element
from methods.base import Context, Stat, hint
from methods.formats.floats import FP8_NAMES, MX, MX_NAMES, NVFP4, ScaledFloat
from methods.formats.integer import WIDTHS

ELEMENTS: dict[str, Element] = {
    **{f"int{bits}": integers(bits) for bits in WIDTHS},
    **{name: element for element, name in FP8_NAMES.items()},
}
STATIC = "static"
SCOPES: dict[str, Callable[[Element, float], InputRounding]] = {
    "token": lambda element, _: TokenScale(element),
    "tensor": lambda element, _: TensorScale(element),
    STATIC: StaticScale,
}


@dataclass(frozen=True)
class InputFormat:
    """How inputs are rounded: to which numbers, and what shares a scale."""

    element: Element
    scope: str

    @property
    def needs(self) -> frozenset[Stat]:
        """The calibration statistics that it reads."""
        return frozenset({Stat.MAX_ABS}) if self.scope == STATIC else frozenset()

    def rounding(self, largest: float = 0.0) -> InputRounding:
        """What rounds an input whose magnitudes are at most `largest`, which static scopes alone heed."""
        return SCOPES[self.scope](self.element, largest)


class BlockScale(InputRounding):
    """Each block of each token has the scale that the format gives a block of a weight matrix: dynamic.

    A scale of the whole matrix, which NVFP4 has, is that of the whole input.
    """

    def __init__(self, fmt: ScaledFloat) -> None:
        super().__init__(fmt.element)
        self.format = fmt

    def scale(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert to which no token was routed
            return x
        grid = self.format.fit(x.flatten(0, -2))
        return grid.scale[:, grid.group].view_as(x)


@dataclass(frozen=True)
class BlockFormat:
    """Inputs in a number format of weights."""

    format: ScaledFloat

    needs: ClassVar[frozenset[Stat]] = frozenset()

    def rounding(self, largest: float = 0.0) -> InputRounding:
        """What rounds an input; its range is its own."""
        del largest
        return BlockScale(self.format)


INPUT_FORMATS: dict[str, InputFormat | BlockFormat] = {
    **{f"{name}-{scope}": InputFormat(element, scope) for name, element in ELEMENTS.items() for scope in SCOPES},
    **{f"{fmt.name}-block": BlockFormat(fmt) for fmt in (*(MX(element) for element in MX_NAMES), NVFP4())},
}


def input_format(name: str) -> InputFormat | BlockFormat:
    """The input format of that name.

    Raises:
        ValueError: there is none; names the nearest, or all.
    """
    if name not in INPUT_FORMATS:
        raise ValueError(f"unknown input format {name!r}: {hint(name, INPUT_FORMATS)}")
    return INPUT_FORMATS[name]


def input_roundings(ctx: Context, name: str, input_scale: Mapping[str, Tensor] | None = None) -> dict[str, Inputs]:
    """What rounds the input of each linear, in the format of that name; nothing for the empty name.

    Args:
        input_scale: linear name to s [in], where a transform divides the linear's input by s. Static ranges are
            those of the divided input; the statistics are of the original model.

    Raises:
        ValueError: an input that is always zero in the calibration text has no static range.
    """
    if not name:
        return {}
    fmt, scales = input_format(name), input_scale or {}

    def largest(linear: str) -> float:
        if not fmt.needs:
            return 0.0
        found = float((ctx.statistics(Stat.MAX_ABS, linear) / scales.get(linear, 1)).amax())
        if found == 0:
            raise ValueError(
                f"the input of {linear} is always zero in the calibration text, so it has no static range; "
                f"give more text, or round inputs with {name.removesuffix(STATIC)}token"
            )
        return found

    return {linear: fmt.rounding(largest(linear)) for linear in ctx.network.linears}
