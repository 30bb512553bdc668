"""Kronecker-factored curvature: K-FAC (Martens & Grosse, ICML 2015, arXiv 1503.05671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Stat
from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject
from methods.sensitivity.gradients import Price, format_losses, sequences


@METRICS.register("kfac")
@dataclass(frozen=True)
class KFAC(Metric):
    """½ tr(ΔW A ΔWᵀ G) of each linear in each format, with ΔW = Q(W) − W.

    A is the mean of xxᵀ over the tokens that the linear sees, and G the mean of ggᵀ over predicted tokens, g the
    gradient of the token losses' sum in the linear's output, for labels drawn from the model's prediction. In A ⊗ G
    of the Gauss-Newton matrix two things are lost: the dependence of g on x, and the terms between positions of a
    sequence (K-FAC-expand of Eschenhagen et al., NeurIPS 2023, arXiv 2311.00636). For a single token the loss is
    the quadratic form of the Gauss-Newton matrix, in expectation over its label.

    A is the Gram matrix of the calibration text, which GPTQ reads as well, and only G is taken from the gradients'
    text: the factors are independent of each other by assumption, and no second set of [in, in] matrices is kept.
    Nor is G formed: the loss is the mean over predicted tokens of ½ gᵀ ΔW A ΔWᵀ g, which is summed up sequence by
    sequence and so has a standard error, over text and labels of G.

    Args:
        sequences: of the text, one forward and one backward pass each.
        context: tokens used of each sequence, from its beginning.
    """

    derivatives: ClassVar[int] = 1
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})
    per_format: ClassVar[bool] = True

    sequences: int = 128
    context: int = 2048

    def __call__(self, subject: Subject) -> Sensitivity:
        texts = sequences(subject, self.sequences, self.context)

        def pricing(name: str, x: Tensor, g: Tensor) -> Price:
            del x
            gram = subject.statistics(Stat.GRAM, name).to(g)

            def price(delta: Tensor) -> Tensor:
                pulled = g @ delta  # [rows, in]
                return torch.sum((pulled @ gram) * pulled)

            return price

        with subject.cost() as cost:
            samples = format_losses(subject, texts, pricing, cost, subject.generator())
        return samples.result(cost, scale=0.5 / (texts.shape[1] - 1))
