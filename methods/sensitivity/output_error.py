"""Mean squared error of a linear's output, from the Gram matrix of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.base import Stat
from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject, entry, exact


@METRICS.register("output_mse")
@dataclass(frozen=True)
class OutputMSE(Metric):
    """Mean over calibration tokens and output channels of (ΔW x)², ΔW = Q(W) − W of rounding to nearest: the
    objective of layer-wise quantization (Nagel et al., AdaRound, ICML 2020, arXiv 2004.10568).

    It equals tr(ΔW G ΔWᵀ) / out, with G the mean of x xᵀ. It knows nothing of what comes after the linear: errors
    that the loss would forgive count like others, and linears with large outputs count more.
    """

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})
    per_format: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> Sensitivity:
        values = {}
        with subject.cost() as cost:
            for name in subject.network.linears:
                gram = subject.statistics(Stat.GRAM, name)
                out, _ = subject.network.shape(name)
                for fmt in subject.formats:
                    values[entry(name, fmt)] = output_energy(subject.delta(name, fmt), gram) / out
        return exact(values, cost)


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """tr(W G Wᵀ), the mean over tokens of ‖W x‖², of W fp32 [out, in] and the mean G of x xᵀ, fp32 [in, in]."""
    return float((weight @ gram).mul_(weight).double().sum())
