"""Quantization-aware training: fine-tune the weights of all linears together, while the network computes with what
they will be rounded to.

It stands among the transforms because it rewrites all weights at once before they are rounded, where a rounding sees
one linear at a time; so it fine-tunes any plan of formats. Unlike the other transforms it changes the function.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from methods.base import Context
from methods.formats.base import Format
from methods.network import Network, frozen
from methods.reconstruction import straight_through
from methods.transforms.base import TRANSFORMS, Folds, Transform

log = logging.getLogger(__name__)


@TRANSFORMS.register("qat")
@dataclass(frozen=True)
class FineTuned(Transform):
    """The recipe of LLM-QAT (Liu et al., Findings of ACL 2024, arXiv 2305.17888) for weights: grids are fitted anew to
    the weights in every step, gradients pass straight through the rounding, and the full-precision network's
    distribution of every next token is the target. Adam without weight decay, a learning rate that falls to 0 with
    the cosine; embeddings and norms stay.

    LLM-QAT trains on text that the network generates, here it is the calibration text; its learning rate of 2e-5 is
    for 7 B parameters and 10⁵ sequences, the one here for small networks and some hundred steps.

    The weights are trained for rounding to nearest: another rounding of them is not what was trained. Memory holds
    one graph of the whole network, and in fp32 the weights, their gradients, their rounded form and Adam's two moments.

    Args:
        steps: of the optimizer.
        lr: the first learning rate.
        batch: sequences a step. All are seen, in random order, before one is seen again.
        distillation: share of the divergence KL(full precision ‖ rounded) in the loss, both in nats a token; the rest
            is the negative log-likelihood of the text.
    """

    steps: int = 200
    lr: float = 1e-3
    batch: int = 1
    distillation: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not self.lr > 0 or not 0 <= self.distillation <= 1:
            raise ValueError(
                f"QAT cannot train for {self.steps} steps of {self.batch} sequences with lr={self.lr:g} and "
                f"distillation={self.distillation:g}; take 0 or more, 1 or more, a positive number, and 0 to 1"
            )

    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        student = FakeQuantized(ctx.network, plan)
        if self.steps:
            with frozen(ctx.network.model), torch.enable_grad():
                self._train(ctx, student)
        for name, weight in student.latent.items():
            ctx.network.overwrite(name, weight.detach())
        return Folds()

    def _train(self, ctx: Context, student: FakeQuantized) -> None:
        optimizer = Adam(student.latent.values(), lr=self.lr)
        rates = CosineAnnealingLR(optimizer, self.steps)
        text = TensorDataset(ctx.tokens)
        order = RandomSampler(text, num_samples=self.steps * self.batch, generator=ctx.generator)
        batches = DataLoader(text, self.batch, sampler=order, generator=ctx.generator)
        losses = []
        for step, (tokens,) in enumerate(ctx.track(batches, "fine-tuning")):
            loss = student.loss(tokens, self.distillation)
            if not loss.isfinite():
                raise FloatingPointError(f"QAT's loss is {loss} in step {step}; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            losses.append(loss.item())
        epoch = -(-len(ctx.tokens) // self.batch)
        log.info("loss per token: %.4f at first, %.4f at last", fmean(losses[:epoch]), fmean(losses[-epoch:]))


class FakeQuantized:
    """A network that computes with the rounded form of weights in fp32, which are learned.

    Args:
        network: the teacher; its own weights are where learning starts, and stay.
        plan: the format of each linear.

    Attributes:
        latent: linear name to its weight, fp32 [out, in].
    """

    def __init__(self, network: Network, plan: Mapping[str, Format]) -> None:
        self.network, self.plan = network, plan
        self.latent = {name: network.weight(name).requires_grad_() for name in network.linears}

    def weights(self) -> dict[str, Tensor]:
        """The rounded weights in place of the network's own, by full parameter name and in its dtype."""
        return {f"{name}.weight": self._rounded(name) for name in self.latent}

    def loss(self, tokens: Tensor, distillation: float) -> Tensor:
        """In nats per token of `tokens`, int64 [sequences, length]; see `FineTuned`."""
        model = self.network.model
        tokens = tokens.to(next(model.parameters()).device)
        inputs = {"input_ids": tokens, "use_cache": False}
        with torch.no_grad():
            taught = self.network.logits(tokens).float().log_softmax(-1)
        learned = functional_call(model, self.weights(), kwargs=inputs).logits.float().log_softmax(-1)
        divergence = F.kl_div(learned, taught, reduction="sum", log_target=True) / tokens.numel()
        surprise = F.nll_loss(learned[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return torch.lerp(surprise, divergence, distillation)

    def _rounded(self, name: str) -> Tensor:
        """What rounding to nearest will make of the weight once the network holds it, in the network's dtype."""
        dtype = self.network.linear(name).weight.dtype
        held = self.latent[name].to(dtype).float()
        points = self.plan[name].fit(held.detach()).snap(held.detach())
        return straight_through(held, points).to(dtype)
