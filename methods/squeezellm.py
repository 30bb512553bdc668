"""SqueezeLLM (Kim et al., ICML 2024, arXiv 2306.07629)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.packed_sum import PackedSparse, PackedSum
from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.budget import Budget
from methods.formats.codebook import Codebook
from methods.network import Network
from methods.sensitivity.base import Subject
from methods.sensitivity.fisher import fisher_diagonals

STEPS = 2**10  # of outlyingness, per doubling
LEVELS = 128 * STEPS + 1  # fp32 ends below 2^128
FULL_WIDTH = 16  # bits of a weight that is not quantized


@register("squeezellm")
@dataclass(frozen=True)
class SqueezeLLM(UniformMethod):
    """Codebooks by k-means weighted with the diagonal of the Fisher information (section 4.1), and the largest and
    the most sensitive weights kept in a sparse matrix (section 4.2).

    A budget's group size and symmetry say nothing about codebooks, of which every output channel has one.

    Args:
        outliers: share of the network's weights to keep for their size, by a bound in interquartile ranges that all
            linears have in common. The official code has users try bounds until the share comes out; this finds it.
        sensitive: share of each linear's weights to keep for their Fisher information.
        sequences, context: of the calibration text, for the Fisher information.
    """

    outliers: float = 0.004
    sensitive: float = 0.0005
    sequences: int = 100
    context: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.outliers <= 1 or not 0 <= self.sensitive <= 1:
            raise ValueError(
                f"outliers={self.outliers} and sensitive={self.sensitive} are shares of the weights, from 0 to 1"
            )

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is not None:
            return reason
        fmt = Codebook(budget.format().width)
        stored = sum(fmt.stored_bits(shape) for shape in network.shapes) / sum(out * n for out, n in network.shapes)
        if stored < FULL_WIDTH:
            return None
        return f"a table of {2**fmt.width} entries for every row stores {stored:.1f} bits a weight: rows are too short"

    @property
    def parts(self) -> Parts:
        return Parts("codebook + sparse" if self.outliers or self.sensitive else "codebook")

    def quantize(self, ctx: Context) -> Quantized:
        fmt = Codebook(ctx.budget.format().width)
        fisher = self._fisher(ctx)
        bound = outlier_bound(ctx.network, self.outliers)
        packed = {}
        for name in ctx.track(ctx.network.linears, "clustering"):
            weight = ctx.network.weight(name)
            importance = fisher[name].to(weight.device)
            kept = (outlyingness(weight) >= bound) | most_sensitive(importance, self.sensitive)
            packed[name] = dense_and_sparse(weight, importance, kept, fmt)
            ctx.network.overwrite(name, packed[name].dequantize())
        return Quantized(packed)

    def _fisher(self, ctx: Context) -> dict[str, Tensor]:
        """The diagonals on the calibration text, fp32 [out, in]."""

        def memo(name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            # Others ask for the same on the scoring text.
            return ctx.memo(name, {**options, "text": "calibration"}, compute)

        subject = Subject(ctx.network, ctx.tokens, ctx.tokens, (), ctx.statistics, memo=memo, meter=ctx.meter)
        return fisher_diagonals(subject, self.sequences, self.context)[0]


def dense_and_sparse(weight: Tensor, importance: Tensor, kept: Tensor, fmt: Codebook) -> Packed:
    """`weight` [out, in] as codes, and for the entries in `kept`, bool [out, in], what the codes miss, in fp16.

    Entries that are kept have no say in the codebooks.
    """
    grid = fmt.fit(weight, importance.masked_fill(kept, 0))
    codes = grid.encode(weight)
    dense = grid.pack(codes)
    return PackedSum(dense, PackedSparse.of(weight - grid.decode(codes), kept)) if kept.any() else dense


def most_sensitive(importance: Tensor, share: float) -> Tensor:
    """The entries with the most importance, at most `share` of all, and none of no importance: bool [out, in]."""
    flat = importance.flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(int(share * flat.numel())).indices] = True
    return (chosen & (flat > 0)).view(importance.shape)


def outlyingness(weight: Tensor) -> Tensor:
    """How far out each weight lies, as a whole number: int32 [out, in].

    With the quartiles Q₁ and Q₃, the official code's bound of r interquartile ranges is
    |w| ≥ max(|Q₁ − r(Q₃ − Q₁)|, |Q₃ + r(Q₃ − Q₁)|) = |Q₁ + Q₃|/2 + (r + ½)(Q₃ − Q₁). A weight that reaches just the
    bound r lies log₂(1 + r) out, in steps of 1/1024; one that reaches none, 0, as do all weights of a matrix of which
    half are equal.
    """
    flat = weight.flatten()
    lower, upper = (flat.kthvalue(-(-quarter * flat.numel() // 4)).values for quarter in (1, 3))
    if lower == upper:
        return torch.zeros_like(weight, dtype=torch.int32)
    ranges = (weight.abs() - (lower + upper).abs() / 2) / (upper - lower) - 0.5
    return (STEPS * torch.log2(1 + ranges.clamp(0, torch.finfo(ranges.dtype).max))).int()


def outlier_bound(network: Network, share: float) -> int:
    """The least bound on `outlyingness` that at most `share` of the network's weights reach."""
    counts = torch.zeros(LEVELS, dtype=torch.int64)
    for name in network.linears:
        counts += torch.bincount(outlyingness(network.weight(name)).flatten(), minlength=LEVELS).cpu()
    reaching = counts.flip(0).cumsum(0).flip(0)  # [levels]
    return int((reaching > share * counts.sum()).sum())
