import torch

from kernels.timing import microseconds


def test_the_operation_is_warmed_up_and_repeated() -> None:
    calls: list[int] = []
    assert microseconds(lambda: calls.append(0), torch.device("cpu"), budget=0.0, least=7) > 0
    assert len(calls) == 1 + 7


def test_the_median_ignores_an_outlier(monkeypatch) -> None:
    clock = iter([0.0, 9.0, 0.0, 1e-6, 0.0, 2e-6, 0.0, 500.0])  # the warm-up and three calls
    monkeypatch.setattr("kernels.timing.perf_counter", lambda: next(clock))
    assert abs(microseconds(lambda: None, torch.device("cpu"), budget=0.0, least=3) - 2.0) < 1e-6
