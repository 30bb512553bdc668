"""Traces of the Gauss-Newton matrix, one a linear, from first-order gradients of sampled labels.

The Hessian of the loss is JᵀHJ + Σ ∂loss/∂z · ∂²z/∂W², with J the Jacobian of the logits z and H the Hessian of the
loss in z. The first term is the (generalized) Gauss-Newton matrix, which for the softmax equals the Fisher
information: the mean of ggᵀ over labels drawn from the model's own prediction, g the gradient of the log-likelihood
(Martens, JMLR 2020, arXiv 1412.1193). It is positive semidefinite and needs no second derivative.
The second term is left out: this is not the trace of the full Hessian, which `hutchinson` estimates.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import ClassVar

from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject
from methods.sensitivity.gradients import Samples, sequences, squared_norms

log = logging.getLogger(__name__)

ROUND = 8  # sequences between two looks at the standard errors


@METRICS.register("gauss_newton")
@dataclass(frozen=True)
class GaussNewton(Metric):
    """Trace of the Gauss-Newton matrix of the mean next-token loss, in each linear's weight (Martens, JMLR 2020).

    Labels yₜ ~ p(· | text before t) are drawn for each position t of a sequence of n predicted tokens. Their scores
    ∂lₜ/∂W have mean zero given the text and are independent, so the cross terms of E‖∂(Σₜ lₜ)/∂W‖² vanish, and
    ‖∂(Σₜ lₜ)/∂W‖²/n is an unbiased estimate of the trace on this sequence: one forward and one backward pass serve
    all linears.

    The standard error over sequences covers the choice of text as well as the labels, as long as there are enough
    sequences; once they are used up, the same ones get new labels. All is done when each error is at most
    `tolerance` times its trace, or times the median trace of all linears where that is larger.

    Args:
        tolerance: relative standard error to reach.
        max_draws: sequences with drawn labels after which the estimate is left as it is.
        context: tokens used of each sequence, from its beginning.
    """

    derivatives: ClassVar[int] = 1
    is_trace: ClassVar[bool] = True

    tolerance: float = 0.05
    max_draws: int = 256
    context: int = 2048

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.max_draws < 2:
            raise ValueError(
                f"a standard error needs at least 2 draws and a tolerance of 0 or more, not "
                f"max_draws={self.max_draws} with tolerance={self.tolerance}"
            )

    def __call__(self, subject: Subject) -> Sensitivity:
        network, generator = subject.network, subject.generator()
        samples = Samples(network.linears)
        with subject.cost() as cost:
            for text in islice(cycle(sequences(subject, self.max_draws, self.context)), self.max_draws):
                samples.add(squared_norms(network, text, generator))
                cost.passes += 2
                if len(samples) % ROUND == 0 and not self._imprecise(samples):
                    break
            log.info("Gauss-Newton: %d draws, %d linears imprecise", len(samples), len(self._imprecise(samples)))
        return samples.result(cost)

    def _imprecise(self, samples: Samples) -> list[str]:
        traces, errors = samples.means(), samples.errors()
        floor = median(traces.values())
        return [name for name, trace in traces.items() if errors[name] > self.tolerance * max(trace, floor)]
