"""Peak memory of what runs between two moments, also where such stretches nest."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryMeter:
    """Watches the high-water mark of this process: resident bytes, or allocated bytes of the GPU once one is used.

    Linux and CUDA can reset their marks, so that a stretch does not see what came before it; elsewhere the mark
    of the whole process is returned.
    """

    def __init__(self) -> None:
        self._open: list[list[int]] = []  # the peak so far of each stretch under way

    def __call__(self) -> Callable[[], int]:
        """Begin a stretch; the returned function ends it and gives its peak in bytes."""
        self._note()
        _reset()
        stretch = [0]
        self._open.append(stretch)

        def end() -> int:
            self._note()
            if stretch in self._open:
                self._open.remove(stretch)
            return stretch[0]

        return end

    def _note(self) -> None:
        mark = _high_water_mark()
        for stretch in self._open:
            stretch[0] = max(stretch[0], mark)


def _reset() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    if CLEAR.exists():
        CLEAR.write_text("5")


def _high_water_mark() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if "VmHWM" in line) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
