"""The truth that other metrics estimate: how much the loss rises when one linear alone is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from methods.sensitivity.base import METRICS
from methods.sensitivity.substitution import Comparison, Substitution


@METRICS.register("measured")
@dataclass(frozen=True)
class Measured(Substitution):
    """Increase of the mean next-token loss, in nats, when one linear alone is rounded to nearest.

    The reference for the other metrics; no paper allocates by it at this granularity. Increases may be negative
    and are kept. The standard error is that of the paired difference over sequences: most of what makes one text
    harder than another cancels in it.
    """

    def against(self, reference: Tensor, tokens: Tensor) -> Comparison:
        before = _token_losses(reference, tokens)
        return lambda logits: (_token_losses(logits, tokens) - before).mean(1)


def _token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, in nats: fp64 [batch, length − 1], so that small differences of
    large sums survive."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.double().view(len(tokens), -1)
