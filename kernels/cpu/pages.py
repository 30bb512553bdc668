"""Moves the buffers of packed matrices to huge pages.

A matrix is read once a token, from end to end; on pages of 4 KiB the reading waits for address translations. Where the
system gives huge pages only to who asks, this asks. The buffers stay what they were, in another place, as after `.to`.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

PAGE = 2**21


def huge(module: nn.Module) -> None:
    """Move each buffer of the module of at least a huge page; nothing happens where the system has none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.device.type == "cpu" and buffer.nbytes >= PAGE and buffer.data_ptr() % PAGE:
                setattr(part, name, moved(buffer))


def moved(tensor: Tensor) -> Tensor:
    """A contiguous copy at the start of a huge page, if the system still has some."""
    memory = mmap.mmap(-1, tensor.nbytes + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    space = torch.frombuffer(memory, dtype=torch.uint8)
    start = -space.data_ptr() % PAGE
    copy = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
