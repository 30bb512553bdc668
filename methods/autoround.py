"""AutoRound, or SignRound (Cheng et al., Findings of EMNLP 2024, arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernels.packed import Packed
from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.formats.integer import Integer
from methods.learned_clipping import LearnedInteger, ranges
from methods.network import Block, Network
from methods.reconstruction import Loop, Parameters, Student, learn_blocks

LONG = 1000  # iterations from which few bits learn at twice the rate
FEW_BITS = 3


@register("autoround")
@dataclass(frozen=True)
class AutoRound(UniformMethod):
    """Learns for every weight whether to round up or down, and for every group how far to shrink its range, by signed
    gradient descent on the error of a block's output.

    Three things differ from the official code. Offsets stay in ±0.5, as the paper has it. What is kept is judged on
    all sequences, see `methods.reconstruction.Loop`. And a symmetric budget has GPTQ's grid (the code's data type
    `int_sym_gptq`): the code's default grid, whose scale carries the sign of the largest weight, is no grid of
    `methods.formats.integer`.

    Args:
        iters: steps for each block; 0 rounds to nearest.
        batch: sequences a step.
        lr: rate at which offsets and factors of ranges change, decreasing linearly to 0. By default 1/iters, so that an
            offset can travel half a step; as in the official code, 2/iters from 1000 iterations on at 3 bits or
            fewer.
        tune_ranges: learn factors of the ranges' ends too (the code's `enable_minmax_tuning`).
        bf16: see `methods.reconstruction.Loop`.
    """

    iters: int = 200
    batch: int = 8
    lr: float | None = None
    tune_ranges: bool = True
    bf16: bool = False

    def __post_init__(self) -> None:
        self._loop()
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr={self.lr:g} is no learning rate; take a positive number, or none for 1/iters")

    @property
    def parts(self) -> Parts:
        return Parts(rounding="learned")

    def quantize(self, ctx: Context) -> Quantized:
        fmt = ctx.budget.format()
        student = partial(_Offsets, ctx.network, fmt, self.tune_ranges)
        optimizer = partial(SignSGD, lr=self._rate(fmt.width))
        return Quantized(learn_blocks(ctx, student, optimizer, self._loop(), schedule=lambda done: 1 - done))

    def _loop(self) -> Loop:
        return Loop(self.iters, self.batch, keep_best=True, bf16=self.bf16)

    def _rate(self, bits: int) -> float:
        if self.lr is not None:
            return self.lr
        return (2 if self.iters >= LONG and bits <= FEW_BITS else 1) / max(self.iters, 1)


class SignSGD(Optimizer):
    """Each parameter moves by the learning rate against the sign of its gradient."""

    def __init__(self, parameters: Parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """`closure` is not used."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign_(), alpha=group["lr"])


class _Linear:
    """One weight matrix: an offset in ±0.5 for every weight, factors in [0, 1] of both ends of every range."""

    def __init__(self, weight: Tensor, fmt: Integer, tune_ranges: bool) -> None:
        self.integers = LearnedInteger(fmt, weight.shape[1])
        self.groups = self.integers.groups(weight)
        self.low, self.high = ranges(self.groups)
        self.offset = torch.zeros_like(self.groups, requires_grad=True)
        self.factors = [torch.ones_like(end, requires_grad=tune_ranges) for end in (self.low, self.high)]

    def rounding(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of `LearnedInteger.rounded` and `pack`."""
        low, high = self.factors
        return self.groups, self.low * low, self.high * high, self.offset


class _Offsets(Student):
    """A block whose rounding is learned."""

    def __init__(self, network: Network, fmt: Integer, tune_ranges: bool, block: Block) -> None:
        self.network = network
        self.linears = {
            name: _Linear(network.weight(name), fmt, tune_ranges) for group in block.groups for name in group.linears
        }

    def parameters(self) -> Parameters:
        learned = [tensor for linear in self.linears.values() for tensor in (linear.offset, *linear.factors)]
        return [{"params": [tensor for tensor in learned if tensor.requires_grad]}]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.weight": linear.integers.rounded(*linear.rounding()) for name, linear in self.linears.items()}

    def project(self) -> None:
        for linear in self.linears.values():
            linear.offset.clamp_(-0.5, 0.5)
            for factor in linear.factors:
                factor.clamp_(0, 1)

    def finish(self) -> dict[str, Packed]:
        packed: dict[str, Packed] = {}
        for name, linear in self.linears.items():
            packed[name] = linear.integers.pack(*linear.rounding())
            self.network.overwrite(name, packed[name].dequantize())
        return packed
