"""The divergence score of ModelOpt AutoQuantize (NVIDIA Model-Optimizer, `AutoQuantizeKLDivSearcher`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from methods.sensitivity.base import METRICS
from methods.sensitivity.substitution import Comparison, Substitution


@METRICS.register("autoquantize_kl")
@dataclass(frozen=True)
class AutoQuantizeKL(Substitution):
    """ModelOpt's KL score: the divergence KL(p‖q) between the next-token distributions of the network, p, and of
    the network with one linear alone rounded, q, in nats a token.

    No labels are used. Until March 2026 ModelOpt left out the entropy of p and scored −Σ p log q, that is
    H(p) + KL(p‖q); with no quantization at all scored 0. The entropy is the same for all linears and formats and
    cannot change their ranking, but sums of several linears, ratios, and comparisons with full precision notice it.
    The current code scores KL, and so is the default here. The standard error is over sequences; with the entropy
    it includes that of the entropy.

    Unlike ModelOpt, scores are means over tokens rather than sums, and linears that share a format (q/k/v,
    gate/up) are rounded one at a time rather than together. ModelOpt then bounds the largest score of a linear;
    what is minimized here is up to the solver.

    Args:
        subtract_entropy: KL(p‖q) rather than −Σ p log q.
    """

    subtract_entropy: bool = True

    def against(self, reference: Tensor, tokens: Tensor) -> Comparison:
        del tokens
        log_p = reference.double().log_softmax(-1)  # in fp32, rounding errors exceed what 8 bits lose
        p = log_p.exp()

        def compare(logits: Tensor) -> Tensor:
            log_q = logits.double().log_softmax(-1)
            surprise = log_p - log_q if self.subtract_entropy else -log_q
            return (p * surprise).sum(-1).mean(1)

        return compare
