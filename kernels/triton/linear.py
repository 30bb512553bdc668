"""The kernels of this package as one: what a table of kernels calls.

What a kernel reads is prepared at a matrix's first product and kept as long as the matrix, beside it.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.linear import Inputs
from kernels.packed import Packed
from kernels.triton import codebook, dense_and_sparse, eight_bit, float4, weight_only
from kernels.triton.launch import unfit

SIXTEEN_BITS = (weight_only, codebook, float4, dense_and_sparse)
_prepared: WeakKeyDictionary[Packed, dict[tuple[str, torch.device], Any]] = WeakKeyDictionary()


def refuses(packed: Packed, x: Tensor, inputs: Inputs | None = None) -> str | None:
    """None if `multiply` can take these, else why not."""
    found = _module(packed, x, inputs)
    return found if isinstance(found, str) else None


def multiply(packed: Packed, x: Tensor, bias: Tensor | None = None, inputs: Inputs | None = None) -> Tensor:
    """x [..., in], rounded by `inputs`, times the transposed matrix, plus bias [out]: [..., out] in the dtype of x.

    Raises:
        ValueError: no kernel takes the matrix, or such inputs.
    """
    module = _module(packed, x, inputs)
    if isinstance(module, str):
        raise ValueError(f"no Triton kernel multiplies with this {type(packed).__name__}: {module}")
    if module is not eight_bit and inputs is not None:
        x = inputs(x)
    forms = _prepared.setdefault(packed, {})
    place = (module.__name__, x.device)
    if place not in forms:
        forms[place] = module.prepare(packed)
    y: Tensor = module.multiply(forms[place], x, bias)
    return y


def _module(packed: Packed, x: Tensor, inputs: Inputs | None) -> Any:
    """The module for these, or why there is none."""
    if reason := unfit(x.device):
        return reason
    if not x.shape[:-1].numel():
        return "there are no tokens"
    if inputs is not None and eight_bit.supports(packed, x, inputs) is None:
        return eight_bit
    reasons = [module.supports(packed, x) for module in SIXTEEN_BITS]
    return next(
        (module for module, reason in zip(SIXTEEN_BITS, reasons, strict=True) if reason is None),
        "; ".join(dict.fromkeys(reason for reason in reasons if reason)),
    )
