"""What the bench makes of times: speed, ratios, and the refusal to tell on a noisy machine."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from harness.bench import cpu
from harness.bench.cpu import BASE, READ, SPACE, CpuBench, cpu_page, noise, row
from kernels.bench.cpu_contenders import Contender
from kernels.bench.rounds import Times


def frame(reading: list[float]) -> pd.DataFrame:
    times = {READ: Times(np.array(reading)), BASE: Times(np.full(5, 0.002)), "peer": Times(np.full(5, 0.006))}
    contender = Contender(lambda _: torch.ones(1), torch.ones(1).double(), 0.0, 10**6, 1)
    given = {BASE: contender, "peer": contender}
    rows = [row(name, times, given.get(name), 0.0 if name in given else None) for name in times]
    return pd.DataFrame([{"out": 8, "in": 128, "tokens": 1, **one} for one in rows])


def test_speeds_and_ratios() -> None:
    found = frame([0.01] * 5).set_index("kernel")
    assert found.loc["peer", "ratio"] == pytest.approx(3)
    assert found.loc[BASE, "gb_per_s"] == pytest.approx(0.5)
    assert found.loc[BASE, "of_read"] == pytest.approx(0.5 * 1e9 / (SPACE / 0.01))


def test_noise_is_that_of_reading_memory() -> None:
    assert noise(frame([0.01, 0.0101, 0.0099, 0.01, 0.01])) == 0
    assert noise(frame([0.01, 0.02, 0.01, 0.02, 0.01])) == pytest.approx(1)


def test_a_shape_is_measured_again_while_the_machine_is_too_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, loud = frame([0.01] * 5), frame([0.01, 0.02, 0.01, 0.02, 0.01])
    taken = iter([loud, loud, quiet, loud])
    monkeypatch.setattr(cpu, "measure", lambda *_: next(taken))
    assert noise(cpu.measure_in_quiet(CpuBench(), 8, 128, 1, lambda _: None)) == 0
    monkeypatch.setattr(cpu, "measure", lambda *_: loud)
    assert noise(cpu.measure_in_quiet(CpuBench(), 8, 128, 1, lambda _: None)) == pytest.approx(1)


def test_the_page_says_what_was_not_measured() -> None:
    page = cpu_page(frame([0.01] * 5), "a machine", CpuBench())
    assert "not measured" in page
    assert "3 [3, 3]" in page.replace("\\", "")
