from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from methods.network import Network
from methods.sensitivity.base import METRICS, Subject
from methods.sensitivity.eigenvalue import TopEigenvalue

TOKENS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


def subject(network: Network, tokens: Tensor = TOKENS, seed: int = 0) -> Subject:
    return Subject(network, tokens, tokens, (), lambda stat, linear: torch.empty(0), seed)


def test_it_is_the_dense_eigenvalue_of_largest_magnitude(
    minute_llama: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor]
) -> None:
    score = TopEigenvalue(tolerance=1e-7, max_iterations=1000)(subject(minute_llama))
    for name in minute_llama.linears:
        spectrum = torch.linalg.eigvalsh(dense_hessian(minute_llama, TOKENS, name))
        truth = float(spectrum[spectrum.abs().argmax()])
        assert score.values[name] == pytest.approx(truth, rel=1e-3)
        assert score.error[name] == 0


def test_known_spectra_keep_their_sign(quadratic: Callable[..., Network]) -> None:
    spectra = {"a": [200.0, 2.0], "b": [200.0, 198.0], "c": [3.0, -7.0], "flat": [0.0, 0.0]}
    metric = METRICS["eigenvalue"](tolerance=1e-7, max_iterations=2000)
    score = metric(subject(quadratic(spectra)))
    assert score.values == pytest.approx({"a": 200, "b": 200, "c": -7, "flat": 0}, rel=1e-3)


def test_competing_signs_do_not_cancel(quadratic: Callable[..., Network]) -> None:
    """vᵀHv of a start between the eigenvectors of 5 and −5 may be anything in between."""
    for seed in range(5):
        score = TopEigenvalue()(subject(quadratic({"a": [5.0, -5.0]}), seed=seed))
        assert abs(score.values["a"]) == pytest.approx(5, rel=1e-3)


def test_the_magnitude_never_decreases_with_more_iterations(minute_llama: Network) -> None:
    runs = [TopEigenvalue(tolerance=0, max_iterations=n)(subject(minute_llama)) for n in (1, 2, 5, 10)]
    assert [run.cost.passes for run in runs] == [2 + n * len(minute_llama.linears) for n in (1, 2, 5, 10)]
    for name in minute_llama.linears:
        sizes = [abs(run.values[name]) for run in runs]
        assert all(later >= earlier * (1 - 1e-5) for earlier, later in pairwise(sizes))


def test_only_the_chosen_tokens_count(minute_llama: Network) -> None:
    metric = TopEigenvalue(max_iterations=3, sequences=1, context=5)
    changed = TOKENS.clone()
    changed[1:], changed[:, 5:] = 0, 0
    assert metric(subject(minute_llama)).values == metric(subject(minute_llama, changed)).values


def test_senseless_options_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        TopEigenvalue(sequences=0)
