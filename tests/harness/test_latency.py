from pathlib import Path

import pytest
import torch

from harness.cache import Cache
from harness.latency import LatencyTable
from methods.formats.integer import Integer


def test_a_latency_is_measured_once_and_then_recalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stopwatch(operation: object, device: object) -> float:
        calls.append(operation)
        operation()  # type: ignore[operator]
        return 42.5

    monkeypatch.setattr("harness.latency.microseconds", stopwatch)
    for _ in range(2):  # the second table knows nothing but the cache
        table = LatencyTable(Cache(tmp_path), torch.device("cpu"))
        assert table((8, 64), Integer(4, 32)) == table((8, 64), Integer(4, 32)) == 42.5
    assert len(calls) == 1
    table((8, 64), Integer(3, 32))
    table((8, 32), Integer(4, 32))
    assert len(calls) == 3
