"""How codes lie in the 16-bit words that the kernels read.

A block of columns is cut into slabs of neighbouring columns, and column w of every slab lies in word w of the block:
one masked read of a tile of words is a tile of one slab's codes, in the order of the columns.

Codes of 2, 4 and 8 bits fill a word. Slab j begins at bit (j // 2) · bits + 8 · (j % 2), so that every second slab
comes out of the low byte without a shift, below the ten bits of an fp16 fraction. Of 3 bits a word holds five codes,
and three words hold sixteen: slab j begins at bit 3 · (j % 5) of word j // 5, and bit i of the last slab is the top
bit of word i. So every width takes exactly its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128  # matrices are padded to a multiple of this many rows, so that no tile of weights needs a mask


def slab(bits: int, block: int) -> int:
    """Columns of a slab."""
    return block * (1 if bits == 3 else bits) // 16


def words(codes: Tensor, bits: int, block: int) -> Tensor:
    """Codes uint8 [rows, columns] as int16 [rows up to a multiple, blocks · block · bits / 16].

    Args:
        block: columns of a block.
    """
    codes = F.pad(codes, (0, -codes.shape[1] % block, 0, -codes.shape[0] % ROWS))
    slabs = codes.unflatten(1, (-1, block // slab(bits, block), slab(bits, block))).int()  # [rows, blocks, slab, word]
    packed = _triples(slabs) if bits == 3 else _fields(slabs, bits)
    return torch.where(packed >= 2**15, packed - 2**16, packed).short().flatten(1).contiguous()


def pairs(scale: Tensor, zero: Tensor, groups: int) -> Tensor:
    """fp16 scales in the low half and fp16 zeros in the high half of int32: [rows, ≤ groups] to [groups, rows padded].

    Four bytes are the least that a GPU copies to shared memory in advance.
    """
    both = torch.stack([scale.half(), zero.half()], dim=-1).view(torch.int32).squeeze(-1)
    return F.pad(both, (0, groups - both.shape[1], 0, -both.shape[0] % ROWS)).t().contiguous()


def _fields(slabs: Tensor, bits: int) -> Tensor:
    start = torch.tensor([j // 2 * bits + 8 * (j % 2) for j in range(slabs.shape[2])], device=slabs.device)
    return (slabs << start[:, None]).sum(2)


def _triples(slabs: Tensor) -> Tensor:
    start = 3 * torch.arange(5, device=slabs.device)
    fives = (slabs[:, :, :15].unflatten(2, (3, 5)) << start[:, None]).sum(3)  # [rows, blocks, 3, word]
    top = slabs[:, :, 15:] >> torch.arange(3, device=slabs.device)[:, None] & 1
    return fives | top << 15
