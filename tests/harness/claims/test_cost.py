"""Exponents and ratios of costs, on tables whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from harness.claims.analyses.cost import CellCost, CostRatio, Slope, exponent
from harness.claims.verdicts import INCONCLUSIVE, REFUTED, SUPPORTED, judged

SIZES = np.array([1e6, 4e6, 16e6, 64e6])


def bench(folder: Path, rows: Mapping[str, Any], length: int = 512) -> None:
    """The benchmark's table: seconds of each row at the sizes, the range ± 10 % of it; NaN where too slow."""
    frame = pd.concat(
        pd.DataFrame(
            {
                "row": row,
                "length": length,
                "parameters": SIZES,
                "seconds": seconds,
                "seconds_low": 0.9 * np.array(seconds),
                "seconds_high": 1.1 * np.array(seconds),
                "repeats": 3,
                "extra_bytes": 10 * np.array(seconds),
            }
        )
        for row, seconds in rows.items()
    )
    (folder / "tables").mkdir(exist_ok=True)
    (folder / "tables" / "bench_hessian.csv").write_text("# a machine\n" + frame.to_csv(index=False))


def test_the_exponent_of_a_power_law_and_its_interval() -> None:
    assert exponent(SIZES, 3 * SIZES**1.5) == pytest.approx((1.5, 1.5, 1.5))
    x = np.log(SIZES)
    y = x + np.array([0.1, -0.2, 0.05, 0.1])
    design = np.stack([np.ones(4), x], axis=1)
    solution, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = np.sqrt(residual[0] / 2 * np.linalg.inv(design.T @ design)[1, 1])
    slope, low, high = exponent(SIZES, np.exp(y))
    assert slope == pytest.approx(solution[1])
    assert (high - slope, slope - low) == pytest.approx((t.ppf(0.975, 2) * error,) * 2)


def test_slopes_of_a_cost_and_of_a_ratio(made_up: Callable[..., Any]) -> None:
    evidence = made_up()
    bench(evidence.folder, {"hutchinson": SIZES**1.4, "gptq": [*SIZES[:3] ** 1.1, np.nan]})
    [alone] = Slope(says="", first="hutchinson").cases(evidence)
    assert alone.effect == pytest.approx(1.4)
    assert "4 sizes up to 64M" in alone.test
    part = Slope(says="", first="hutchinson", second="gptq")
    [ratio] = judged(part.cases(evidence), part.rule)
    assert (ratio.effect, ratio.verdict) == (pytest.approx(0.3), SUPPORTED)
    assert "3 sizes up to 16M" in ratio.test
    back = Slope(says="", first="gptq", second="hutchinson")
    assert judged(back.cases(evidence), back.rule)[0].verdict == REFUTED
    [memory] = Slope(says="", first="hutchinson", what="extra_bytes").cases(evidence)
    assert memory.effect == pytest.approx(1.4)


def test_the_ratio_at_the_largest_common_size_spans_the_repeats(made_up: Callable[..., Any]) -> None:
    evidence = made_up()
    bench(evidence.folder, {"hutchinson": [5.0, 5, 40, np.nan], "gptq": [1.0, 1, 4, 8], "awq": [1.0, np.nan, 30, 99]})
    part = CostRatio(says="", first="hutchinson", second="gptq")
    [case] = judged(part.cases(evidence), part.rule)
    assert (case.effect, case.low, case.high) == pytest.approx((10, 10 * 0.9 / 1.1, 10 * 1.1 / 0.9))
    assert case.verdict == SUPPORTED
    assert "16M" in case.test and "3 and 3 repeats" in case.test
    [memory] = CostRatio(says="", first="hutchinson", second="gptq", what="extra_bytes").cases(evidence)
    assert (memory.low, memory.high) == (10, 10)
    less = CostRatio(says="", first="gptq", second="awq")
    assert judged(less.cases(evidence), less.rule)[0].verdict == REFUTED
    near = CostRatio(says="", first="hutchinson", second="awq")
    assert judged(near.cases(evidence), near.rule)[0].verdict == INCONCLUSIVE


def test_what_was_not_measured_says_how_to_get_it(made_up: Callable[..., Any]) -> None:
    evidence = made_up()
    part = CostRatio(says="", first="hutchinson", second="gptq")
    assert part.cases(evidence)[0].missing == "not run: make bench-hessian"
    bench(
        evidence.folder, {"hutchinson": [1.0, 2, np.nan, np.nan], "gptq": [np.nan, np.nan, 1, 2], "awq": [np.nan] * 4}
    )
    assert "no size at which both" in part.cases(evidence)[0].missing
    assert "2 sizes were measured" in Slope(says="", first="hutchinson").cases(evidence)[0].missing
    assert "at every size" in Slope(says="", first="awq").cases(evidence)[0].missing
    assert "lanczos at 512 tokens; make" in Slope(says="", first="lanczos").cases(evidence)[0].missing
    assert "gptq at 128 tokens" in Slope(says="", first="gptq", length=128).cases(evidence)[0].missing
    with pytest.raises(ValueError, match="what=joules"):
        Slope(says="", first="gptq", what="joules")


def test_the_cost_of_cells_is_a_geometric_mean(made_up: Callable[..., Any]) -> None:
    def results(overrides: Mapping[str, str]) -> dict[str, Any]:
        seed = int(overrides["data.seed"])
        kl = overrides["method"] == "kl"
        return {"seconds": {"quantize": (8.0, 16, 32)[seed] - 1 if kl else 2.0, **({"statistics": 1.0} if kl else {})}}

    part = CellCost(says="", first="method=kl", second="method=fisher", over="budget=b3")
    [case] = part.cases(made_up(results))
    half = t.ppf(0.975, 2) * np.log(2) / np.sqrt(3)
    assert (case.effect, case.low, case.high) == pytest.approx((8, 8 * np.exp(-half), 8 * np.exp(half)))
    assert len(list(part.needs())) == 6
    assert part.cases(made_up())[0].missing == "not run"
    with pytest.raises(ValueError, match="seeds=1"):
        CellCost(says="", first="", second="", over="", seeds=1)
