"""Checks of facts: against enumeration, independent arithmetic, and problems in which the fact does not hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.claims.analyses.exact import Exact
from harness.claims.checks import fallback, hawq_v3, rounding
from harness.claims.checks.base import CHECKS, check
from harness.claims.verdicts import REFUTED, SUPPORTED, Rule, judged
from methods.rounding.gptq import GPTQRounding

RESULTS = Path(__file__).parents[3] / "results"
LINEARS = [f"blocks.{i}.q_proj" for i in range(8)]
FORMATS = {"int4-g128": 4.0, "int8-g128": 8.0}


def verdicts(part: Exact, evidence: Any) -> list[str]:
    return [case.verdict for case in judged(part.cases(evidence), part.rule)]


def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / hawq_v3.PROBLEMS).read_text())
    return found


def test_the_published_allocations_of_hawq_v3_are_found_again_but_one(made_up: Callable[..., Any]) -> None:
    evidence = made_up()
    part = Exact(says="", check="ilp_golden")
    assert "restore it from the repository" in part.cases(evidence)[0].missing
    evidence.folder = RESULTS
    [case] = part.cases(evidence)
    assert case.effect == 17
    assert "resnet50 modelsize_0.25 has an Ω larger by 0.0082" in case.test
    assert verdicts(part, evidence) == [SUPPORTED]


def test_the_published_problems_are_those_of_the_paper() -> None:
    for name, layers, megabytes in (("resnet18", 19, 2**20), ("resnet50", 52, 1e6)):
        network = published()[name]
        assert {len(values) for values in network["arrays"].values()} == {layers}
        assert {len(bits) for bits in network["published"].values()} == {layers}
        assert len(network["published"]) == 9
        for first, second in network["ties"]:
            assert all(bits[first] == bits[second] for bits in network["published"].values())
        weights = sum(network["arrays"]["parameters"]) * megabytes
        assert weights == pytest.approx({"resnet18": 11.16e6, "resnet50": 23.45e6}[name], rel=0.02)  # without ends


def test_an_allocation_is_optimal_by_enumeration() -> None:
    network = {
        "layers": list("abcde"),
        "ties": [[1, 3]],
        "arrays": {
            "Hutchinson_trace": [1.0, 0.3, 0.7, 0.2, 0.4],
            "delta_weights_8bit_square": [0.01] * 5,
            "delta_weights_4bit_square": [1.0, 2, 3, 4, 5],
            "parameters": [3.0, 1, 4, 1, 5],
        },
    }
    network["arrays"] |= {"bops": [5.0, 9, 2, 6, 5], "latency_int4": [1.0] * 5, "latency_int8": [2.0, 1.1, 3, 1.2, 2.5]}
    for key in ("modelsize_0.4", "bops_0.5", "latency_0.6"):
        constraint, share = key.split("_")
        four, eight = (hawq_v3._costs(network["arrays"], constraint, width) for width in (4, 8))
        limit = sum(four) + float(share) * (sum(eight) - sum(four))
        plans = [p for p in itertools.product((4, 8), repeat=5) if p[1] == p[3]]
        cost = {p: sum((four, eight)[w == 8][i] for i, w in enumerate(p)) for p in plans}
        best = min((p for p in plans if cost[p] <= limit), key=lambda p: hawq_v3.charge(network, list(p)))
        assert hawq_v3.allocation(network, key) == list(best)


def test_dyadic_integers_match_to_one_in_the_last_place(made_up: Callable[..., Any]) -> None:
    evidence = made_up()
    assert verdicts(Exact(says="", check="dyadic"), evidence) == [SUPPORTED]
    assert verdicts(Exact(says="", check="dyadic_lsb"), evidence) == [SUPPORTED]


@pytest.mark.parametrize("bits", [7, 9])
def test_a_short_mantissa_mismatches_as_its_error_predicts(bits: int) -> None:
    """An output q is off by one with the probability q times the relative error of the multiplier, whose logarithm is
    uniform."""
    found = float((hawq_v3.differences(bits, 100_000) > 0).double().mean())
    mantissa = 2 ** (torch.rand(100_000, dtype=torch.float64) - 1)
    error = ((mantissa * 2**bits + 0.5).floor() / 2**bits / mantissa - 1).abs().mean()
    outputs = torch.randn(100_000).abs().mean() * hawq_v3.OUTPUT_TOP / 4
    assert found == pytest.approx(float(error * outputs), rel=0.2)


def test_one_hessian_serves_all_rows(made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    part = Exact(says="", check="row_permutation")
    assert verdicts(part, made_up()) == [SUPPORTED, SUPPORTED]
    per_row = Exact(says="", check="row_permutation", supported=(0.0, 0.99))
    assert verdicts(per_row, made_up()) == [REFUTED, REFUTED]

    def given(self: GPTQRounding, gram: Any) -> Any:
        """As if the Hessian were weighted by the first row."""

        def rounder(weight: Any, fmt: Any) -> Any:
            return original(self, gram * (1 + weight[0].abs().outer(weight[0].abs())))(weight, fmt)

        return rounder

    original = GPTQRounding.given
    monkeypatch.setattr(GPTQRounding, "given", given)
    assert verdicts(part, made_up()) == [REFUTED, REFUTED]


def test_ldlq_is_gptq_reversed(made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    part = Exact(says="", check="ldlq_is_gptq")
    assert verdicts(part, made_up()) == [SUPPORTED]
    original = rounding._by_inverse
    monkeypatch.setattr(rounding, "_by_inverse", lambda w, g: original(w.flip(1), g.flip(0, 1)).flip(1))
    assert verdicts(part, made_up()) == [REFUTED]  # not reversed, it is another rounding


def test_four_point_eight_bits_store_more(made_up: Callable[..., Any]) -> None:
    part = Exact(says="", check="effective_bits_nvfp4_fp8")
    [case] = part.cases(made_up())
    # A fifth in FP8 with an fp16 scale a row of 4096, the rest in 4 bits with 8 bits of scale a block of 16, and fp32.
    stored = 0.2 * (8 + 16 / 4096) + 0.8 * (4 + 8 / 16 + 32 / 4096**2)
    assert case.effect == pytest.approx(stored - 4.8)
    assert verdicts(part, made_up()) == [REFUTED]


def scored(study: Callable[..., Any], trace: Any, omega: Any, sizes: Any, squared: Any) -> Any:
    """A study with these traces, Ω in 4 bits (a 256th in 8), sizes and squared errors."""
    per_format = {"int4-g128": omega, "int8-g128": np.array(omega) / 256}
    return study(
        {
            "hutchinson": np.array(omega) * sizes / squared,  # so that sizes come back
            "inc_trace": trace,
            "hawq_v2": per_format,
            "eigenvalue": np.ones(len(squared)),
            "hawq_v1": {"int4-g128": squared, "int8-g128": np.array(squared) / 256},
        },
        LINEARS[: len(squared)],
        FORMATS,
    )


def test_equal_sizes_leave_greed_no_regret(made_up: Callable[..., Any], study: Callable[..., Any]) -> None:
    omega = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    table = scored(study, omega, omega, np.full(8, 1024.0), np.ones(8))
    part = Exact(says="", check="greedy_regret")
    [case] = part.cases(made_up(study=table))
    assert (case.effect, case.low, case.high) == (0, 0, 0)
    assert verdicts(part, made_up(study=table)) == [SUPPORTED]
    assert "not run" in part.cases(made_up())[0].missing


def test_regret_is_the_loss_above_the_best_plan_by_enumeration(
    made_up: Callable[..., Any], study: Callable[..., Any]
) -> None:
    omega, sizes = np.array([9.0, 5, 4, 3]), np.array([4096.0, 1024, 1024, 1024])
    evidence = made_up(study=scored(study, omega, omega, sizes, np.ones(4)))
    [case] = Exact(says="", check="greedy_regret").cases(evidence)
    regrets = []
    for share in fallback.SHARES:
        room, wide = share * sizes.sum() + 1e-6, []
        for i in np.argsort(-omega):
            if sizes[[*wide, i]].sum() <= room:
                wide.append(i)
        plans = [p for k in range(5) for p in itertools.combinations(range(4), k) if sizes[list(p)].sum() <= room]
        loss = [omega.sum() - 255 / 256 * omega[list(p)].sum() for p in (*plans, wide)]
        regrets.append(loss[-1] / min(loss) - 1)
    assert max(regrets) > 0.1
    assert case.effect == pytest.approx(np.median(regrets))
    assert f"{max(regrets):.2g}" in case.test


def test_the_shipped_order_is_the_reverse_of_descending_traces(
    made_up: Callable[..., Any], study: Callable[..., Any]
) -> None:
    part = Exact(says="", check="fallback_order")
    up = np.arange(1.0, 9)
    same, reverse = (made_up(study=scored(study, trace, up, np.full(8, 1024.0), np.ones(8))) for trace in (up, -up))
    assert [case.effect for case in part.cases(same)] == pytest.approx([-1, -1])
    assert verdicts(part, same) == [REFUTED, REFUTED]
    assert verdicts(part, reverse) == [SUPPORTED, SUPPORTED]


def test_rules_come_from_the_check_unless_the_ledger_has_its_own() -> None:
    assert Exact(says="", check="ilp_golden").rule == Rule((16, 18))
    assert Exact(says="", check="ilp_golden", floor=0.5).rule == Rule((16, 18), None, 0.5)
    assert Exact(says="", check="ilp_golden", supported=(18.0, 18.0)).rule.supported == (18, 18)
    with pytest.raises(ValueError, match="unknown check 'dyadc': did you mean dyadic"):
        Exact(says="", check="dyadc")
    with pytest.raises(ValueError, match="two checks are called 'dyadic'"):
        check("dyadic", Rule((0, 1)))(lambda _: [])
    assert all((entry.run.__doc__ or "").startswith("C") for entry in CHECKS.values())
