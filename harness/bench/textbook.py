"""GPTQ as its paper writes it (Frantar et al., ICLR 2023, Algorithm 1): the clock that our form is held against.

The Gram matrix is inverted through its Cholesky factor, the inverse factored again, and the weights to the right of
each block of columns updated at once. Each linear factors on its own, whether or not it shares its input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.integer import Integer

BLOCK = 128


def textbook_gptq(weight: Tensor, gram: Tensor, fmt: Integer, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [out, in], and the weights they stand for, fp32 [out, in].

    Scales of a group are fitted to the weights as compensated so far, as ours are.
    """
    current, columns = weight.clone(), weight.shape[1]
    factor = _inverse_factor(gram, damping)
    grid = fmt.fit(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    rounded = torch.empty_like(weight)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(len(weight), stop - start)
        for i in range(start, stop):
            if i % grid.group_size == 0:
                grid.refit(i // grid.group_size, current[:, i : i + grid.group_size])
            codes[:, i : i + 1] = grid.encode(current[:, i : i + 1], i)
            rounded[:, i : i + 1] = grid.decode(codes[:, i : i + 1], i)
            error = (current[:, i] - rounded[:, i]) / factor[i, i]
            current[:, i:stop] -= error.unsqueeze(1) * factor[i, i:stop].unsqueeze(0)
            errors[:, i - start] = error
        current[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, rounded


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with UᵀU = (gram + damping · mean diagonal · I)⁻¹."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
