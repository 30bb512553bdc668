"""The overlap of two scores' choices, against choices made by hand and one linear after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from harness.claims.analyses.jaccard import Jaccard, overlap, wide_set

LINEARS = [f"blocks.{i}.q_proj" for i in range(30)]
FORMATS = {"int3-g128": 3.0, "int4-g128": 4.0}


def losses(gain: Any, sizes: Any) -> dict[str, Any]:
    """Losses whose fall from 3 to 4 bits is `gain` a weight."""
    return {"int3-g128": 5 + gain * sizes, "int4-g128": np.full(len(sizes), 5.0)}


def test_the_greatest_gains_go_wide_while_they_fit() -> None:
    gain, sizes = np.array([1.0, 4, 3, 2]), np.array([1.0, 2, 5, 2])
    assert wide_set(gain, sizes, 0.2).tolist() == [False, True, False, False]
    assert wide_set(gain, sizes, 0.69).tolist() == [False, True, False, False]
    assert wide_set(gain, sizes, 0.7).tolist() == [False, True, True, False]
    assert wide_set(gain, sizes, 1.0).all()
    assert not wide_set(gain, sizes, 0.1).any()


def test_rows_are_chosen_independently() -> None:
    rng = np.random.default_rng(0)
    gain, sizes = rng.normal(size=(50, 12)), rng.integers(1, 5, (50, 12)).astype(float)
    for row, chosen in enumerate(wide_set(gain, sizes, 0.4)):
        spent, expected = 0.0, []
        for i in sorted(range(12), key=lambda i: -gain[row, i]):
            spent += sizes[row, i]
            if spent > 0.4 * sizes[row].sum() + 1e-9:
                break
            expected.append(i)
        assert sorted(expected) == np.flatnonzero(chosen).tolist()


def test_the_index_counts_shared_over_all() -> None:
    a, b = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool), np.array([[1, 0, 1, 0], [0, 0, 0, 0]], bool)
    assert overlap(a, b)[0] == pytest.approx(1 / 3)
    assert np.isnan(overlap(a, b)[1])


def test_scores_that_agree_and_that_oppose(made_up: Callable[..., Any], study: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    sizes, gain = rng.choice([1024.0, 4096.0], 30), rng.random(30)
    trace, squared = rng.random(30) + 1, rng.random(30) + 1
    sized = {  # what the sizes are derived from
        "eigenvalue": np.ones(30),
        "hawq_v1": squared,
        "hutchinson": trace,
        "hawq_v2": trace / sizes * squared,
    }
    scores = {"kfac": losses(gain, sizes), "fit": losses(2 * gain, sizes), "measured": losses(-gain, sizes)}
    scores["gptq_loss"] = losses(gain / sizes, sizes)
    table = study({**sized, **scores}, LINEARS, FORMATS)
    evidence = made_up(study=table)
    for case in Jaccard(says="", first="kfac", second="fit").cases(evidence):
        assert (case.effect, case.low, case.high) == (1, 1, 1)
    narrow, _, most = Jaccard(says="", first="kfac", second="measured").cases(evidence)
    assert narrow.effect == 0
    assert most.effect > 0.2  # three quarters each must share at least half of all weights
    assert narrow.label == "25% of weights in int4-g128"
    per_weight = Jaccard(says="", first="kfac", second="gptq_loss", shares=(0.4,)).cases(evidence)[0].effect
    assert per_weight == overlap(wide_set(gain, sizes, 0.4), wide_set(gain / sizes, sizes, 0.4)) < 0.7
    with pytest.raises(ValueError, match="hutchinson is a score that knows no format"):
        Jaccard(says="", first="kfac", second="hutchinson").cases(evidence)
    assert all(case.missing for case in Jaccard(says="", first="kfac", second="autoscheme").cases(evidence))
