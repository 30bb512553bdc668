"""Learning block by block: change a block's rounding until its output is that of the full-precision block.

OmniQuant, SignRound and ZeroQuant's distillation differ in what they learn and by which optimizer; the loop is one.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kernels.linear import Inputs
from kernels.packed import Packed
from methods.base import Context
from methods.network import Block, Network, frozen, hooks
from methods.stream import BlockStream

log = logging.getLogger(__name__)

Parameters = list[dict[str, Any]]
"""Parameter groups as torch's optimizers take them: {"params": [...], "lr": ...}."""


class Student(ABC):
    """One block with something to learn.

    Attributes:
        inputs: what rounds the inputs of its linears, by full name; gradients pass straight through.
    """

    inputs: Mapping[str, Inputs] = {}

    @abstractmethod
    def parameters(self) -> Parameters:
        """What is learned; each tensor requires a gradient."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the network, by full name, that the block computes with in place of its own: rounded
        weights, say. Differentiable in `parameters`."""

    def project(self) -> None:  # noqa: B027 - most have nothing to do
        """Called without gradients after each step: back into the feasible set."""

    @abstractmethod
    def finish(self) -> dict[str, Packed]:
        """Round for good: overwrite the block's parameters in the network and return its packed linears."""


@dataclass(frozen=True)
class Loop:
    """How long, and on how much, a block learns.

    Args:
        steps: of the optimizer, for each block.
        batch: sequences a step, drawn anew for each.
        patience: stop after so many steps without a new least loss; 0 never stops early.
        keep_best: take the parameters of the least minibatch loss, rather than the last.
        bf16: compute the block in bfloat16 (autocast); parameters and loss stay in fp32.
    """

    steps: int
    batch: int = 8
    patience: int = 0
    keep_best: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.patience < 0:
            raise ValueError(
                f"a block cannot learn for {self.steps} steps of {self.batch} sequences with a patience of "
                f"{self.patience}; take 0 or more, 1 or more, and 0 or more"
            )


def learn_blocks(
    ctx: Context,
    student: Callable[[Block], Student],
    optimizer: Callable[[Parameters], Optimizer],
    loop: Loop,
    schedule: Callable[[float], float] = lambda _: 1.0,
    own_inputs: bool = False,
) -> dict[str, Packed]:
    """Quantize a network block by block; returns linear name to packed weight.

    A block reads the outputs of the quantized blocks before it, and learns the output of the full-precision
    block on full-precision inputs.

    Args:
        student: makes the student of a block, whose weights are still those of full precision.
        optimizer: makes the optimizer of a student's parameters.
        schedule: factor of the learning rates by the share of steps done, from 0 to 1.
        own_inputs: the teacher reads the quantized blocks' outputs too (ZeroQuant's distillation).
    """
    network, batch = ctx.network, min(loop.batch, len(ctx.tokens))
    with frozen(network.model):
        quantized, full = BlockStream(network, ctx.tokens, batch), BlockStream(network, ctx.tokens, batch)
        packed: dict[str, Packed] = {}
        for index, block in enumerate(ctx.track(network.blocks, "learning")):
            if own_inputs:
                full.inputs = quantized.inputs
            targets = full.run(index)
            pupil = student(block)
            with rounded_inputs(network, pupil.inputs):
                lesson = _Lesson(quantized, index, block, pupil, torch.cat(targets))
                before = lesson.loss()
                lesson.learn(optimizer, loop, schedule, ctx.generator)
                log.info("%s: mean squared error %.4g, %.4g before learning", block.name, lesson.loss(), before)
                packed |= pupil.finish()
                quantized.inputs = quantized.run(index)
            full.inputs = targets
    return packed


class _Lesson:
    """A block, its student, and what it should answer."""

    def __init__(self, stream: BlockStream, index: int, block: Block, pupil: Student, targets: Tensor) -> None:
        self.stream, self.index, self.pupil, self.targets = stream, index, pupil, targets
        self.module, self.prefix = stream.network.module(block.name), f"{block.name}."
        self.inputs = torch.cat(stream.inputs)  # [sequences, length, hidden]
        self.batch = len(stream.inputs[0])

    def answer(self, hidden: Tensor) -> Tensor:
        """The student's output for hidden states [batch, length, hidden]."""
        tensors = {name.removeprefix(self.prefix): tensor for name, tensor in self.pupil.tensors().items()}
        run = partial(_run, self.module, tensors)
        return self.stream.call(run, self.index, hidden)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean squared error over all sequences."""
        parts = zip(self.inputs.split(self.batch), self.targets.split(self.batch), strict=True)
        return sum(float(F.mse_loss(self.answer(x).float(), y.float(), reduction="sum")) for x, y in parts) / (
            self.targets.numel()
        )

    def learn(
        self,
        optimizer: Callable[[Parameters], Optimizer],
        loop: Loop,
        schedule: Callable[[float], float],
        generator: torch.Generator,
    ) -> None:
        """Run the loop."""
        chosen = optimizer(self.pupil.parameters())
        learned = [tensor for group in chosen.param_groups for tensor in group["params"]]
        rates = LambdaLR(chosen, lambda step: schedule(step / max(loop.steps, 1)))
        best, kept, waited = math.inf, learned, 0
        for step in range(loop.steps):
            loss = self._minibatch_loss(step, loop, generator)
            waited = 0 if loss < best else waited + 1
            if loss < best:
                best = float(loss)
                if loop.keep_best:
                    kept = [tensor.detach().clone() for tensor in learned]
            if loop.patience and waited >= loop.patience:
                break
            chosen.zero_grad()
            loss.backward()
            chosen.step()
            rates.step()
            with torch.no_grad():
                self.pupil.project()
        with torch.no_grad():
            for tensor, value in zip(learned, kept, strict=True):
                tensor.copy_(value)

    def _minibatch_loss(self, step: int, loop: Loop, generator: torch.Generator) -> Tensor:
        """Mean squared error over sequences drawn at random; FloatingPointError if it is not finite."""
        picked = torch.randperm(len(self.inputs), generator=generator)[: self.batch].to(self.inputs.device)
        with torch.enable_grad(), torch.autocast(self.inputs.device.type, torch.bfloat16, enabled=loop.bf16):
            loss = F.mse_loss(self.answer(self.inputs[picked]).float(), self.targets[picked].float())
        if not loss.isfinite():
            raise FloatingPointError(
                f"{self.prefix[:-1]} has a loss of {loss} in step {step}; lower the learning rate, or learn in fp32"
            )
        return loss


def _run(module: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, tensors, args, kwargs)


@contextmanager
def rounded_inputs(network: Network, inputs: Mapping[str, Inputs]) -> Iterator[None]:
    """Linears round their inputs, for a while. Gradients pass straight through the rounding."""

    def straight_through(rounding: Inputs) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            return args[0] + (rounding(args[0]) - args[0]).detach()

        return hook

    handles = [network.linear(n).register_forward_pre_hook(straight_through(r)) for n, r in inputs.items()]
    with hooks(handles):
        yield


class _Nearest(torch.autograd.Function):
    """torch.round, with the gradient of the identity (the straight-through estimator)."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_through(x: Tensor) -> Tensor:
    """Nearest whole numbers; gradients pass straight through."""
    rounded: Tensor = _Nearest.apply(x)
    return rounded
