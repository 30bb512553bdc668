"""The gradient score of AutoQuantize (NVIDIA Model-Optimizer, `AutoQuantizeGradientSearcher`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.formats.base import Format
from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject, entry
from methods.sensitivity.gradients import Price, format_losses, sequences


@METRICS.register("autoquantize_gradient")
@dataclass(frozen=True)
class AutoQuantizeGradient(Metric):
    """Σ (∂L/∂Y)² (Y_f − Y)² of each linear in each format f: AutoQuantize (NVIDIA Model-Optimizer).

    Y is the linear's output and Y_f that with rounded weights, both of the unquantized model's input; L is the mean
    loss of a batch with the text's own labels; and the sum goes over batches, here of one sequence each, and over
    all elements of Y. This is the diagonal of the outputs' empirical Fisher information. As there, it is
    neither halved nor averaged, and a score above that of a narrower format is lowered to it.

    There, the scores of linears that must share a format are summed before they are lowered; here afterwards, by the
    allocation. Inputs are never rounded, and Y_f − Y = x(Q(W) − W)ᵀ is computed in fp32, whatever the model's dtype.

    Args:
        sequences: of the text, one forward and one backward pass each. Scores grow in proportion.
        context: tokens used of each sequence, from its beginning.
    """

    derivatives: ClassVar[int] = 1
    per_format: ClassVar[bool] = True

    sequences: int = 128
    context: int = 2048

    def __call__(self, subject: Subject) -> Sensitivity:
        texts = sequences(subject, self.sequences, self.context)
        tokens = texts.shape[1] - 1

        def pricing(name: str, x: Tensor, g: Tensor) -> Price:
            del name
            slope = g / tokens
            return lambda delta: (x @ delta.T).mul_(slope).square_().sum()

        with subject.cost() as cost:
            samples = format_losses(subject, texts, pricing, cost)
        return _monotone(samples.result(cost, scale=len(texts)), subject)


def _monotone(found: Sensitivity, subject: Subject) -> Sensitivity:
    """The least score among a format and those of fewer bits, with the error of that one."""

    def least(linear: str, fmt: Format) -> str:
        rivals = [other for other in subject.formats if other == fmt or other.bits < fmt.bits]
        return min((entry(linear, rival) for rival in rivals), key=found.values.__getitem__)

    source = {entry(name, f): least(name, f) for name in subject.network.linears for f in subject.formats}
    values = {key: found.values[best] for key, best in source.items()}
    error = {key: found.error[best] for key, best in source.items()}
    return Sensitivity(values, error, found.cost)
