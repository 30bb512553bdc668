"""Times in turns: pairs of rounds, and what their spread says."""

import numpy as np
import pytest

from kernels.bench.rounds import Times, in_turns


def test_a_disturbance_of_both_leaves_the_ratio() -> None:
    load = np.array([1.0, 5.0, 1.0, 2.0, 1.0, 9.0, 1.0])
    ratio, low, high = Times(load).speedup(Times(3 * load))
    assert (ratio, low, high) == pytest.approx((3, 3, 3))


def test_spread_is_the_distance_of_quartiles() -> None:
    times = Times(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (times.median, times.quartiles, times.spread) == (3.0, (2.0, 4.0), pytest.approx(2 / 3))


def test_every_operation_has_every_round_and_other_copies() -> None:
    calls: dict[str, list[int]] = {"a": [], "b": []}
    times = in_turns({name: calls[name].append for name in calls}, rounds=3)
    assert {name: len(found.rounds) for name, found in times.items()} == {"a": 3, "b": 3}
    assert all((times[name].rounds > 0).all() for name in times)
    assert calls["a"][:3] == [0, 1, 2]
