"""Low-rank compensation: what rounding leaves over, as the product of two thin matrices.

LoRC (Yao et al., ZeroQuant-V2, arXiv 2303.08302) takes the truncated SVD of the residual, U Σ V ≈ W − Ŵ, and stores
the factors U Σ^½ and Σ^½ V in 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packed_sum import PackedLowRank
from methods.formats.dense import Dense
from methods.formats.integer import Integer
from methods.rounding.nearest import round_to_nearest

DENSE = Dense()


def low_rank(residual: Tensor, rank: int, width: int = 8) -> PackedLowRank:
    """The product of rank `rank` that is nearest to `residual`, with packed factors.

    Args:
        residual: fp32 [out, in], usually the weights less what their codes stand for.
        rank: 1 or more; what exceeds min(out, in) would add nothing, and is not stored.
        width: bits of the factors, as in `packed_product`.
    """
    return packed_product(*factors(residual, rank), width)


def factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U Σ^½ [out, rank] and Σ^½ V [rank, in] of the truncated SVD of `residual`, fp32 [out, in].

    U consists of eigenvectors of the smaller Gram matrix, which takes a fraction of the time of an SVD and squares
    the singular values; hence fp64. Σ V is the projection Uᵀ · residual, and a full rank gives the residual back
    however close its singular values are.

    Raises:
        ValueError: the rank is not positive.
        FloatingPointError: the residual is not finite.
    """
    if rank < 1:
        raise ValueError(f"a low-rank correction needs a rank of 1 or more, not {rank}")
    if not residual.isfinite().all():
        raise FloatingPointError("a residual that is not finite has no low-rank approximation")
    if residual.shape[0] > residual.shape[1]:
        right, left = factors(residual.T, rank)
        return left.T, right.T
    exact = residual.double()
    _, vectors = torch.linalg.eigh(exact @ exact.T)  # by increasing eigenvalue
    basis = vectors[:, -rank:].flip(1)  # [out, rank], the largest singular value first
    projection = basis.T @ exact  # [rank, in]
    root = projection.norm(dim=1).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0)
    return (basis * root).float(), (projection * inverse[:, None]).float()


def packed_product(left: Tensor, right: Tensor, width: int = 8) -> PackedLowRank:
    """left · right with each factor rounded to nearest.

    Args:
        left: fp32 [out, rank].
        right: fp32 [rank, in].
        width: 2 to 8 for symmetric integers with a scale for each row of a factor, 16 for floats.
    """
    fmt = DENSE if width == DENSE.bits else Integer(width, symmetric=True)
    return PackedLowRank(round_to_nearest(left, fmt).packed, round_to_nearest(right, fmt).packed)
