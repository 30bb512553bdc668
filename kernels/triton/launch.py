"""What decides the shape of a launch."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

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


def row_stride(addend: torch.Tensor | None) -> int:
    """From one token's row of an addend [tokens or 1, out] to the next one's."""
    return 0 if addend is None or len(addend) == 1 else addend.stride(0)


def interpreted() -> bool:
    """Are kernels interpreted on the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unfit(device: torch.device) -> str | None:
    """None where kernels can run on this device, else why not."""
    if device.type == "cuda" or interpreted():
        return None
    return f"the Triton kernels run on a CUDA device, and the tensors are on {device}"
