"""Incoherence processing (Chee et al., QuIP, NeurIPS 2023, arXiv 2307.13304, section 4): rotate a weight matrix by
random orthogonal matrices before it is rounded, so that one scale fits all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from kernels.orthogonal import random_orthogonal
from kernels.packed_rotated import PackedMidRise, PackedRotated
from kernels.packing import pack, row_bytes
from methods.base import Stat
from methods.formats.base import Format, Grid
from methods.formats.integer import TINIEST_SCALE, WIDTHS
from methods.rounding.base import Rounded, Rounder, Rounding
from methods.rounding.sweep import dead_inputs

FLOOR = 1e-8  # of the mean: least energy of an input or a column that the rescaling sees


@dataclass(frozen=True)
class MidRise(Format):
    """2^bits points, equally spaced and symmetric around 0, which is none of them; one scale for the matrix.

    Args:
        width: bits of a code, 2 to 8.
        rho: the outermost points are at ±rho times the root mean square of the weights.
    """

    width: int
    rho: float = 2.4

    def __post_init__(self) -> None:
        if self.width not in WIDTHS or not self.rho > 0:
            raise ValueError(f"a grid has 2 to 8 bits and a positive rho, not {self.width} and {self.rho:g}")

    @property
    def name(self) -> str:
        return f"int{self.width}-tensor-{self.rho:g}rms"

    @property
    def bits(self) -> float:
        return self.width

    def fit(self, weight: Tensor) -> MidRiseGrid:
        return MidRiseGrid(self, weight)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return 8 * shape[0] * row_bytes(shape[1], self.width) + 16


class MidRiseGrid(Grid):
    """The step for one weight matrix; fp32 [], a value that fp16 represents."""

    def __init__(self, fmt: MidRise, weight: Tensor) -> None:
        self.format = fmt
        self.group_size = weight.shape[1]
        self.refit(0, weight)

    def refit(self, group: int, weight: Tensor) -> None:
        del group
        step = 2 * self.format.rho * weight.square().mean().sqrt() / (2**self.format.width - 1)
        self.step = step.to(torch.float16).float().clamp(min=TINIEST_SCALE)

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        del start
        top = 2**self.format.width - 1
        return torch.round(weight / self.step + top / 2).clamp_(0, top).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        del start
        return (codes.float() - (2**self.format.width - 1) / 2) * self.step

    def permuted(self, order: Tensor) -> MidRiseGrid:
        del order
        return self

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedMidRise:
        codes = codes if order is None else codes[:, torch.argsort(order)]
        step, shape = self.step.to(torch.float16).view(1), (codes.shape[0], codes.shape[1])
        return PackedMidRise(pack(codes, self.format.width), step, bits=self.format.width, shape=shape)


@dataclass(frozen=True)
class Incoherence(Rounding):
    """Rounds U W D Vᵀ in place of W, and D⁻¹-scaled inputs rotated by V in place of the inputs.

    U and V are random orthogonal matrices, new ones for every weight; the diagonal matrix D balances the energies of
    inputs and columns. What is lost, tr(ΔW H ΔWᵀ), is the same in both coordinates. Not registered: it is a way to
    use another rounding.

    Follows the paper's algorithm 1: the Gram matrix is damped first, then rescaled and rotated. (The official code
    damps twice, after rescaling and again after rotating, by 0.01 each.) It differs in that weights beyond the range
    of the grid are not clamped before rounding: feedback then also makes up for what clamping loses.

    Args:
        rounding: what rounds the rotated matrix; it should not damp again.
        generator: gives the seeds.
        transform: kind of the orthogonal matrices, see `kernels.orthogonal`.
        damping: added to the diagonal, relative to the mean diagonal of inputs that are not always zero.
    """

    rounding: Rounding
    generator: torch.Generator
    transform: str = "kronecker"
    damping: float = 0.01

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def given(self, gram: Tensor | None) -> Rounder:
        if gram is None:
            raise ValueError("incoherence processing needs the Gram matrix of the linear's input, and none was given")
        dead = dead_inputs(gram)
        return partial(self._round, damped(gram, self.damping), dead)

    def _round(self, hessian: Tensor, dead: Tensor, weight: Tensor, fmt: Format) -> Rounded:
        weight = weight.masked_fill(dead, 0)
        seeds = torch.randint(2**62, (2,), generator=self.generator)
        scale = rescaling(weight, hessian)
        left, right = (
            random_orthogonal(self.transform, size, seed).to(weight.device)
            for size, seed in zip(weight.shape, seeds.tolist(), strict=True)
        )
        rotated = left(right(weight / scale.float()).t()).t()  # U W D Vᵀ
        inverse = scale.double()
        gram = right(right(hessian * torch.outer(inverse, inverse)).t())  # V D⁻¹ H D⁻¹ Vᵀ
        inner = self.rounding(rotated, fmt, gram)
        packed = PackedRotated(inner.packed, seeds.to(weight.device), scale, transform=self.transform)
        return Rounded(packed, packed.dequantize())


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram + damping · mean diagonal · I: fp64 [in, in]; the identity if there is no data."""
    hessian = gram.double()
    energy = hessian.diagonal()
    if not energy.any():
        return torch.eye(len(hessian)).to(hessian)
    return hessian + torch.eye(len(hessian)).to(hessian) * (damping * energy[energy != 0].mean())


def rescaling(weight: Tensor, hessian: Tensor) -> Tensor:
    """D⁻¹ = ((WᵀW)ⱼⱼ / Hⱼⱼ)^¼ up to a factor, as it is stored: fp16 [in].

    D minimizes tr(D⁻¹HD⁻¹) · ‖WD‖², to which the paper's bound of the loss is proportional. The geometric mean is 1:
    the factor cancels in the loss, and fp16 represents numbers around 1 well.
    """
    columns, inputs = weight.double().square().sum(0), hessian.diagonal()
    inverse = (_floored(columns) / _floored(inputs)) ** 0.25
    return (inverse / inverse.log().mean().exp()).to(torch.float16)


def _floored(energy: Tensor) -> Tensor:
    return energy.clamp(min=FLOOR * float(energy.mean())).clamp(min=torch.finfo(energy.dtype).tiny)
