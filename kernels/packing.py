"""Dense packing of 1- to 8-bit codes into bytes.

A b-bit code is stored as planes of 8, 4, 2 or 1 bits (3 = 2 + 1), so that every width packs to exactly b bits a
code and no code straddles a byte. Inside a plane each block of 128 codes is laid out *planar*: with F = 8/width
fields a byte and R bytes a block, code k = f·R + r sits in field f of byte r. Unpacking a field is then one shift
and one mask over consecutive bytes that yields consecutive codes, the layout that SIMD and tensor-core kernels
want. A row's last, shorter block is planar too and padded to whole bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def row_bytes(columns: int, bits: int) -> int:
    """Bytes that one packed row of `columns` codes takes."""
    return sum(columns // BLOCK * BLOCK * w // 8 + -(-(columns % BLOCK) * w // 8) for w in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes in [0, 2**bits): [rows, columns] to uint8 [rows, row_bytes(columns, bits)]."""
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"codes must lie in [0, {2**bits - 1}] to be packed in {bits} bits")
    codes = codes.to(torch.uint8)
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, row_bytes(columns, bits)] to uint8 codes [rows, columns]."""
    codes = torch.zeros(packed.shape[0], columns, dtype=torch.uint8, device=packed.device)
    start, shift = 0, 0
    for width in PLANES[bits]:
        stop = start + row_bytes(columns, width)
        codes |= _unpack_plane(packed[:, start:stop], width, columns) << shift
        start, shift = stop, shift + width
    return codes


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    body, tail = _split(codes, BLOCK)
    return torch.cat([_to_bytes(body, width).flatten(1), _to_bytes(tail, width)], dim=1)


def _unpack_plane(packed: Tensor, width: int, columns: int) -> Tensor:
    if width == 8:
        return packed
    body, tail = _split(packed, BLOCK * width // 8)
    codes = torch.cat([_from_bytes(body, width).flatten(1), _from_bytes(tail, width)], dim=1)
    return codes[:, :columns]


def _split(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Whole blocks as [rows, blocks, block], and the rest as [rows, < block]."""
    whole = rows.shape[1] // block * block
    return rows[:, :whole].unflatten(1, (-1, block)) if whole else rows[:, :0, None], rows[:, whole:]


def _to_bytes(codes: Tensor, width: int) -> Tensor:
    fields = 8 // width
    codes = F.pad(codes, (0, -codes.shape[-1] % fields))
    planar = codes.reshape(*codes.shape[:-1], fields, codes.shape[-1] // fields)
    return (planar << _shifts(width, codes.device)).sum(-2, dtype=torch.uint8)


def _from_bytes(packed: Tensor, width: int) -> Tensor:
    return ((packed.unsqueeze(-2) >> _shifts(width, packed.device)) & (2**width - 1)).flatten(-2)


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device).unsqueeze(-1)
