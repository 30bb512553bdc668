"""Methods that give every linear one format, of the budget's integers or by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from methods.base import UniformMethod
from methods.budget import Budget
from methods.formats.base import Format
from methods.formats.registry import named_format
from methods.network import Network


@dataclass(frozen=True)
class AnyFormat(UniformMethod):
    """A uniform method that works with every number format.

    Args:
        format: such as `nf4` or `nvfp4`, of the budget's width; the budget's integers by default. A budget's group
            size and symmetry say nothing about such a format, whose scales are its own.
    """

    format: str = field(default="", kw_only=True)

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason or not self.format:
            return reason
        width = round(named_format(self.format).bits)
        return None if width == budget.bits else f"{self.format} has {width} bits, and the budget names {budget.bits}"

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
