"""NNCF's LoRA correction (openvinotoolkit/nncf, weight compression, `lora_correction.py`): two thin INT8 matrices
whose product makes up for what rounding a linear cost.

With R = W − Q(W) the product LA minimizes ‖LA − R‖² + Σ ‖(LA − R) x‖², where the sum is over samples of the input;
the first term keeps the second from fitting the samples alone. NNCF starts at a singular value decomposition of R
weighted by the magnitudes of the inputs, and alternates three times between the best L for A and the best A for L.
Its limit is known: with I + Σ x xᵀ = C Cᵀ the sum of both terms is ‖(LA − R) C‖², and the best product of a rank is
the truncated singular value decomposition of R C, times C⁻¹ (Eckart and Young). That is what is computed here.

NNCF's samples are the mean inputs of up to 128 sequences. Here each of so many sequences counts with the mean of x xᵀ
over its tokens, which also holds how inputs vary within a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.packed_sum import PackedLowRank, PackedSum
from methods.formats.base import Format, Grid
from methods.formats.integer import Integer
from methods.rounding.nearest import round_to_nearest

ADAPTER = Integer(8)
"""Of both matrices: asymmetric, with a scale and a zero point for each of their rows."""
MOST_SAMPLES = 128


@dataclass(frozen=True)
class Corrected(Format):
    """A format with a low-rank correction beside the codes: what it stores, for a budget to count.

    Args:
        base: the codes'.
        rank: of the correction; of a matrix with fewer rows or columns, their number.
    """

    base: Format
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"a correction of rank {self.rank} corrects nothing; take at least 1")

    @property
    def name(self) -> str:
        return f"{self.base.name}-lora{self.rank}"

    @property
    def bits(self) -> float:
        return self.base.bits

    def fit(self, weight: Tensor) -> Grid:
        return self.base.fit(weight)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        rank = min(self.rank, *shape)
        adapters = ADAPTER.stored_bits((shape[0], rank)) + ADAPTER.stored_bits((rank, shape[1]))
        return self.base.stored_bits(shape) + adapters


def corrected(packed: Packed, weight: Tensor, gram: Tensor, samples: int, rank: int) -> PackedSum:
    """`packed` with a correction towards `weight` [out, in] beside it; see `low_rank_factors`."""
    factors = low_rank_factors(weight - packed.dequantize(), gram, samples, rank)
    left, right = (round_to_nearest(factor, ADAPTER).packed for factor in factors)
    return PackedSum(packed, PackedLowRank(left, right))


def low_rank_factors(residual: Tensor, gram: Tensor, samples: int, rank: int) -> tuple[Tensor, Tensor]:
    """L [out, rank] and A [rank, in] of the best product, as the docstring of this module has it.

    The columns of L are orthonormal, so that in both matrices a direction's rounding error is proportional to what
    the direction corrects.

    Args:
        residual: R [out, in].
        gram: mean over tokens of x xᵀ, [in, in].
        samples: how often `gram` counts beside the first term, at most 128 times.

    Raises:
        FloatingPointError: `gram` is not finite.
    """
    if not gram.isfinite().all():
        raise FloatingPointError("a Gram matrix is not finite: activations overflow; run the model in fp32")
    metric = min(samples, MOST_SAMPLES) * gram.double()
    metric.diagonal().add_(1)
    lower = torch.linalg.cholesky(metric).float()
    left, values, right = torch.linalg.svd(residual @ lower, full_matrices=False)
    weighted = values[:rank, None] * right[:rank]
    return left[:, :rank], torch.linalg.solve_triangular(lower, weighted, upper=False, left=False)
