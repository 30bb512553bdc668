"""Learning block by block: change a block's rounding until its output is that of the full-precision block.

OmniQuant, SignRound and ZeroQuant's distillation differ in what they learn and by which optimizer; the loop is one.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from kernels.activations import InputRounding
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
        inputs: what rounds the inputs of its linears, by full name; see `rounded_inputs`.
    """

    inputs: Mapping[str, Inputs] = {}

    @abstractmethod
    def parameters(self) -> Parameters:
        """What is learned, in fp32; each tensor requires a gradient."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the network, by full name, that the block computes with in place of its own: rounded
        weights, say. Differentiable in `parameters`; of any dtype, the block computes in its own."""

    def project(self) -> None:  # noqa: B027 - most have nothing to do
        """Called without gradients after each step: back into the feasible set."""

    @abstractmethod
    def finish(self) -> dict[str, Packed]:
        """Round for good: overwrite the block's parameters in the network and return its packed linears. Called
        without gradients."""


@dataclass(frozen=True)
class Loop:
    """How long, and on how much, a block learns.

    Args:
        steps: of the optimizer, for each block.
        batch: sequences a step. All are seen before one is seen again, in a new order every time; the incomplete
            last batch of an order is dropped.
        patience: stop after so many steps without a new least minibatch loss; 0 never stops early.
        keep_best: of the parameters at the start, at the least minibatch loss and at the end, take those with the
            least loss over all sequences, rather than those at the end. A least minibatch loss alone, as SignRound's
            code trusts it, may be due to easy sequences.
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
    full_inputs: bool = False,
    both_inputs: bool = False,
) -> dict[str, Packed]:
    """Quantize a network block by block; returns linear name to packed weight.

    A block reads the outputs of the quantized blocks before it, and learns the output of the full-precision
    block on full-precision inputs.

    Args:
        student: makes the student of a block, whose weights are still those of full precision.
        optimizer: makes the optimizer of a student's parameters.
        schedule: factor of the learning rates by the share of steps done, from 0 to 1.
        full_inputs: the student reads the full-precision blocks' outputs too, so that no block learns to make up for
            the errors of those before it (ZeroQuant's distillation).
        both_inputs: learn the mean of what the teacher says to either input. Up to a factor of 2 and a constant
            that is the sum of both squared errors (OmniQuant's augmented loss).
    """
    network, batch = ctx.network, min(loop.batch, len(ctx.tokens))
    packed: dict[str, Packed] = {}
    with frozen(network.model):
        quantized = BlockStream(network, ctx.tokens, batch)
        full = copy(quantized)
        for index, block in enumerate(ctx.track(network.blocks, "learning")):
            inputs = _joined(full if full_inputs else quantized)
            full.inputs = full.run(index)
            targets = _joined(full)
            if both_inputs:
                targets = targets.lerp(torch.cat(quantized.run(index)), 0.5)
            pupil = student(block)
            with rounded_inputs(network, pupil.inputs):
                if loop.steps:
                    lesson = _Lesson(quantized, index, pupil, inputs, targets, loop)
                    lesson.learn(optimizer(pupil.parameters()), schedule, ctx.generator)
                with torch.no_grad():
                    packed |= pupil.finish()
                quantized.inputs = quantized.run(index)
    return packed


def _joined(stream: BlockStream) -> Tensor:
    """All hidden states [sequences, length, hidden]; the stream's inputs become views, so that memory holds one."""
    states = torch.cat(stream.inputs)
    stream.inputs = list(states.split(len(stream.inputs[0])))
    return states


class _Lesson:
    """A block, its student, and what it should answer: `targets` to `inputs`, both [sequences, length, hidden]."""

    def __init__(
        self, stream: BlockStream, index: int, pupil: Student, inputs: Tensor, targets: Tensor, loop: Loop
    ) -> None:
        self.stream, self.index, self.pupil = stream, index, pupil
        self.inputs, self.targets, self.loop = inputs, targets, loop
        self.name = stream.network.blocks[index].name
        self.module = stream.network.module(self.name)
        self.dtypes = {f"{self.name}.{key}": parameter.dtype for key, parameter in self.module.named_parameters()}

    def learn(self, optimizer: Optimizer, schedule: Callable[[float], float], generator: torch.Generator) -> None:
        """Run the loop, and leave the student with the parameters to keep."""
        learned = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        start = _copies(learned)
        best = self._descend(optimizer, learned, schedule, generator)
        candidates = [start, best, _copies(learned)] if self.loop.keep_best else [start, _copies(learned)]
        losses = [self._loss(learned, values) for values in candidates]
        kept = losses.index(min(losses)) if self.loop.keep_best else -1
        if not math.isfinite(losses[kept]):
            raise self._diverged(losses[kept])
        _assign(learned, candidates[kept])
        log.info("%s: mean squared error %.4g, %.4g before learning", self.name, losses[kept], losses[0])

    def _descend(
        self,
        optimizer: Optimizer,
        learned: list[Tensor],
        schedule: Callable[[float], float],
        generator: torch.Generator,
    ) -> list[Tensor]:
        """Take the steps. Returns the parameters at the least minibatch loss, if the loop wants to keep them."""
        rates = [group["lr"] for group in optimizer.param_groups]
        # In fp16, gradients of a mean over millions of numbers underflow.
        scaler = torch.amp.GradScaler(self.inputs.device.type, enabled=self.inputs.dtype is torch.float16)
        least, best, waited = math.inf, learned, 0
        batches = _batches(len(self.inputs), len(self.stream.inputs[0]), generator)
        for step, picked in enumerate(islice(batches, self.loop.steps)):
            loss = self._minibatch_loss(picked.to(self.inputs.device))
            waited += 1
            if (now := loss.item()) < least:
                least, best, waited = now, _copies(learned) if self.loop.keep_best else learned, 0
            if 0 < self.loop.patience <= waited:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / self.loop.steps)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                self.pupil.project()
        return best

    def _minibatch_loss(self, picked: Tensor) -> Tensor:
        """Mean squared error over some sequences; FloatingPointError if it is not finite."""
        device = self.inputs.device.type
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=self.loop.bf16):
            loss = F.mse_loss(self._answer(self.inputs[picked], self._tensors()).float(), self.targets[picked].float())
        if not loss.isfinite():
            raise self._diverged(loss.item())
        return loss

    @torch.no_grad()
    def _loss(self, learned: list[Tensor], values: list[Tensor]) -> float:
        """Mean squared error over all sequences with these parameters; infinite if it is not a number."""
        _assign(learned, values)
        tensors = self._tensors()
        pairs = zip(self.stream.inputs, self.targets.split(len(self.stream.inputs[0])), strict=True)
        total = sum(float(F.mse_loss(self._answer(x, tensors).float(), y.float(), reduction="sum")) for x, y in pairs)
        return math.inf if math.isnan(total) else total / self.targets.numel()

    def _tensors(self) -> dict[str, Tensor]:
        """The student's tensors, by their names in the block, in the dtype in which the block computes."""
        return {
            name.removeprefix(f"{self.name}."): tensor.to(self.dtypes.get(name, self.inputs.dtype))
            for name, tensor in self.pupil.tensors().items()
        }

    def _answer(self, hidden: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """What the block says with these tensors to hidden states [batch, length, hidden]."""
        return self.stream.call(
            lambda *args, **kwargs: functional_call(self.module, tensors, args, kwargs), self.index, hidden
        )

    def _diverged(self, loss: float) -> FloatingPointError:
        return FloatingPointError(
            f"{self.name} learns with a loss of {loss}; lower the learning rate, or learn in fp32"
        )


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices [size] of `count` sequences, without end; see `Loop.batch`."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _assign(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextmanager
def rounded_inputs(network: Network, inputs: Mapping[str, Inputs]) -> Iterator[None]:
    """Linears round their inputs, for a while. Gradients pass straight through the rounding to whole steps, and
    through the steps' size."""

    def hook(rounding: Inputs, _: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return _round_input(args[0], rounding)

    with hooks([network.linear(n).register_forward_pre_hook(partial(hook, r)) for n, r in inputs.items()]):
        yield


def _round_input(x: Tensor, rounding: Inputs) -> Tensor:
    if not isinstance(rounding, InputRounding):
        return straight_through(x, rounding(x))
    values = x.float()
    scale = rounding.scale(values)
    steps = values / scale
    return (straight_through(steps, rounding.element.snap(steps)) * scale).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004
        return value

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, of the shape of x; gradients go to x as if nothing had happened (the straight-through estimator)."""
    result: Tensor = _StraightThrough.apply(x, value.detach())
    return result
