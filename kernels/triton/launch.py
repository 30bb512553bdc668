"""What the products of this package have in common on the host: tiles, splits and scratch memory of a launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_ROWS = 64  # of a tile
SHARED = 16  # tiles of tokens up to which programs share a sum; beyond, there are tiles enough
WAVES = 3  # programs per processor that a launch aims for
LEAST_BLOCKS = 2  # blocks of columns below which splitting a sum costs more than it brings


class Regime(NamedTuple):
    """Tiles for calls of up to `limit` tokens."""

    limit: int
    tokens: int
    rows: int
    warps: int
    stages: int


def regime(regimes: tuple[Regime, ...], tokens: int) -> Regime | None:
    """The first whose limit is not exceeded; None where all are."""
    return next((r for r in regimes if tokens <= r.limit), None)


class Launch(NamedTuple):
    """How a kernel is called.

    Args:
        y: [tokens, out], to be written.
        grid: tiles of rows, tiles of tokens, and programs that share a sum.
        ending: partial, arrived, addend, addend_stride, out, M and N, see `kernels.triton.finish`.
        constants: tiles and options of the compiler.
    """

    y: Tensor
    grid: tuple[int, int, int]
    ending: tuple[Any, ...]
    constants: Mapping[str, Any]


def in_tiles(
    x: Tensor,
    bias: Tensor | None,
    regimes: tuple[Regime, ...],
    product: Callable[[Tensor, Tensor | None, Regime], Tensor],
    whole: Callable[[], Tensor] | None = None,
) -> Tensor:
    """x [..., in] times the transposed matrix, plus bias [out]: [..., out].

    Args:
        product: of tokens [tokens, in] and the matrix, plus an addend, in tiles of a regime.
        whole: the matrix [out, in], for torch to multiply with where tokens exceed the last regime.
    """
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    tile = regime(regimes, len(tokens))
    if tile is None:
        assert whole is not None
        return F.linear(x, whole(), bias)
    y = product(tokens, None if bias is None else bias.expand(1, -1), tile)
    return y.view(*x.shape[:-1], y.shape[1])


def launch(
    x: Tensor, rows: int, blocks: int, tile: Regime, arrived: Tensor, addend: Tensor | None, split: int | None = None
) -> Launch:
    """For a product of x [tokens, in] with a matrix of so many rows and blocks of columns.

    Args:
        arrived: `counters` of the matrix.
        addend: [tokens or 1, out].
        split: programs that share a sum; None decides by what the device has.
    """
    count = len(x)
    tiles = -(-rows // tile.rows), -(-count // tile.tokens)
    if split is None:
        split = splits(tiles[0] * tiles[1], blocks, x.device) if tiles[1] <= SHARED else 1
    y = torch.empty(count, rows, dtype=x.dtype, device=x.device)
    partial = torch.empty((split, count, rows) if split > 1 else 0, device=x.device)
    stride = 0 if addend is None or len(addend) == 1 else addend.stride(0)
    constants = {
        "TOKENS": tile.tokens, "ROWS": tile.rows, "SPLIT": split, "STAGES": tile.stages, "ADD": addend is not None,
        "ASM": not interpreted(), "num_warps": tile.warps, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(y, (*tiles, split), (partial, arrived, addend, stride, y, count, rows), constants)


def counters(rows: int, device: torch.device) -> Tensor:
    """Of programs that have arrived at a tile: int32, zero between calls; calls on several streams need a copy each."""
    return torch.zeros(-(-rows // LEAST_ROWS) * SHARED, dtype=torch.int32, device=device)


def splits(tiles: int, blocks: int, device: torch.device) -> int:
    """Among how many programs the sum over columns of each tile is divided, so that all processors have work."""
    wanted = -(-WAVES * processors(device) // tiles)
    return max(1, min(wanted, blocks // LEAST_BLOCKS))


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; few where the interpreter stands in for them."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def interpreted() -> bool:
    """Are kernels interpreted on the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unfit(device: torch.device) -> str | None:
    """None where kernels can run on this device, else why not."""
    if device.type == "cuda" or interpreted():
        return None
    return f"the Triton kernels run on a CUDA device, and the tensors are on {device}"
