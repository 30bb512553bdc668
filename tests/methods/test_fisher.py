from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.base import Subject, entry
from methods.sensitivity.fisher import FisherDiagonal, FisherTrace, fisher_diagonals
from methods.sensitivity.fit import FIT

TOKENS = torch.randint(96, (5, 7), generator=torch.Generator().manual_seed(1))
FORMATS = (Integer(2, 0), Integer(3, 4))


def subject_of(network: Network, **options: Any) -> Subject:
    return Subject(network, TOKENS, TOKENS, FORMATS, lambda stat, linear: torch.empty(0), **options)


def scores(network: Network, name: str) -> Tensor:
    """∂(Σₜ lₜ)/∂W/√n of every sequence, one after the other, by autograd: [sequences, out, in]."""
    weight = network.linear(name).weight.requires_grad_(True)
    found = []
    for text in TOKENS:
        loss = F.cross_entropy(network.logits(text[None])[0, :-1], text[1:], reduction="sum")
        found += torch.autograd.grad(loss, weight)
    return torch.stack(found) / 6**0.5


def test_the_trace_is_the_mean_squared_norm_of_gradients(minute_llama: Network) -> None:
    found = FisherTrace()(subject_of(minute_llama))
    for name in minute_llama.linears:
        norms = scores(minute_llama, name).square().sum((1, 2))
        assert found.values[name] == pytest.approx(float(norms.mean()), rel=1e-4)
        assert found.error[name] == pytest.approx(float(norms.std()) / 5**0.5, rel=1e-4)
    assert found.cost.passes == 10


def test_options_choose_the_text(minute_llama: Network) -> None:
    found = FisherTrace(sequences=2, context=4)(subject_of(minute_llama))
    same = FisherTrace()(Subject(minute_llama, TOKENS[:2, :4], TOKENS, (), lambda stat, linear: torch.empty(0)))
    assert found.values == same.values


def test_the_diagonal_holds_mean_squared_gradients(minute_llama: Network) -> None:
    diagonals, cost = fisher_diagonals(subject_of(minute_llama))
    assert set(diagonals) == set(minute_llama.linears)
    for name, diagonal in diagonals.items():
        torch.testing.assert_close(diagonal, scores(minute_llama, name).square().mean(0), rtol=1e-4, atol=1e-9)
    assert cost.passes == 10 and cost.seconds > 0


def test_losses_weigh_squared_rounding_errors(minute_llama: Network) -> None:
    subject = subject_of(minute_llama)
    found = FisherDiagonal()(subject)
    for name in minute_llama.linears:
        for fmt in FORMATS:
            terms = scores(minute_llama, name).square().mean(0) * subject.delta(name, fmt) ** 2
            assert found.values[entry(name, fmt)] == pytest.approx(float(terms.sum()) / 2, rel=1e-4)
            assert found.error[entry(name, fmt)] == 0


def test_the_diagonal_is_computed_once_and_its_cost_counted_always(minute_llama: Network) -> None:
    known: dict[str, dict[str, Tensor]] = {}

    def memo(name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        assert compute.__module__ == "methods.sensitivity.fisher"
        key = f"{name} {sorted(options.items())}"
        if key not in known:
            known[key] = compute()
        return known[key]

    subject = subject_of(minute_llama, memo=memo, meter=lambda: lambda: 77)
    first, second = (FisherDiagonal()(subject) for _ in range(2))
    assert len(known) == 1
    assert first.values == second.values
    assert first.cost.passes == second.cost.passes == 10 and second.cost.peak_bytes == 77
    FisherDiagonal(sequences=3)(subject)
    FisherDiagonal(context=5)(subject)
    assert len(known) == 3


def test_fit_is_the_trace_a_weight(minute_llama: Network) -> None:
    subject = subject_of(minute_llama)
    found, trace = FIT(sequences=4)(subject), FisherTrace(sequences=4)(subject)
    losses = FIT().losses(found, minute_llama, FORMATS)
    for name in minute_llama.linears:
        numel = minute_llama.linear(name).weight.numel()
        assert found.values[name] == pytest.approx(trace.values[name] / numel)
        assert found.error[name] == pytest.approx(trace.error[name] / numel)
        power = float(subject.delta(name, FORMATS[0]).square().mean())
        assert losses[name][FORMATS[0]] == pytest.approx(trace.values[name] * power)
    assert found.cost.passes == 8
