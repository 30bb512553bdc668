"""ZeroQuant (Yao et al., NeurIPS 2022, arXiv 2206.01861), and the low-rank compensation of ZeroQuant-V2 (Yao et al.,
arXiv 2303.08302)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import Adam

from kernels.activations import TokenScale, integers
from kernels.linear import Inputs
from kernels.packed import Packed
from kernels.packed_sum import PackedSum
from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.formats.base import Format
from methods.low_rank import low_rank
from methods.network import Block, Network
from methods.reconstruction import Loop, Parameters, Student, learn_blocks, straight_through
from methods.rounding.nearest import round_to_nearest

INPUT_WIDTHS = range(2, 9)


@register("zeroquant")
@dataclass(frozen=True)
class ZeroQuant(UniformMethod):
    """Symmetric integers, inputs rounded token by token, and layer-by-layer knowledge distillation (LKD).

    Weights are symmetric as in the paper, whatever the budget says. The budget's groups divide rows, as in
    ZeroQuant-V2; those of the first paper are made of whole rows. The grid is that of `methods.formats.integer`, with
    the scale 2·max|w| / (2^bits − 1), where the official code has 2·max|w| / 2^bits. Every linear gets the budget's
    width; the paper keeps attention in 8 bits where the rest has 4.

    LKD trains all parameters of a block, norms and biases among them, and gradients pass straight through the
    rounding. Teacher and student read the same input, the output of the full-precision blocks (section 4.3).

    Args:
        input_bits: width of the linears' inputs, 2 to 8; 0 leaves them alone.
        steps: of Adam for each block; 0 rounds to nearest, without distillation.
        lr: the learning rate, by default that of the official code.
        batch: sequences a step.
        rank: of the compensation for what rounding leaves over (LoRC), with factors of 8 bits; 0 for none.
            ZeroQuant-V2 has 8.
    """

    input_bits: int = 8
    steps: int = 100
    lr: float = 5e-6
    batch: int = 8
    rank: int = 0

    def __post_init__(self) -> None:
        if self.input_bits and self.input_bits not in INPUT_WIDTHS:
            raise ValueError(f"method.input_bits={self.input_bits} is outside 2 to 8; 0 leaves inputs alone")
        if self.lr <= 0 or self.rank < 0:
            raise ValueError(f"ZeroQuant needs a positive lr and a rank of 0 or more, not {self.lr:g} and {self.rank}")
        self._loop()

    @property
    def parts(self) -> Parts:
        return Parts(rounding="nearest, distilled" if self.steps else "nearest")

    def quantize(self, ctx: Context) -> Quantized:
        network = ctx.network
        rounded = network.linears if self.input_bits else ()
        inputs: dict[str, Inputs] = {name: TokenScale(integers(self.input_bits)) for name in rounded}
        student = partial(Pupil, network, replace(ctx.budget.format(), symmetric=True), self.rank, inputs)
        packed = learn_blocks(ctx, student, partial(Adam, lr=self.lr), self._loop(), full_inputs=True)
        changed = [name for block in network.blocks for name in other_parameters(network, block)] if self.steps else []
        return Quantized(packed, {name: network.model.get_parameter(name).detach() for name in changed}, inputs=inputs)

    def _loop(self) -> Loop:
        return Loop(self.steps, self.batch)


class Pupil(Student):
    """A block whose parameters are all learned, and whose linears are rounded to nearest on the way.

    Args:
        fmt: of all linears.
        rank: of the low-rank compensation at the end, or 0.
        inputs: what rounds the inputs of linears, of any block.
    """

    def __init__(self, network: Network, fmt: Format, rank: int, inputs: dict[str, Inputs], block: Block) -> None:
        self.network, self.format, self.rank = network, fmt, rank
        self.linears = [name for group in block.groups for name in group.linears]
        self.inputs = {name: inputs[name] for name in self.linears if name in inputs}
        self.weights = {f"{name}.weight": _learned(network.linear(name).weight) for name in self.linears}
        self.others = {name: _learned(network.model.get_parameter(name)) for name in other_parameters(network, block)}

    def parameters(self) -> Parameters:
        return [{"params": [*self.weights.values(), *self.others.values()]}]

    def tensors(self) -> dict[str, Tensor]:
        return {name: self._rounded(weight) for name, weight in self.weights.items()} | self.others

    def finish(self) -> dict[str, Packed]:
        for name, value in self.others.items():
            self.network.model.get_parameter(name).copy_(value)
        return {name: self._packed(name) for name in self.linears}

    def _rounded(self, weight: Tensor) -> Tensor:
        """The nearest grid points; gradients pass straight through."""
        fixed = weight.detach()
        return straight_through(weight, self.format.fit(fixed).snap(fixed))

    def _packed(self, name: str) -> Packed:
        """Round a linear for good. What is compensated is the distance to its original weight, as in ZeroQuant-V2."""
        rounded = round_to_nearest(self.weights[f"{name}.weight"], self.format)
        packed: Packed = rounded.packed
        if self.rank:
            packed = PackedSum(packed, low_rank(self.network.weight(name) - rounded.weight, self.rank))
        self.network.overwrite(name, packed.dequantize())
        return packed


def other_parameters(network: Network, block: Block) -> list[str]:
    """Full names of a block's parameters besides the weights of linears: norms, biases."""
    weights = {f"{name}.weight" for name in network.linears}
    names = (f"{block.name}.{name}" for name, _ in network.module(block.name).named_parameters())
    return [name for name in names if name not in weights]


def _learned(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True).requires_grad_()
