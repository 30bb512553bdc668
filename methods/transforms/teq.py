"""The transform of TEQ (Cheng et al., arXiv 2310.10944): train a scale for every input channel on the language-model
loss of the rounded model, and fold its inverse into the preceding operator.

Works for any plan of formats and before any rounding; the scales are trained for rounding to nearest.
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
from torch.optim.lr_scheduler import LambdaLR

from methods.base import Context
from methods.formats.base import Format
from methods.network import Group, Network, frozen
from methods.reconstruction import straight_through
from methods.transforms.base import TRANSFORMS, Folds, Transform

log = logging.getLogger(__name__)

BETAS = (0.9, 0.9)
SMALLEST = 1e-5


@TRANSFORMS.register("teq")
@dataclass(frozen=True)
class TEQScales(Transform):
    """Trained scales for every group of linears with a producer; other groups keep theirs at 1.

    Each step is a forward and a backward pass of the whole model over one sequence: memory holds one graph of it, with
    the activations of all blocks, and two fp32 copies of all weights, exact and rounded. Adam with betas (0.9, 0.9),
    and a learning rate that rises linearly and then falls linearly to 0, as in the official code; which, however,
    trains fewer groups, those whose producer its tracer finds.

    Args:
        steps: one sequence of the calibration text each, in order and over again.
        lr: the largest learning rate.
        warmup: share of the steps in which the learning rate rises.
        sqrt_w_init: start from 1/√max|w| over the weights of an input channel instead of 1.
    """

    steps: int = 1000
    lr: float = 1e-3
    warmup: float = 0.05
    sqrt_w_init: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"TEQ cannot train for {self.steps} steps with lr={self.lr:g} and warmup={self.warmup:g}; the paper "
                "has 1000, 0.001 and 0.05"
            )

    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        network, folds = ctx.network, Folds()
        groups = [group for group in network.groups if group.producer is not None]
        scales = {group: initial_scale(network, group, self.sqrt_w_init) for group in groups}
        if scales and self.steps:
            with frozen(network.model), torch.enable_grad():
                self._train(ctx, plan, scales)
        for group, scale in scales.items():
            folds.fold(network, group, scale.detach().clamp(min=SMALLEST))
        return folds

    def _train(self, ctx: Context, plan: Mapping[str, Format], scales: Mapping[Group, Tensor]) -> None:
        student = ScaledNetwork(ctx.network, plan, scales)
        optimizer = Adam([scale.requires_grad_() for scale in scales.values()], lr=self.lr, betas=BETAS)
        rates = LambdaLR(optimizer, self._rate)
        losses = []
        for step in ctx.track(range(self.steps), "training scales"):
            loss = student.loss(ctx.tokens[step % len(ctx.tokens)].unsqueeze(0))
            if not loss.isfinite():
                raise FloatingPointError(
                    f"TEQ's loss is {loss} in step {step}; lower method.lr, or run the model in fp32"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            losses.append(loss.item())
        text = len(ctx.tokens)
        log.info("loss per token, rounded: %.4f at first, %.4f at last", fmean(losses[:text]), fmean(losses[-text:]))

    def _rate(self, step: int) -> float:
        """Factor of the learning rate."""
        rising = int(self.steps * self.warmup)
        return step / rising if step < rising else (self.steps - step) / (self.steps - rising)


def initial_scale(network: Network, group: Group, sqrt_w_init: bool = False) -> Tensor:
    """The scale [in] of a group's input from which training starts; 1 for inputs whose weights are all zero."""
    if not sqrt_w_init:
        return torch.ones(network.linear(group.name).in_features, device=network.linear(group.name).weight.device)
    largest = torch.stack([network.weight(name).abs().amax(0) for name in group.linears]).amax(0)
    return torch.where(largest > 0, largest.rsqrt(), 1.0)


class ScaledNetwork:
    """A network whose weights are rounded under scales of its inputs: as after folding, but nothing is folded.

    With α the scale of a linear's input and t that of what it produces (the scale of the next linear's input, where
    that is folded into this one; otherwise 1), the folded and rounded weight is Q(W α / t), which in the coordinates
    of the original network is t · Q(W α / t) / α.

    Gradients pass straight through Q. They see the rounding error as a constant ε: the gradient in α is that of
    (W α + ε) / α, and vanishes where nothing is rounded. None goes through t, which shifts whole rows together with
    their grids and, with most formats, changes nothing.

    Args:
        plan: the format of each linear.
        scales: group to the scale [in] of its input.
    """

    def __init__(self, network: Network, plan: Mapping[str, Format], scales: Mapping[Group, Tensor]) -> None:
        self.network, self.plan = network, plan
        self.columns = {name: scale for group, scale in scales.items() for name in group.linears}
        self.rows = {str(group.producer): scale for group, scale in scales.items()}
        self.originals = {name: network.weight(name) for name in network.linears}
        constant = [name for name in network.linears if name not in self.columns | self.rows]
        self.constant = {f"{name}.weight": self._rounded(name) for name in constant}

    def weights(self) -> dict[str, Tensor]:
        """The rounded weights in place of the network's own, by full parameter name and in its dtype."""
        return self.constant | {
            f"{name}.weight": self._rounded(name)
            for name in self.network.linears
            if f"{name}.weight" not in self.constant
        }

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood of the next token, in nats, over `tokens`, int64 [sequences, length]."""
        model = self.network.model
        tokens = tokens.to(next(model.parameters()).device)
        inputs = {"input_ids": tokens, "use_cache": False}
        logits = functional_call(model, self.weights(), kwargs=inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def _rounded(self, name: str) -> Tensor:
        one = self.originals[name].new_ones(1)
        columns = self.columns.get(name, one).clamp(min=SMALLEST)
        rows = self.rows.get(name, one).detach().clamp(min=SMALLEST).unsqueeze(1)
        scaled = self.originals[name] * columns / rows
        points = self.plan[name].fit(scaled.detach()).snap(scaled.detach())
        rounded = straight_through(scaled, points) * rows / columns
        return rounded.to(self.network.linear(name).weight.dtype)
