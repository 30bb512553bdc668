"""OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from kernels.activations import InputRounding, TokenScale, integers
from kernels.linear import Inputs
from kernels.packed import Packed
from methods.base import Context, Parts, Quantized, Stat, Statistics, UniformMethod, register
from methods.formats.integer import WIDTHS, Integer
from methods.learned_clipping import LearnedInteger, ranges
from methods.network import Block, Group, Network
from methods.reconstruction import Loop, Parameters, Student, learn_blocks
from methods.transforms.base import Folds

LOGIT = 4.0  # of the clipping factors at first: they are 0.982
LEAST_STATISTIC = 1e-5
LEAST_SCALE = 1e-2


@register("omniquant")
@dataclass(frozen=True)
class OmniQuant(UniformMethod):
    """Learns, block by block, how far to clip the range of every group of weights (LWC), and, where inputs are rounded
    too, a scale and a shift for every channel of an input (LET).

    As in the official code with these exceptions. Ranges contain 0, and inputs are rounded symmetrically and only
    those of linears, as the formats of this project are. There is no scale between queries and keys, which rotary
    embeddings do not commute with. Shifts begin at the mean of the input, not at the middle of its range, and only
    LayerNorms with a bias have them. The first scales depend on all linears that read the input, not on one. The order
    of sequences changes from epoch to epoch. And a block that does not gain keeps its first parameters, see
    `methods.reconstruction.Loop`.

    Args:
        let: learn the transformation although inputs are not rounded, as the official recipes do for OPT but not for
            Llama.
        input_bits: round the inputs of linears to so many bits, token by token, and learn the transformation; 0 leaves
            inputs alone.
        epochs: passes through the calibration text for each block; the official recipes take 40 for 2 bits.
        batch: sequences a step.
        lr_lwc, lr_let: learning rates of AdamW.
        alpha: of the scales of SmoothQuant that LET begins with.
        aug_loss: also learn what the full-precision block says to the quantized block's inputs, as the official
            recipes do for 2 bits and for inputs of 4.
        bf16: see `methods.reconstruction.Loop`.
    """

    let: bool = False
    input_bits: int = 0
    epochs: int = 20
    batch: int = 1
    lr_lwc: float = 1e-2
    lr_let: float = 5e-3
    alpha: float = 0.5
    aug_loss: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.input_bits and self.input_bits not in WIDTHS:
            raise ValueError(f"input_bits={self.input_bits} is outside 2 to 8; 0 does not round inputs")
        if not (self.lr_lwc > 0 and self.lr_let > 0):
            raise ValueError(f"lr_lwc={self.lr_lwc:g} and lr_let={self.lr_let:g} must be positive")
        self._loop(self.batch)

    @property
    def parts(self) -> Parts:
        return Parts(transform="let" if self._transforms else "none", rounding="nearest, clipped")

    @property
    def statistics(self) -> frozenset[Stat]:
        return frozenset({Stat.MAX_ABS, Stat.MEAN} if self._transforms else ())

    def quantize(self, ctx: Context) -> Quantized:
        folds = Folds()
        rounding = TokenScale(integers(self.input_bits)) if self.input_bits else None
        packed = learn_blocks(
            ctx,
            partial(_Clipped, self, ctx, folds, rounding),
            partial(AdamW, weight_decay=0),
            self._loop(len(ctx.tokens)),
            both_inputs=self.aug_loss,
        )
        inputs: dict[str, Inputs] = dict.fromkeys(ctx.network.linears, rounding) if rounding else {}
        return Quantized(packed, folds.parameters, folds.input_scale, folds.output_scale, inputs=inputs)

    def edges(self, network: Network, statistics: Statistics, block: Block) -> list[_Edge]:
        """Where a scale is learned in a block."""
        if not self._transforms:
            return []
        groups = [group for group in block.groups if _transformed(network, group)]
        return [_Edge(network, group, statistics, self.alpha, shifts=bool(self.input_bits)) for group in groups]

    @property
    def _transforms(self) -> bool:
        return self.let or bool(self.input_bits)

    def _loop(self, sequences: int) -> Loop:
        return Loop(self.epochs * max(sequences // self.batch, 1), self.batch, keep_best=True, bf16=self.bf16)


def _transformed(network: Network, group: Group) -> bool:
    """Whether LET scales the input of a group: that of attention, of the first layer of an MLP, and of the output
    projection. The paper leaves the second layer of an MLP out (section 3.3): its inputs are sparse.

    Values are one of three or more linears that read the same input; an MLP has one or two.
    """
    if group.producer in network.linears:
        return len(network.group_of[group.producer].linears) > 2
    return group.producer is not None


class _Edge:
    """The input of a group, divided by a scale after a shift was subtracted.

    Attributes:
        scale: [in].
        shift: [in], or None.
    """

    def __init__(self, network: Network, group: Group, statistics: Statistics, alpha: float, shifts: bool) -> None:
        assert group.producer is not None
        self.group, self.producer = group, group.producer
        weights = torch.stack([network.weight(name).abs().amax(0) for name in group.linears]).amax(0)
        inputs = statistics(Stat.MAX_ABS, group.name).to(weights)
        scale = inputs.clamp(min=LEAST_STATISTIC) ** alpha / weights.clamp(min=LEAST_STATISTIC) ** (1 - alpha)
        self.scale = scale.clamp_(min=LEAST_SCALE).requires_grad_()
        norm = network.module(self.producer)
        self.shift: Tensor | None = None
        if shifts and isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            self.shift = statistics(Stat.MEAN, group.name).to(weights, copy=True).requires_grad_()

    def produced(self, key: str, value: Tensor) -> Tensor:
        """A parameter of the producer, `weight` or `bias`, that makes it produce the transformed input."""
        if key == "bias" and self.shift is not None:
            value = value - self.shift
        return value / self.scale.view(-1, *[1] * (value.dim() - 1))


class _Linear:
    """One weight matrix [out, in], and the logits of the clipping factors of its ranges."""

    def __init__(self, linear: nn.Linear, weight: Tensor, fmt: Integer) -> None:
        self.weight, self.bias = weight, None if linear.bias is None else linear.bias.detach().float()
        self.integers = LearnedInteger(fmt, weight.shape[1])
        groups = self.integers.groups(weight)
        self.logits = [torch.full_like(groups[..., 0], LOGIT, requires_grad=True) for _ in range(2)]
        self.untransformed = groups, *ranges(groups)


class _Clipped(Student):
    """A block whose clipping, and whose transformation if it has one, is learned."""

    def __init__(
        self, method: OmniQuant, ctx: Context, folds: Folds, rounding: InputRounding | None, block: Block
    ) -> None:
        self.network, self.folds, self.rates = ctx.network, folds, (method.lr_lwc, method.lr_let)
        fmt = ctx.budget.format()
        names = [name for group in block.groups for name in group.linears]
        self.linears = {n: _Linear(self.network.linear(n), self.network.weight(n), fmt) for n in names}
        self.edges = method.edges(self.network, ctx.statistics, block)
        self.read = {name: edge for edge in self.edges for name in edge.group.linears}
        self.fed = {edge.producer: edge for edge in self.edges}
        self.inputs = dict.fromkeys(names, rounding) if rounding else {}

    def parameters(self) -> Parameters:
        logits = [logit for linear in self.linears.values() for logit in linear.logits]
        learned = [tensor for edge in self.edges for tensor in (edge.scale, edge.shift) if tensor is not None]
        clipping, transformation = self.rates
        groups = [{"params": logits, "lr": clipping}, {"params": learned, "lr": transformation}]
        return [group for group in groups if group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"{n}.weight": linear.integers.rounded(*self._rounding(n)) for n, linear in self.linears.items()}
        return weights | self._others()

    def project(self) -> None:
        for edge in self.edges:
            edge.scale.clamp_(min=LEAST_SCALE)

    def finish(self) -> dict[str, Packed]:
        packed: dict[str, Packed] = {n: linear.integers.pack(*self._rounding(n)) for n, linear in self.linears.items()}
        others = self._others()
        for name, matrix in packed.items():
            self.network.overwrite(name, matrix.dequantize())
        for name, value in others.items():
            self._replace(name, value)
        for edge in self.edges:
            scale = edge.scale.detach()
            self.folds.input_scale |= dict.fromkeys(edge.group.linears, scale)
            if edge.producer in self.linears:
                self.folds.output_scale[edge.producer] = scale
        return packed

    def _rounding(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `LearnedInteger.rounded` and `pack`."""
        linear = self.linears[name]
        groups, low, high = linear.untransformed
        if name in self.read or name in self.fed:
            groups = linear.integers.groups(self._weight(name))
            low, high = ranges(groups)
        shrink_low, shrink_high = (logit.sigmoid() for logit in linear.logits)
        return groups, low * shrink_low, high * shrink_high

    def _weight(self, name: str) -> Tensor:
        """The transformed weight."""
        weight = self.linears[name].weight
        if name in self.read:
            weight = weight * self.read[name].scale
        return self.fed[name].produced("weight", weight) if name in self.fed else weight

    def _others(self) -> dict[str, Tensor]:
        """What the transformation changes besides the weights of linears, by full name."""
        changed = {f"{n}.bias": bias for n in self.linears if (bias := self._bias(n)) is not None}
        for edge in self.edges:
            if edge.producer not in self.linears:
                for key, value in self.network.module(edge.producer).named_parameters(recurse=False):
                    changed[f"{edge.producer}.{key}"] = edge.produced(key, value.float())
        return changed

    def _bias(self, name: str) -> Tensor | None:
        """The transformed bias of a linear, if it is another than before."""
        bias, changed = self.linears[name].bias, False
        if name in self.read and (shift := self.read[name].shift) is not None:
            moved = self.linears[name].weight @ shift
            bias, changed = moved if bias is None else bias + moved, True
        if name in self.fed and bias is not None:
            bias, changed = self.fed[name].produced("bias", bias), True
        return bias if changed else None

    def _replace(self, name: str, value: Tensor) -> None:
        """Change a parameter of the network for good; a linear may get its first bias."""
        owner, _, key = name.rpartition(".")
        module = self.network.module(owner)
        if getattr(module, key) is None:
            like = module.get_parameter("weight")
            module.register_parameter(key, nn.Parameter(value.to(like.dtype), requires_grad=False))
        parameter = module.get_parameter(key)
        parameter.copy_(value)
        self.folds.parameters[name] = parameter.detach().clone()
