"""`TRITON_INTERPRET=1 pytest --confcutdir=tests/kernels/triton/interpreted tests/kernels/triton/interpreted` runs these
alone; `test_interpreter.py` does so.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is to fill is full of NaN, or of the least integer, before."""
    empty = torch.empty

    def poison(*shape: int, **options: object) -> Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def random() -> torch.Generator:
    """New numbers at every run; the seed is in the failure's output."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def error() -> Callable[[Tensor, Tensor], float]:
    """Distance of a result from the truth, relative to the truth."""

    def relative(result: Tensor, truth: Tensor) -> float:
        return float((result.double() - truth).norm() / truth.norm())

    return relative
