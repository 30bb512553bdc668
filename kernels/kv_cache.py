"""Number formats of cached keys and values.

A row is what one token and head leave in the cache: a vector of `head_dim` numbers. It is encoded by itself into
consecutive bytes, codes first and their scale after them, so that a cache of rows grows, shrinks and is reordered
like one of 16-bit numbers, and what it stores is what its tensor occupies. Keys are encoded as models cache them,
after the rotary embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.minifloat import E4M3
from kernels.packing import pack, row_bytes, unpack

TINIEST_SCALE = 2.0**-24  # smallest positive fp16
TAIL_BYTES = 4  # scale and minimum of a row, each in fp16


class RowFormat(ABC):
    """A way to store rows of `width` numbers."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short and unique, such as `int8`."""

    @abstractmethod
    def row_bytes(self, width: int) -> int:
        """Bytes that a row takes."""

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """Rows [..., width] of any float dtype in storage form: uint8 [..., row_bytes(width)]."""

    @abstractmethod
    def decode(self, stored: Tensor, width: int) -> Tensor:
        """What uint8 [..., row_bytes(width)] stands for: fp32 [..., width]."""


@dataclass(frozen=True)
class AffineRows(RowFormat):
    """Integers from the row's minimum to its maximum: number = minimum + scale · code.

    One scale and minimum, in fp16, for each token and head: what KIVI (Liu et al., ICML 2024, arXiv 2402.02750)
    does to values, in groups as wide as a head. To keys it gives one for each channel and 32 tokens, and leaves the
    latest tokens in 16 bits until such a group is complete; here keys are treated as values are.

    Args:
        bits: of a code, 1 to 8.
    """

    bits: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def row_bytes(self, width: int) -> int:
        return row_bytes(width, self.bits) + TAIL_BYTES

    def encode(self, rows: Tensor) -> Tensor:
        values, top = rows.float(), 2**self.bits - 1
        low = values.amin(-1, keepdim=True).to(torch.float16)
        span = values.amax(-1, keepdim=True) - low.float()
        scale = (span / top).clamp(min=TINIEST_SCALE).to(torch.float16)
        codes = torch.round((values - low.float()) / scale.float()).clamp_(0, top)
        tail = torch.cat([scale, low], dim=-1).view(torch.uint8)
        return torch.cat([_pack_rows(codes, self.bits), tail], dim=-1)

    def decode(self, stored: Tensor, width: int) -> Tensor:
        tail = stored[..., -TAIL_BYTES:].clone(memory_format=torch.contiguous_format)  # views need aligned storage
        scale, low = tail.view(torch.float16).float().split(1, dim=-1)
        return _unpack_rows(stored[..., :-TAIL_BYTES], self.bits, width) * scale + low


@dataclass(frozen=True)
class Float8Rows(RowFormat):
    """E4M3 under a scale of 1, and saturating at 448: vLLM's `kv_cache_dtype=fp8` without calibrated scales. A
    scale would only move the range: the relative precision of a float is the same everywhere in it.
    """

    @property
    def name(self) -> str:
        return "fp8"

    def row_bytes(self, width: int) -> int:
        return width

    def encode(self, rows: Tensor) -> Tensor:
        return E4M3.encode(rows.float().contiguous())

    def decode(self, stored: Tensor, width: int) -> Tensor:
        del width
        return E4M3.decode(stored)


ROW_FORMATS: dict[str, RowFormat] = {fmt.name: fmt for fmt in (*map(AffineRows, range(2, 9)), Float8Rows())}
"""By the names that users type as `method.kv_cache`."""


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[..., width] to uint8 [..., packed bytes]."""
    return pack(codes.flatten(0, -2), bits).unflatten(0, codes.shape[:-1])


def _unpack_rows(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `_pack_rows`: uint8 [..., width]."""
    return unpack(packed.flatten(0, -2), bits, width).unflatten(0, packed.shape[:-1])
