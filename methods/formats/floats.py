"""Floating-point formats: FP8 per output channel, the OCP MX formats, NVFP4.

Sources: FP8, Micikevicius et al. (arXiv 2209.05433); MX, OCP Microscaling Formats (MX) Specification v1.0,
sections 5 and 6.3, and Rouhani et al. (arXiv 2310.10537); NVFP4, NVIDIA, Pretraining Large Language Models with
NVFP4 (arXiv 2509.25149), appendix on quantization.

All round to nearest, ties to even, and saturate. Other tools differ: the default of Microsoft's microxcaling
rounds ties away from zero, and NVIDIA's ModelOpt those of E2M1 toward zero where it exports packed codes (not where it
calibrates).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, MX_INT8, Code, Element
from kernels.packed_float import PackedFloat, decoded_scale
from kernels.packing import pack, row_bytes
from methods.formats.base import BlockGrid, Format
from methods.formats.integer import TINIEST_SCALE

FP8_NAMES: dict[Element, str] = {E4M3: "fp8", E5M2: "fp8-e5m2"}
MX_NAMES: dict[Element, str] = {
    E2M1: "mxfp4",
    E3M2: "mxfp6-e3m2",
    E2M3: "mxfp6-e2m3",
    E4M3: "mxfp8",
    E5M2: "mxfp8-e5m2",
    MX_INT8: "mxint8",
}


class ScaledFloat(Format):
    """Elements of a small number format, with one stored scale per block of a row."""

    element: Element
    block: int
    """Columns that share a scale; 0 means the whole row."""
    scale_code: Code | None
    """The number format of the block scales; None means fp16."""

    @property
    def bits(self) -> float:
        return self.element.bits

    def fit(self, weight: Tensor) -> FloatGrid:
        return FloatGrid(self, weight)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        blocks = out * -(-columns // self.columns_per_group(columns))
        scale_bits = 16 if self.scale_code is None else self.scale_code.bits
        return 8 * out * row_bytes(columns, self.element.bits) + scale_bits * blocks

    def columns_per_group(self, columns: int) -> int:
        """The group size in a matrix of so many columns."""
        return min(self.block or columns, columns)

    def tensor_scale(self, weight: Tensor) -> Tensor | None:
        """The scale of the whole matrix [out, in], fp32 [], or None if the format has none."""
        del weight
        return None

    @abstractmethod
    def block_scale(self, largest: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """The scales, as stored, of blocks with the magnitudes `largest`, fp32 of any shape, at most."""


@dataclass(frozen=True)
class FP8(ScaledFloat):
    """One scale per output channel, max|w| over the largest element, stored in fp16.

    Scales are rounded up to fp16: below 2**-14 fp16 is so coarse that a scale rounded down could cut off the
    largest weights.
    """

    element: Element = E4M3

    block = 0
    scale_code = None

    def __post_init__(self) -> None:
        _require(self.element, FP8_NAMES, "FP8")

    @property
    def name(self) -> str:
        return FP8_NAMES[self.element]

    def block_scale(self, largest: Tensor, tensor_scale: Tensor | None) -> Tensor:
        del tensor_scale
        exact = (largest / self.element.max).clamp(min=TINIEST_SCALE)
        nearest = exact.to(torch.float16)
        too_small = nearest.float() < exact
        return (nearest.view(torch.int16) + too_small).view(torch.float16)  # positive floats are ordered as integers


@dataclass(frozen=True)
class MX(ScaledFloat):
    """Blocks of 32 with a shared power of two, in E8M0.

    With e the exponent of the largest power of two among the elements, the specification's scale is
    2**(floor(log2 max|w|) − e): the largest weight keeps its leading bit, but saturates if it exceeds the largest
    element times the scale (for E2M1, above 6 of 8).

    Args:
        element: E2M1, E3M2, E2M3, E4M3, E5M2 or INT8.
        ceil: the smallest power of two with which nothing saturates instead, 2**ceil(log2(max|w| / max element)),
            as in NVIDIA's ModelOpt.
    """

    element: Element = E2M1
    ceil: bool = False

    block = 32
    scale_code = E8M0

    def __post_init__(self) -> None:
        _require(self.element, MX_NAMES, "MX")

    @property
    def name(self) -> str:
        return f"{MX_NAMES[self.element]}{'-ceil' if self.ceil else ''}"

    def block_scale(self, largest: Tensor, tensor_scale: Tensor | None) -> Tensor:
        del tensor_scale
        top_fraction, top_exponent = math.frexp(self.element.max)
        fraction, exponent = torch.frexp(largest)  # of an all-zero block: 0, as good as any
        exponent = exponent - top_exponent
        if self.ceil:
            exponent += fraction > top_fraction
        return E8M0.encode(exponent)


@dataclass(frozen=True)
class NVFP4(ScaledFloat):
    """E2M1 in blocks of 16 with E4M3 scales, under one fp32 scale for the matrix.

    The tensor scale, max|W| / (448 · 6), is such that the block with the largest weight has the largest E4M3
    number as its scale. Elements are encoded with the block scale as rounded to E4M3. A block scale that would
    round to zero becomes the smallest positive one; that of an all-zero block is 1.

    The tensor scale is fixed when the grid is fitted. A block that is refitted to weights larger than any in the
    matrix gets the largest scale, and these weights saturate.
    """

    element = E2M1
    block = 16
    scale_code = E4M3

    @property
    def name(self) -> str:
        return "nvfp4"

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return super().stored_bits(shape) + 32

    def tensor_scale(self, weight: Tensor) -> Tensor:
        largest = weight.abs().amax()
        return torch.where(largest == 0, 1.0, largest / (E4M3.max * E2M1.max))

    def block_scale(self, largest: Tensor, tensor_scale: Tensor | None) -> Tensor:
        assert tensor_scale is not None
        ratio = (largest / (E2M1.max * tensor_scale)).clamp(min=E4M3.smallest)
        return E4M3.encode(torch.where(largest == 0, 1.0, ratio))


class FloatGrid(BlockGrid):
    """Scales of one weight matrix, as stored and as the fp32 factors [out, groups] they stand for."""

    format: ScaledFloat

    def __init__(self, fmt: ScaledFloat, weight: Tensor) -> None:
        self.format = fmt
        columns = weight.shape[1]
        self.group_size = fmt.columns_per_group(columns)
        self.group = torch.arange(columns, device=weight.device) // self.group_size  # int64 [in]
        self.tensor_scale = fmt.tensor_scale(weight)
        padded = F.pad(weight.abs(), (0, -columns % self.group_size))
        self.stored, self.scale = self._fitted(padded.unflatten(1, (-1, self.group_size)).amax(-1))

    def refit(self, group: int, weight: Tensor) -> None:
        self.stored[:, group], self.scale[:, group] = self._fitted(weight.abs().amax(1))

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        return self.format.element.encode(weight / self._columns(start, weight.shape[1]))

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        return self.format.element.decode(codes) * self._columns(start, codes.shape[1])

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedFloat:
        codes = self.in_matrix_order(codes, order)
        return PackedFloat(
            pack(codes, self.format.element.bits),
            self.stored,
            self.tensor_scale,
            element=self.format.element,
            scale_code=self.format.scale_code,
            shape=(codes.shape[0], codes.shape[1]),
            group_size=self.group_size,
        )

    def _fitted(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """The scales of blocks with these largest magnitudes, as stored and as fp32 factors."""
        stored = self.format.block_scale(largest, self.tensor_scale)
        scale = decoded_scale(stored, self.format.scale_code, self.tensor_scale)
        if not (largest.isfinite() & scale.isfinite()).all():
            raise FloatingPointError(
                f"{self.format.name} cannot scale weights up to {largest.max():g}; check where they overflowed"
            )
        return stored, scale

    def _columns(self, start: int, count: int) -> Tensor:
        """The scale of each of `count` columns: [out, count]."""
        return self.scale[:, self.group[start : start + count]]


def _require(element: Element, names: dict[Element, str], kind: str) -> None:
    if element not in names:
        raise ValueError(f"{kind} has no elements {element.name}; take one of {', '.join(e.name for e in names)}")
