import logging
from collections.abc import Callable
from statistics import fmean, median, stdev

import pytest
import torch
from torch import Tensor

from methods.network import Network
from methods.sensitivity.base import METRICS, Subject
from methods.sensitivity.hutchinson import ROUND, Hutchinson

TOKENS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


def subject(network: Network, tokens: Tensor = TOKENS, seed: int = 0) -> Subject:
    return Subject(network, tokens, tokens, (), lambda stat, linear: torch.empty(0), seed)


def test_estimates_are_unbiased_and_their_errors_honest(
    minute_llama: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor]
) -> None:
    metric = Hutchinson(tolerance=0, max_probes=8)
    runs = [metric(subject(minute_llama, seed=seed)) for seed in range(12)]
    within = []
    for name in minute_llama.linears:
        truth = float(dense_hessian(minute_llama, TOKENS, name).trace())
        estimates = [run.values[name] for run in runs]
        assert abs(fmean(estimates) - truth) < 3.5 * stdev(estimates) / len(runs) ** 0.5
        within += [abs(run.values[name] - truth) < 2.4 * run.error[name] for run in runs]
    # With 7 degrees of freedom, Student's t puts 95 % within 2.4 errors; texts of two kinds only raise that.
    assert 0.9 < fmean(within) <= 1


def test_a_diagonal_hessian_is_exact(quadratic: Callable[..., Network]) -> None:
    network = quadratic({"a": [200.0, 2.0], "b": [200.0, 198.0], "c": [3.0, -7.0]})
    score = METRICS["hutchinson"]()(subject(network))
    assert score.values == pytest.approx({"a": 202, "b": 398, "c": -4})
    assert score.error == pytest.approx({"a": 0, "b": 0, "c": 0})


def test_negative_traces_are_reported(quadratic: Callable[..., Network], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Hutchinson()(subject(quadratic({"fine": [1.0, 2.0], "bad": [3.0, -7.0]})))
    assert "1 of 2 Hessian traces are negative: bad" in caplog.text


def test_each_linear_stops_when_its_error_is_small(small_llama: Callable[..., Network]) -> None:
    network = small_llama(num_hidden_layers=1)
    count = len(network.linears)

    def passes(tolerance: float) -> int:
        return Hutchinson(tolerance, max_probes=24)(subject(network)).cost.passes

    assert passes(1e9) == ROUND * (2 + count)
    assert passes(0) == 24 * (2 + count)
    assert ROUND * (2 + count) < passes(0.2) < 24 * (2 + count)


def test_the_tolerance_holds_for_each_linear(minute_llama: Network) -> None:
    score = Hutchinson(tolerance=0.5, max_probes=400)(subject(minute_llama))
    assert score.cost.passes < 400 * len(minute_llama.linears)
    floor = median(abs(value) for value in score.values.values())
    for name, value in score.values.items():
        assert score.error[name] <= 0.5 * max(abs(value), floor)


def test_only_the_beginning_of_sequences_counts(minute_llama: Network) -> None:
    metric = Hutchinson(max_probes=8, context=5)
    changed = TOKENS.clone()
    changed[:, 5:] = 0
    assert metric(subject(minute_llama)).values == metric(subject(minute_llama, changed)).values


def test_the_seed_decides(minute_llama: Network) -> None:
    runs = [Hutchinson(max_probes=8)(subject(minute_llama, seed=seed)).values for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_senseless_options_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 probes"):
        Hutchinson(max_probes=1)
