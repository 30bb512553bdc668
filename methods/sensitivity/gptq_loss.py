"""The error that GPTQ leaves (Frantar et al., ICLR 2023, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.base import Stat
from methods.rounding.gptq import GPTQRounding
from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject, entry, exact
from methods.sensitivity.output_error import output_energy


@METRICS.register("gptq_loss")
@dataclass(frozen=True)
class GPTQLoss(Metric):
    """Squared output error after GPTQ, equation 1 of the paper: mean over calibration tokens of ‖(Ŵ − W) x‖², Ŵ
    rounded with error feedback. What GPTQ cannot repair is what a wider format would buy.

    It equals tr(ΔW G ΔWᵀ) with G the mean of x xᵀ. The official code logs ½ tr(ΔW H ΔWᵀ) with H = 2 × length × G
    plus damping. The constant factor is the same for all linears and is left out; so is the damping, which makes
    the rounding robust but is no part of the error.

    Args:
        act_order, damping, static_groups: see `methods.rounding.gptq`.
    """

    act_order: bool = False
    damping: float = 0.01
    static_groups: bool = False

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})
    per_format: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._rounding()

    def __call__(self, subject: Subject) -> Sensitivity:
        network, values = subject.network, {}
        with subject.cost() as cost:
            for group in network.groups:
                gram = subject.statistics(Stat.GRAM, group.name)
                rounder = self._rounding().given(gram)  # one factorization for all linears of the group and formats
                for name in group.linears:
                    weight = network.weight(name)
                    for fmt in subject.formats:
                        values[entry(name, fmt)] = output_energy(rounder(weight, fmt).weight - weight, gram)
        return exact(values, cost)

    def _rounding(self) -> GPTQRounding:
        return GPTQRounding(self.act_order, self.damping, self.static_groups)
