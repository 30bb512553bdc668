"""Salience of SliM-LLM (Huang et al., arXiv 2405.14917)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.base import Stat
from methods.formats.base import Format
from methods.network import Network
from methods.rounding.sweep import damped_factor
from methods.sensitivity.base import METRICS, Losses, Metric, Sensitivity, Subject, exact, squared_error


@METRICS.register("slim_salience")
@dataclass(frozen=True)
class SlimSalience(Metric):
    """SliM-LLM's salience Σᵢⱼ wᵢⱼ² / Uⱼⱼ², U the upper Cholesky factor of the inverse damped Gram matrix.

    A term is the least error in the linear's output, over all changes of the columns still to come in GPTQ's
    order, when wᵢⱼ is set to zero. SliM-LLM sums it over a group of columns and moves bits between the groups of
    one linear; here it is summed over the linear, to move bits between linears.

    Damping is relative to the mean diagonal, and dead inputs have no salience: so computes the official code
    where it finally chooses. (Its preceding search damps by 0.01 absolutely, which depends on the units of the
    input.) Its Gram matrix is the sum over the tokens of a sequence, times 2: a factor common to all linears.

    Args:
        damping: added to the diagonal of the Gram matrix, relative to its mean.
    """

    damping: float = 0.01

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping={self.damping} is negative; SliM-LLM has 0.01")

    def __call__(self, subject: Subject) -> Sensitivity:
        network, values = subject.network, {}
        with subject.cost() as cost:
            for group in network.groups:
                gain = self._gain(subject.statistics(Stat.GRAM, group.name))
                for name in group.linears:
                    values[name] = float((network.weight(name).square() @ gain).double().sum())
        return exact(values, cost)

    def losses(self, found: Sensitivity, network: Network, formats: Sequence[Format]) -> Losses:
        """Salience times the *relative* squared error ‖Q(W) − W‖² / ‖W‖².

        Salience is the loss of changing every weight by all of itself. A change by a fraction of each weight loses
        this fraction squared; multiplying by ‖Q(W) − W‖² itself would count the size of the weights twice.
        """
        energy = {name: float(network.weight(name).square().sum()) for name in network.linears}
        return {
            # a weight of zeros is in every format, at no loss
            name: {f: found.values[name] * squared_error(network, name, f) / (energy[name] or 1.0) for f in formats}
            for name in network.linears
        }

    def _gain(self, gram: Tensor) -> Tensor:
        """1 / Uⱼⱼ², fp32 [in], and 0 where the input is always zero.

        With the damped matrix written R Rᵀ, R upper triangular, its inverse is UᵀU with U = R⁻¹.
        """
        return damped_factor(gram, self.damping).diagonal().square().masked_fill(gram.diagonal() == 0, 0)
