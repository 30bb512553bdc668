"""How long an operation takes."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch


def microseconds(operation: Callable[[], object], device: torch.device, budget: float = 0.1, least: int = 5) -> float:
    """The median time of a call, after a warm-up call, over `budget` seconds and at least `least` calls.

    The median, since interruptions only ever add. On a GPU each call is waited for.
    """

    def timed() -> float:
        began = perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - began

    timed()
    samples = [timed()]
    while len(samples) < least or sum(samples) < budget:
        samples.append(timed())
    return 1e6 * median(samples)
