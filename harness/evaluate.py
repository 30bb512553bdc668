"""How good a model is on the test windows: perplexity, and nearness to the full-precision model.

Windows are the unit of resampling. Tokens of a window are dependent, so intervals over tokens would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.intervals import RESAMPLES, Estimate, interval
from methods.base import Tracker, no_tracker
from methods.network import Network

# Logits of one forward pass: 32 MiB in fp32.
LOGITS_PER_BATCH = 2**23


@dataclass
class EvalConfig:
    """What to measure."""

    tasks: list[str] = field(default_factory=list)
    """Names of lm-eval tasks."""
    include_path: str | None = None
    """A folder with task files of your own."""
    data: str | None = None
    """Folder with the JSONL files of local tasks, such as piqa_local."""
    limit: int | None = None
    """Documents a task, for trials; all by default."""
    kl: bool = True
    """Compare with the full-precision model's distributions."""
    layer_error: bool = True
    """Measure the output error of each linear."""
    throughput: bool = False
    """Measure tokens a second, beside the full-precision model, and the latency of each linear."""
    bootstrap: int = RESAMPLES
    """Resamples of an interval."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        nll: mean negative log-likelihood of each window's tokens but the first, in nats.
        ppl_token: exp of the mean NLL a token; what quantization papers print.
        ppl_word: exp of the NLL a whitespace-separated word; what lm-eval prints. None if words were not counted.
        kl: mean over tokens of KL(full precision ‖ model), in nats. None without a reference.
        agreement: share of tokens at which both models' most likely next token is the same. None without a reference.
        tokens: predicted tokens.
        length: tokens a window, the first included.
    """

    nll: list[float]
    ppl_token: Estimate
    ppl_word: float | None
    kl: Estimate | None
    agreement: Estimate | None
    tokens: int
    length: int


def batch_size(length: int, vocab: int) -> int:
    """Windows a forward pass such that logits stay small."""
    return max(1, LOGITS_PER_BATCH // (length * vocab))


def reference(network: Network, tokens: Tensor, batch: int = 8) -> Tensor:
    """Log-probabilities of the full-precision model, to compare quantized models with.

    Args:
        tokens: int64 [windows, length].
        batch: windows a forward pass; see `batch_size`.

    Returns:
        fp16 [windows, length − 1, vocab] on the CPU: 134 MB for 64 windows of 512 tokens and a vocabulary of 2048.
    """
    kept = torch.empty(0)
    for index, log_p in enumerate(_log_probabilities(network, tokens, batch, no_tracker)):
        if index == 0:
            kept = torch.empty(len(tokens), *log_p.shape, dtype=torch.float16)
        kept[index] = log_p
    return kept


def evaluate(
    network: Network,
    tokens: Tensor,
    reference: Tensor | None = None,
    words: int | None = None,
    batch: int = 8,
    resamples: int = RESAMPLES,
    track: Tracker = no_tracker,
) -> Evaluation:
    """Evaluate a model on `tokens`, int64 [windows, length]; two windows at least.

    Args:
        reference: what `reference` returned for the same tokens.
        words: whitespace-separated words among the predicted tokens.
        batch: windows a forward pass; see `batch_size`.
        resamples: of the bootstrap; its seed is fixed.

    Raises:
        FloatingPointError: a logit is NaN or infinite.
    """
    count, length = tokens.shape
    if reference is not None and reference.shape[:2] != (count, length - 1):
        raise ValueError(f"a reference of shape {list(reference.shape)} is not of {count} windows of {length} tokens")
    nll, kl, agreement = [], [], []
    for index, log_q in enumerate(_log_probabilities(network, tokens, batch, track)):
        targets = tokens[index, 1:].to(log_q.device)
        nll.append(F.nll_loss(log_q.double(), targets).item())
        if reference is not None:
            divergence, agrees = _compare(reference[index].to(log_q.device), log_q)
            kl.append(divergence.double().mean().item())
            agreement.append(agrees.double().mean().item())
    mean = interval(nll, resamples)
    return Evaluation(
        nll=nll,
        ppl_token=Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high)),
        ppl_word=math.exp(mean.value * count * (length - 1) / words) if words else None,
        kl=interval(kl, resamples) if kl else None,
        agreement=interval(agreement, resamples) if agreement else None,
        tokens=count * (length - 1),
        length=length,
    )


@torch.no_grad()
def _log_probabilities(network: Network, tokens: Tensor, batch: int, track: Tracker) -> Iterator[Tensor]:
    """Window by window, of every token but the first: fp32 [length − 1, vocab]."""
    device = next(network.model.parameters()).device
    index = 0
    for rows in track(tokens.split(batch), "evaluation"):
        for logits in network.logits(rows.to(device)):
            if not logits.isfinite().all():
                raise FloatingPointError(
                    f"the model's logits in test window {index} are not finite; "
                    "give it more bits, or a wider dtype if the full-precision model overflows too"
                )
            yield logits[:-1].float().log_softmax(-1)
            index += 1


def _compare(reference: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) and whether both prefer the same token, at each position: [positions]."""
    # Rounded to fp16, probabilities do not sum to one; normalized, they make KL positive and its error second order.
    log_p = reference.float().log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    # Tokens that fp16 cannot tell apart are equally likely: either one is agreement.
    agrees = log_p.gather(-1, log_q.argmax(-1, keepdim=True)).squeeze(-1) == log_p.amax(-1)
    return divergence, agrees
