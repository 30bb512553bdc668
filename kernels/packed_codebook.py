"""Codes that look their weights up in a small table of their row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.packing import unpack


class PackedCodebook(Packed):
    """Codes of `bits` bits: a weight is the entry of its row's codebook that its code names.

    Args:
        codes: uint8 [out, packed bytes], see `kernels.packing`.
        codebook: fp16 [out, 2**bits].
        shape: (out, in).

    Raises:
        ValueError: codebooks of another size.
    """

    codes: Tensor
    codebook: Tensor

    def __init__(self, codes: Tensor, codebook: Tensor, *, bits: int, shape: tuple[int, int]) -> None:
        super().__init__()
        if codebook.shape != (shape[0], 2**bits) or codebook.dtype != torch.float16:
            raise ValueError(
                f"{shape[0]} rows of {bits}-bit codes need fp16 codebooks [{shape[0]}, {2**bits}], "
                f"not {codebook.dtype} {list(codebook.shape)}"
            )
        self.bits, self.shape = bits, shape
        self.register_buffer("codes", codes)
        self.register_buffer("codebook", codebook)

    def unpacked_codes(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.codes, int(self.bits), self.shape[1])

    def dequantize(self) -> Tensor:
        return self.codebook.float().gather(1, self.unpacked_codes().long())
