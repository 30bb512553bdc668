"""`TRITON_INTERPRET=1 pytest --confcutdir=tests/kernels/triton/interpreted tests/kernels/triton/interpreted` runs these
alone; `test_interpreter.py` does so.
"""

import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.triton.launch import Regime

HALF = 1e-3  # relative error of fp16 results
SMALL = Regime(16, 16, 64, 4, 2)

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


@pytest.fixture
def check_shared(
    random: torch.Generator, error: Callable[[Tensor, Tensor], float]
) -> Callable[[ModuleType, Packed], None]:
    """A sum that several programs share is right and leaves their counters as they were; so is one of many tokens."""

    def check(module: ModuleType, packed: Packed) -> None:
        x = torch.randn(module.REGIMES[-1].limit + 1, packed.shape[1], generator=random).half()
        truth = x.double() @ packed.dequantize().double().t()
        prepared = module.prepare(packed)
        assert error(module.add_multiplied(prepared, x[:3], None, SMALL, 3), truth[:3]) < HALF
        assert not prepared.arrived.any()
        assert error(module.multiply(prepared, x), truth) < HALF

    return check
