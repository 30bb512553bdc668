"""What GPTQ and LDLQ do with one layer's Hessian, on random problems."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.claims.checks.base import ALL_EQUAL, check, fact
from harness.claims.evidence import Evidence
from harness.claims.verdicts import Case
from methods.formats.integer import Integer
from methods.rounding.gptq import GPTQRounding
from methods.rounding.ldlq import LDLQ

ROWS, PART, COLUMNS = 96, 8, 160
PROBLEMS = 3
FORMAT = Integer(3, group_size=0)
EQUAL = "share of equal codes"
SAME_HESSIAN = f"{PROBLEMS} problems of {ROWS} × {COLUMNS} weights in 3 bits, one Gram matrix each"


@check("row_permutation", ALL_EQUAL)
def row_permutation(evidence: Evidence) -> list[Case]:
    """C15: whether a row's codes depend on its place or on other rows. All rows share the layer's XᵀX, which knows no
    row: with its factor given once, rows may be permuted, or rounded alone."""
    del evidence
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    permuted, apart = [], []
    for weight, gram in _problems():
        rounder = GPTQRounding().given(gram)
        together = rounder(weight, FORMAT).weight
        permuted.append(_equal(rounder(weight[order], FORMAT).weight, together[order]))
        apart.append(_equal(torch.cat([rounder(rows, FORMAT).weight for rows in weight.split(PART)]), together))
    return [
        fact("rows permuted", sum(permuted) / PROBLEMS, EQUAL, SAME_HESSIAN),
        fact(f"{PART} rows at a time", sum(apart) / PROBLEMS, EQUAL, SAME_HESSIAN),
    ]


@check("ldlq_is_gptq", ALL_EQUAL)
def ldlq_is_gptq(evidence: Evidence) -> list[Case]:
    """C18: LDLQ of QuIP (Chee et al., NeurIPS 2023, theorem 6) is GPTQ: on a fixed grid, from the last column to the
    first as its code goes, it gives the codes of GPTQ as Frantar et al. write it, on reversed columns.

    The form here inverts the Hessian, as their Algorithm 1 does; `methods.rounding.ldlq` factors it as LDLᵀ instead.
    """
    del evidence
    shares = [
        _equal(LDLQ()(weight, FORMAT, gram).weight, _by_inverse(weight.flip(1), gram.flip(0, 1)).flip(1))
        for weight, gram in _problems()
    ]
    return [fact("LDLQ and GPTQ", sum(shares) / PROBLEMS, EQUAL, SAME_HESSIAN)]


def _problems() -> list[tuple[Tensor, Tensor]]:
    """Weights [rows, columns] and Gram matrices of correlated inputs, in fp32."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(PROBLEMS):
        mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
        inputs = torch.randn(4 * COLUMNS, COLUMNS, generator=generator) @ mixing
        weight = torch.randn(ROWS, COLUMNS, generator=generator)
        found.append((weight, inputs.T @ inputs / len(inputs)))
    return found


def _by_inverse(weight: Tensor, gram: Tensor, damping: float = 0.01) -> Tensor:
    """Algorithm 1 of GPTQ (ICLR 2023), one column at a time, in fp64: the rounded weights [rows, columns]."""
    weight, gram = weight.double(), gram.double()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    grid, current, rounded = FORMAT.fit(weight), weight.clone(), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        column = slice(i, i + 1)
        rounded[:, column] = grid.decode(grid.encode(current[:, column], i), i)
        current[:, i:] -= (current[:, column] - rounded[:, column]) / factor[i, i] * factor[i, i:]
    return rounded


def _equal(first: Tensor, second: Tensor) -> float:
    """The share of weights at the same grid point, which is the same code where rows have one grid."""
    return float(torch.isclose(first.double(), second.double(), rtol=1e-5, atol=1e-9).double().mean())
