"""The first-order score of AutoScheme (Intel AutoRound, `auto_scheme/delta_loss.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject
from methods.sensitivity.gradients import Price, format_losses, sequences


@METRICS.register("autoscheme")
@dataclass(frozen=True)
class AutoScheme(Metric):
    """Σᵢⱼ |∂L/∂W ⊙ (Q(W) − W)|ᵢⱼ of each linear in each format: AutoScheme (Intel AutoRound), its part of the weights.

    L is the mean loss of a batch with the text's own labels, and the score the mean over batches, here of one
    sequence each, of that sum of magnitudes: were gradients averaged first, they would cancel near a minimum. The
    original adds batches up. It also takes gradients in a model whose weights are rounded to the format at hand, and
    so runs once a format; here they are those of the unquantized model.

    Args:
        sequences: of the text, one forward and one backward pass each.
        context: tokens used of each sequence, from its beginning.
    """

    derivatives: ClassVar[int] = 1
    per_format: ClassVar[bool] = True

    sequences: int = 128
    context: int = 2048

    def __call__(self, subject: Subject) -> Sensitivity:
        texts = sequences(subject, self.sequences, self.context)

        def pricing(name: str, x: Tensor, g: Tensor) -> Price:
            del name
            gradient = g.T @ x
            return lambda delta: (gradient * delta).abs_().sum()

        with subject.cost() as cost:
            samples = format_losses(subject, texts, pricing, cost)
        return samples.result(cost, scale=1 / (texts.shape[1] - 1))
