"""No quantization: weights kept in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packed import PackedDense
from methods.formats.base import Format, Grid


@dataclass(frozen=True)
class Dense(Format):
    """16-bit floats: the reference row, and the widest candidate of a mixed-precision search.

    bf16 weights keep bf16's exponent range only in bf16, fp32 checkpoints their precision best in fp16; the
    format stores whichever of the two reproduces the matrix more closely.
    """

    @property
    def name(self) -> str:
        return "dense16"

    @property
    def bits(self) -> float:
        return 16

    def fit(self, weight: Tensor) -> DenseGrid:
        return DenseGrid(weight)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return 16 * shape[0] * shape[1]


class DenseGrid(Grid):
    """Codes are the 16-bit floats themselves, in the dtype that loses less."""

    def __init__(self, weight: Tensor) -> None:
        self.group_size = weight.shape[1]
        half, brain = weight.to(torch.float16).float(), weight.to(torch.bfloat16).float()
        closer = (half - weight).abs().nan_to_num(torch.inf).sum() < (brain - weight).abs().sum()
        self.dtype = torch.float16 if closer else torch.bfloat16

    def refit(self, group: int, weight: Tensor) -> None:
        """Nothing to fit."""

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:  # noqa: ARG002
        return weight.to(self.dtype)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:  # noqa: ARG002
        return codes.float()

    def permuted(self, order: Tensor) -> DenseGrid:  # noqa: ARG002
        return self

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedDense:
        return PackedDense(codes if order is None else codes[:, torch.argsort(order)])
