"""The empirical Fisher information: squared gradients of the loss on the text itself.

A sequence is one observation, as in SqueezeLLM and FIT; the cross terms between its tokens are part of its gradient.
With the n predicted tokens of a sequence and their losses lₜ,

    F = mean over sequences of  s sᵀ,   s = n^(−1/2) · ∂(Σₜ lₜ)/∂W.

This scale makes F comparable with the Hessian of the mean loss a token: with labels drawn from the model it would be
the Gauss-Newton matrix. Code that squares gradients of each sequence's mean loss gets F/n, which ranks the same.
True labels make F biased as a curvature, since it is large where the model is wrong rather than where the loss is
curved (Kunstner et al., NeurIPS 2019, arXiv 1905.12558).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.sensitivity.base import COST, METRICS, Cost, Metric, Sensitivity, Subject, entry, exact
from methods.sensitivity.gradients import Samples, propagate, report_unseen, sequences, squared_norms


@METRICS.register("fisher_trace")
@dataclass(frozen=True)
class FisherTrace(Metric):
    """tr F of each linear's weight: the mean over sequences of ‖∂(Σₜ lₜ)/∂W‖²/n.

    Args:
        sequences: of the text, one forward and one backward pass each.
        context: tokens used of each sequence, from its beginning.
    """

    derivatives: ClassVar[int] = 1
    is_trace: ClassVar[bool] = True

    sequences: int = 128
    context: int = 2048

    def __call__(self, subject: Subject) -> Sensitivity:
        samples = Samples(subject.network.linears)
        with subject.cost() as cost:
            for text in sequences(subject, self.sequences, self.context):
                samples.add(squared_norms(subject.network, text))
                cost.passes += 2
        return samples.result(cost)


@METRICS.register("fisher_diagonal")
@dataclass(frozen=True)
class FisherDiagonal(Metric):
    """½ Σᵢⱼ Fᵢⱼ (Q(W) − W)ᵢⱼ² of each linear in each format: SqueezeLLM (Kim et al., ICML 2024, arXiv 2306.07629),
    section 4.1.

    The text is taken as given: no standard error.

    Args:
        sequences, context: see `FisherTrace`; the paper takes 100 sequences.
    """

    derivatives: ClassVar[int] = 1
    per_format: ClassVar[bool] = True

    sequences: int = 128
    context: int = 2048

    def __call__(self, subject: Subject) -> Sensitivity:
        diagonals, spent = fisher_diagonals(subject, self.sequences, self.context)
        losses = {}
        with subject.cost() as cost:
            for name, diagonal in diagonals.items():
                for fmt in subject.formats:
                    delta = subject.delta(name, fmt)
                    losses[entry(name, fmt)] = float(torch.sum(diagonal.to(delta.device) * delta.square())) / 2
        cost.include(spent)
        return exact(losses, cost)


def fisher_diagonals(subject: Subject, count: int = 128, context: int = 2048) -> tuple[dict[str, Tensor], Cost]:
    """The diagonal of F of each linear's weight, fp32 [out, in], and what it took.

    Remembered by the subject, for all that ask for as many sequences of as many tokens. It takes 4 bytes a weight,
    on the linears' devices while it is computed.

    Raises:
        FloatingPointError: a gradient that is not finite.
    """

    def compute() -> dict[str, Tensor]:
        with subject.cost() as cost:
            diagonals = _diagonals(subject, sequences(subject, count, context), cost)
        return {**diagonals, COST: torch.tensor([cost.seconds, cost.passes, cost.peak_bytes], dtype=torch.float64)}

    options = {"sequences": count, "context": context}
    found = dict(subject.recall("fisher_diagonals", options, compute, FisherDiagonal))
    seconds, passes, peak = found.pop(COST).tolist()
    return found, Cost(seconds, int(passes), int(peak))


def _diagonals(subject: Subject, texts: Tensor, cost: Cost) -> dict[str, Tensor]:
    network = subject.network
    weights = {name: network.linear(name).weight for name in network.linears}
    sums = {name: torch.zeros(weight.shape, device=weight.device) for name, weight in weights.items()}
    unseen = set(sums)

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        unseen.discard(name)
        gradient = (g.T @ x).to(sums[name].device)
        sums[name].addcmul_(gradient, gradient)

    for text in texts:
        propagate(network, text, visit)
        cost.passes += 2
    report_unseen(unseen)
    for name, total in sums.items():
        total.div_(len(texts) * (texts.shape[1] - 1))
        if not total.isfinite().all():
            raise FloatingPointError(f"gradients of {name} are not finite; load the model in fp32")
    return sums
