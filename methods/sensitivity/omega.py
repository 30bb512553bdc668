"""The HAWQ family's charges Ω for a linear in a format: a measure of curvature times ‖ΔW‖², the squared error of
rounding to nearest.

The curvature is measured through `Subject.measure`, so that all who need it share one measurement. None of the papers
halves Ω, though Taylor's expansion would; allocation does not care.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean, pstdev

from methods.sensitivity.base import METRICS, Cost, Sensitivity, Subject, entry, exact
from methods.sensitivity.eigenvalue import TopEigenvalue
from methods.sensitivity.hutchinson import Hutchinson


@METRICS.register("hawq_v1")
@dataclass(frozen=True)
class HAWQV1Omega(TopEigenvalue):
    """Ω = |λ| · ‖ΔW‖² of HAWQ (Dong et al., ICCV 2019, arXiv 1905.03696).

    λ is the top eigenvalue of the linear's Hessian, with the options of `TopEigenvalue`. The paper orders fine-tuning
    by Ω. The magnitude is taken because a linear whose curvature is dominated by a negative eigenvalue is not an
    insensitive one; Q-BERT does the same.
    """

    per_format = True

    def __call__(self, subject: Subject) -> Sensitivity:
        found = subject.measure(TopEigenvalue(**asdict(self)))
        return _omegas(subject, found, {name: abs(value) for name, value in found.values.items()}, found.error)


@METRICS.register("hawq_v2")
@dataclass(frozen=True)
class HAWQV2Omega(Hutchinson):
    """Ω = tr(H)/n · ‖ΔW‖² of HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852).

    H is the Hessian of the linear's n weights, with the options of `Hutchinson`. A negative trace stays negative: to
    second order, rounding then lowers the loss.
    """

    per_format = True

    def __call__(self, subject: Subject) -> Sensitivity:
        found = subject.measure(Hutchinson(**asdict(self)))
        sizes = {name: subject.network.linear(name).weight.numel() for name in found.values}
        average, error = ({n: each[n] / sizes[n] for n in sizes} for each in (found.values, found.error))
        return _omegas(subject, found, average, error)


@METRICS.register("qbert_score")
@dataclass(frozen=True)
class QBERTScore(TopEigenvalue):
    """|mean λ| + std λ over shards of the text: Q-BERT (Shen et al., AAAI 2020, arXiv 1909.05840).

    λ is the top eigenvalue with the options of `TopEigenvalue`, on the first `sequences` of each shard. Shards are
    disjoint parts of the text, of nearly equal size; the paper takes 10 % of the training set for each. The
    deviation is that of the shards themselves, so that one shard gives |λ|.

    Args:
        shards: parts that the text is cut into.
    """

    shards: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards < 1:
            raise ValueError(f"shards={self.shards} is not positive; 1 takes the whole text at once")

    def __call__(self, subject: Subject) -> Sensitivity:
        if len(subject.tokens) < self.shards:
            raise ValueError(f"{len(subject.tokens)} sequences cannot make {self.shards} shards; lower shards")
        options = asdict(self)
        del options["shards"]
        parts = subject.tokens.tensor_split(self.shards)
        # Called rather than measured: `Subject.measure` remembers by options, and does not see that the text differs.
        found = [TopEigenvalue(**options)(replace(subject, tokens=part)) for part in parts]
        cost, values = Cost(), {}
        for each in found:
            cost.include(each.cost)
        for name in subject.network.linears:
            eigenvalues = [each.values[name] for each in found]
            values[name] = abs(fmean(eigenvalues)) + pstdev(eigenvalues)
        return exact(values, cost)


@METRICS.register("qbert")
@dataclass(frozen=True)
class QBERTOmega(QBERTScore):
    """Ω = (|mean λ| + std λ) · ‖ΔW‖², the score of Q-BERT (AAAI 2020, arXiv 1909.05840) priced as HAWQ prices its own.

    The paper orders layers by the score alone and picks their widths by hand.
    """

    per_format = True

    def __call__(self, subject: Subject) -> Sensitivity:
        found = subject.measure(QBERTScore(**asdict(self)))
        return _omegas(subject, found, found.values, found.error)


def _omegas(
    subject: Subject, found: Sensitivity, curvature: Mapping[str, float], error: Mapping[str, float]
) -> Sensitivity:
    """Curvatures and their standard errors, times ‖ΔW‖² of every candidate."""
    values, errors = {}, {}
    with subject.cost() as cost:
        for name in subject.network.linears:
            for fmt in subject.formats:
                squared = float(subject.delta(name, fmt).square().sum())
                values[entry(name, fmt)] = curvature[name] * squared
                errors[entry(name, fmt)] = error[name] * squared
    cost.include(found.cost)
    return Sensitivity(values, errors, cost)
