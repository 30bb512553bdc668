"""What may be stored, computed or waited for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from methods.formats.base import Format
from methods.formats.integer import WIDTHS, Integer

BOUNDS = {"effective_bits": "b{:g}", "megabytes": "{:g}MB", "gigabops": "{:g}GBOPs", "microseconds": "{:g}us"}
"""Fields that bound something, and how a budget's name shows them."""


@dataclass(frozen=True)
class Budget:
    """What the quantized linears may take.

    Either `bits`, the width of a uniform format, or one bound that a method with mixed precision spends as it
    sees fit.
    """

    bits: int | None = None
    effective_bits: float | None = None
    """Most stored bits a weight, on average."""
    megabytes: float | None = None
    """Most 10⁶ bytes of the whole model, with what is not quantized in 16 bits."""
    gigabops: float | None = None
    """Most 10⁹ bit operations a token: multiplications times the widths of both factors (HAWQ-V3)."""
    microseconds: float | None = None
    """Most time a token spends in the linears, by the latency table of this machine."""
    group_size: int = 128
    """Columns that share a scale; 0 means one scale per output channel."""
    symmetric: bool = False

    def __post_init__(self) -> None:
        chosen = [name for name in ("bits", *BOUNDS) if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"a budget names one of {', '.join(f'budget.{name}' for name in ('bits', *BOUNDS))}, "
                f"not {' and '.join(chosen) or 'none'}"
            )
        if self.bits is not None and self.bits not in WIDTHS:
            raise ValueError(f"budget.bits={self.bits} is outside 2 to 8, the widths that can be packed")
        if self.group_size < 0:
            raise ValueError(
                f"budget.group_size={self.group_size} is not positive; take 32, 64 or 128, or 0 for per channel"
            )

    @property
    def name(self) -> str:
        """Such as `w4g128`, `w4channel-sym`, `b3.25g128` or `3.5MBg128`."""
        width = f"w{self.bits}" if self.bits is not None else BOUNDS[self._bound[0]].format(self._bound[1])
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"{width}{group}{'-sym' if self.symmetric else ''}"

    @property
    def bound(self) -> str:
        """What is bounded, in words, such as `3.25 effective bits`."""
        name, value = self._bound
        return f"{value:g} {name.replace('_', ' ')}"

    @property
    def _bound(self) -> tuple[str, float]:
        return next((name, value) for name in BOUNDS if (value := getattr(self, name)) is not None)

    def format(self, width: int | None = None, **options: Any) -> Integer:
        """The integer format of this budget, at `width` bits or at its own."""
        width = self.bits if width is None else width
        if width is None:
            raise ValueError(f"budget {self.name} is a bound of {self.bound} and names no single width")
        return Integer(width, self.group_size, self.symmetric, **options)

    def limit(self, shapes: Iterable[tuple[int, int]], other_parameters: int = 0) -> float | None:
        """Most bits a weight that matrices of these shapes may store on average; None if storage is not bounded.

        `other_parameters` of the model are not quantized and count 16 bits each where megabytes are bounded.
        """
        if self.effective_bits is not None:
            return self.effective_bits
        shapes = list(shapes)
        if self.megabytes is not None:
            return (8e6 * self.megabytes - 16 * other_parameters) / sum(out * columns for out, columns in shapes)
        if self.bits is None:
            return None
        return effective_bits({(i, s): self.format() for i, s in enumerate(shapes)})


def effective_bits(formats: Mapping[tuple[int, tuple[int, int]], Format]) -> float:
    """Stored bits a weight of matrices in the given formats; keys are (any number, shape [out, in])."""
    stored = sum(f.stored_bits(shape) for (_, shape), f in formats.items())
    return stored / sum(out * columns for _, (out, columns) in formats)
