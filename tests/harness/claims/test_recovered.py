"""Shares of a gap."""

from __future__ import annotations

import numpy as np
import pytest

from harness.claims.analyses.recovered import Recovered
from harness.claims.verdicts import Case


class Windows:
    """Evidence with a known loss for each method."""

    def __init__(self, **losses: np.ndarray) -> None:
        self.losses = losses

    def nll(self, overrides: tuple[str, ...]) -> np.ndarray:
        return self.losses[overrides[-1].split("=")[1]][None]


def case(first: float) -> Case:
    base = np.random.default_rng(0).normal(2.0, 0.5, size=64)
    part = Recovered(says="", first="method=qat", worst="method=rtn", best="method=fp16", over="budget=w3g128")
    (found,) = part.cases(Windows(qat=base + first, rtn=base + 1.0, fp16=base))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("first", "share"), [(0.0, 1.0), (1.0, 0.0), (0.25, 0.75), (1.5, -0.5)])
def test_the_share_is_what_is_won_of_what_was_lost(first: float, share: float) -> None:
    found = case(first)
    assert (found.effect, found.low, found.high) == pytest.approx((share, share, share), abs=1e-9)
