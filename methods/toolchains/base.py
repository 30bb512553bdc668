"""Other projects' tools as methods: they quantize, our codes and our evaluation judge.

One file a tool. It holds the adapter, and what the tool's own process executes:

    IMPORTS = ("tool.package",)  # loaded before the clock starts

    def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        ...

`run` gets the full-precision model and may change it; it imports the tool itself. It returns for each linear NAME
the tensors `NAME/weight` [out, in], what the tool computes with; `NAME/scale` [out, groups]; and `NAME/zero`
[out, groups], absent for symmetric grids; an adapter may ask for more, such as the width of each linear. Nothing of
that is believed: the weights must lie on the grid they claim, are packed as ours are, and effective bits are counted
from that. A tool that counts bits itself may return its count under `EFFECTIVE_BITS`; one that differs from what is
stored is logged.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.linear import Inputs
from kernels.packed import Packed
from methods.base import Context, Quantized, UniformMethod
from methods.budget import Budget
from methods.formats.integer import Integer, IntegerGrid
from methods.toolchains.process import Answer

log = logging.getLogger(__name__)

EFFECTIVE_BITS = "claims/effective_bits"
"""Bits a weight that the tool says its plan takes: a scalar."""
CLAIM = 0.005
"""Effective bits by which that may be off."""
OFF_GRID = 0.1
"""Steps by which a weight may miss its grid: tools compute dequantized weights in 16 bits."""
FAR = 8.0
"""Squared error, relative to that of nearest rounding, from which on weights were misread rather than rounded. A zero
point that is off by one makes 13, whatever the width; rounding that looks at activations makes 1 to 3."""
NEGLIGIBLE = 1e-3
"""Squared error, relative to the weights, up to which it is no matter how far nearest rounding is: FP8 makes half of
it, which is many times what integers of 8 bits make."""


@dataclass(frozen=True)
class Work:
    """What a tool's program may use besides the model.

    Attributes:
        folder: of the same model in Hugging Face's form, with its tokenizer; for tools that want to load it.
        tokens: int64 [sequences, length], the calibration text.
        linears: full names of the linears to quantize.
    """

    folder: str
    tokens: Tensor
    linears: Sequence[str]


@dataclass(frozen=True)
class Toolchain(UniformMethod):
    """A tool that gives every linear the same integer format; see the module's docstring."""

    requirements: ClassVar[tuple[str, ...]]
    """What pip installs, with versions."""
    in_original_coordinates: ClassVar[bool] = False

    @abstractmethod
    def settings(self, budget: Budget) -> dict[str, Any]:
        """What the program is told, as JSON can say it."""

    def rounding(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Inputs | None:
        """What rounds the input of one linear at run time, where anything does; the tool's tensors as in `packed`."""
        del budget, tensors
        return None

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """The tool's `weight`, `scale` and `zero` of one linear, in our form."""
        return on_grid(tensors["weight"], tensors["scale"], tensors.get("zero"), budget.format())

    def quantize(self, ctx: Context) -> Quantized:
        if ctx.tools is None:
            raise ValueError(f"{self.name} runs in a process of its own, which only the harness can start")
        answer = ctx.tools(type(self).__module__, self.requirements, self.settings(ctx.budget))
        found = {name: self._checked(ctx, name, answer) for name in ctx.network.linears}
        if self.in_original_coordinates and ctx.budget.bits is not None:
            self._check_distance(ctx, found)
        packed = {name: self._packed(ctx.budget, name, tensors) for name, tensors in found.items()}
        _compare(self.name, answer, packed.values())
        roundings = {name: self.rounding(ctx.budget, tensors) for name, tensors in found.items()}
        inputs = {name: rounding for name, rounding in roundings.items() if rounding is not None}
        return Quantized(packed, answer.parameters, inputs=inputs, spent=(answer.seconds, answer.peak_bytes))

    def _checked(self, ctx: Context, name: str, answer: Answer) -> dict[str, Tensor]:
        """What the tool says of one linear."""
        found = {key.rsplit("/", 1)[1]: t for key, t in answer.tensors.items() if key.rsplit("/", 1)[0] == name}
        weight = found.get("weight")
        if weight is None:
            raise ValueError(f"{self.name} returned nothing for {name}; it may have skipped the linear")
        if tuple(weight.shape) != ctx.network.shape(name):
            raise ValueError(f"{self.name} returned {name} as {list(weight.shape)}, not {ctx.network.shape(name)}")
        for key, tensor in found.items():
            if not torch.isfinite(tensor.float()).all():
                raise ValueError(f"{self.name} returned NaN or infinity in {name}/{key}")
        return found

    def _check_distance(self, ctx: Context, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights that are on a grid, but not the model's, are most often an adapter's mistake in reading them."""
        error, nearest, size = 0.0, 0.0, 0.0
        for name in ctx.network.linears:
            weight = ctx.network.weight(name)
            if "inputs" in found[name]:  # the tool's weights are for inputs that are multiplied by these
                weight /= found[name]["inputs"].float()
            size += float(weight.square().sum())
            error += float((found[name]["weight"].float() - weight).square().sum())
            nearest += float((ctx.budget.format().fit(weight).snap(weight) - weight).square().sum())
        if error > max(FAR * nearest, NEGLIGIBLE * size):
            raise ValueError(
                f"{self.name} returned weights whose squared error is {error / nearest:.0f} times that of rounding to "
                "nearest: check how the adapter reads scales and zero points"
            )

    def _packed(self, budget: Budget, name: str, tensors: Mapping[str, Tensor]) -> Packed:
        try:
            return self.packed(budget, tensors)
        except ValueError as error:
            raise ValueError(f"{self.name}, {name}: {error}") from error


def _compare(name: str, answer: Answer, packed: Iterable[Packed]) -> None:
    """Log a count of the tool's own that is not what is stored."""
    if EFFECTIVE_BITS not in answer.tensors:
        return
    claimed = float(answer.tensors[EFFECTIVE_BITS])
    sizes = [(matrix.stored_bits(), matrix.shape[0] * matrix.shape[1]) for matrix in packed]
    stored = sum(bits for bits, _ in sizes) / sum(weights for _, weights in sizes)
    if abs(stored - claimed) > CLAIM:
        log.warning("%s counts %.4f effective bits; what it chose stores %.4f", name, claimed, stored)


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, fmt: Integer) -> Packed:
    """Pack dequantized weights that lie on an integer grid.

    Args:
        weight: [out, in].
        scale: [out, groups]; of symmetric grids of either sign, which says on which side the additional code is.
        zero: whole numbers [out, groups], or None where the grid is symmetric.

    Raises:
        ValueError: the shapes do not fit the format, a weight is no point of the grid, or the grid cannot be stored.
    """
    out, columns = weight.shape
    size = fmt.columns_per_group(columns)
    if scale.shape != (out, -(-columns // size)):
        raise ValueError(f"scales of shape {list(scale.shape)} are not {out} rows of {-(-columns // size)} groups")
    fmt = Integer(fmt.width, fmt.group_size, symmetric=zero is None)
    middle = torch.full_like(scale, 2 ** (fmt.width - 1)) if zero is None else zero
    step = scale.float().repeat_interleave(size, 1)[:, :columns]
    codes = weight.float() / step + middle.float().repeat_interleave(size, 1)[:, :columns]
    nearest = codes.round()
    if (codes - nearest).abs().max() > OFF_GRID or nearest.min() < 0 or nearest.max() > 2**fmt.width - 1:
        raise ValueError(f"its weights do not lie on the {fmt.width}-bit grid that it claims")
    packed = IntegerGrid(fmt, scale.float().abs(), middle.float(), columns).pack(nearest.to(torch.uint8))
    packed.get_buffer("scale").mul_(torch.where(scale < 0, -1, 1))
    if not ((packed.dequantize() - weight.float()).abs() <= 2 * OFF_GRID * step.abs()).all():
        raise ValueError(f"its {fmt.width}-bit grid cannot be stored with scales in fp16 and zero points in the codes")
    return packed
