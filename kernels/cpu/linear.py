"""y = x · Ŵᵀ with integers as weights, by the compiled library.

Inputs that are rounded to integers of up to 8 bits are multiplied as integers: sums over a group (over half a block of
128, or a whole one) are exact, what remains is fp32 arithmetic of scales. Other inputs enter as bf16 terms, one for
bf16, two for fp16, which are exact, and two for fp32, which leave a relative error of 2**-16 at most; codes are exact
in bf16, and sums are fp32. With many tokens the matrix is dequantized, some rows at a time, for torch to multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import InputRounding, StaticScale, TensorScale, TokenScale
from kernels.cpu.library import load
from kernels.minifloat import FixedPoint
from kernels.packed import Packed, PackedInteger
from kernels.packed_affine import PackedAffine

if TYPE_CHECKING:  # the layer imports the choice of kernels, and so this
    from kernels.linear import Inputs

WIDEST = 2**31 // (255 * 127)
"""Columns that a sum in int32 is sure to hold."""
CHUNK = 2**22
"""Bytes of dequantized rows that torch multiplies at once: they should still be in the cache."""


def rounds_to_integers(inputs: Inputs | None) -> bool:
    """Whether inputs become integers of at most 8 bits with one scale a token."""
    if type(inputs) not in (TokenScale, TensorScale, StaticScale):
        return False
    assert isinstance(inputs, InputRounding)
    element = inputs.element
    return isinstance(element, FixedPoint) and element.fraction_bits == 0 and 2 <= element.bits <= 8


def refuses(packed: Packed) -> str | None:
    """Why the kernels cannot multiply with the matrix; None if they can."""
    if type(packed) not in (PackedInteger, PackedAffine):
        return f"{type(packed).__name__} is not a matrix of integers"
    assert isinstance(packed, PackedInteger)
    buffers = list(packed.buffers())
    if any(buffer.device.type != "cpu" or not buffer.is_contiguous() for buffer in buffers):
        return "buffers are not contiguous in the memory of the CPU"
    if packed.group_index is not None:
        return "the columns of a group are not neighbours"
    if packed.scale.dtype != torch.float16:
        return f"scales are {packed.scale.dtype}, not fp16"
    if packed.shape[1] > WIDEST:
        return f"rows are longer than {WIDEST} columns"
    return None if load() is not None else "the library cannot be built"


def multiply(packed: PackedInteger, x: Tensor, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
    """The product from codes: [..., in] to [..., out], in the dtype of x."""
    library = load()
    assert library is not None
    largest, step = 0, None
    if rounds_to_integers(inputs):
        assert isinstance(inputs, InputRounding)
        largest = int(inputs.element.max)
        if type(inputs) is not TokenScale:
            step = inputs.scale(x.float()).float().expand(x.shape[:-1].numel()).contiguous()
    elif inputs is not None:
        x = inputs(x)
    tokens = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    y = library.multiply(packed, tokens.contiguous(), step, largest)
    return _finished(y, x, bias)


def multiply_dequantized(packed: PackedInteger, x: Tensor, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
    """The product with rows dequantized to bf16 for inputs in bf16, else to fp32, which torch multiplies."""
    library = load()
    assert library is not None
    if inputs is not None:
        x = inputs(x)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    tokens = (x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)).to(dtype)
    rows, columns = packed.shape
    size = max(1, CHUNK // (columns * dtype.itemsize))
    weight = torch.empty(min(size, rows), columns, dtype=dtype)
    y = torch.empty(len(tokens), rows, dtype=dtype)
    for first in range(0, rows, size):
        last = min(first + size, rows)
        part = weight[: last - first]
        library.dequantize(packed, first, last, part)
        y[:, first:last] = F.linear(tokens, part)
    return _finished(y, x, bias)


def _finished(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """In the shape and the dtype of the input, with the bias."""
    if bias is not None:
        y = y + bias
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    return y.view(*x.shape[:-1], y.shape[1])
