import logging
from collections.abc import Callable, Mapping
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.network import Group, Network, hooks
from methods.sensitivity.activations import ActivationTrace, activation_losses, input_hessian, squared_errors
from methods.sensitivity.base import Subject
from methods.sensitivity.hutchinson import ROUND

TOKENS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


class Memory(dict[str, dict[str, Tensor]]):
    """Remembers as the harness does: by name and options, whatever the subject."""

    def __call__(
        self, name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        key = f"{name} {sorted(options.items())}"
        if key not in self:
            self[key] = compute()
        return self[key]


def subject(network: Network, tokens: Tensor = TOKENS, seed: int = 0) -> Subject:
    return Subject(network, tokens, tokens, (), lambda stat, linear: torch.empty(0), seed, Memory())


def dense_input_hessian(network: Network, text: Tensor, group: Group) -> Tensor:
    """[n, n], from a perturbation [length, in] added to what every linear of the group reads."""
    length, width = text.shape[1], network.linear(group.name).in_features

    def loss(shift: Tensor) -> Tensor:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0] + shift.view(1, length, width),)

        with hooks([network.linear(name).register_forward_pre_hook(add) for name in group.linears]):
            logits = network.logits(text)
        return nn.functional.cross_entropy(logits[0, :-1], text[0, 1:])

    with torch.enable_grad():
        return torch.autograd.functional.hessian(loss, torch.zeros(length * width))


def inputs_of(network: Network, text: Tensor) -> dict[str, Tensor]:
    """Group name to input [length, in] over one sequence."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: found.__setitem__(name, args[0][0].clone())

    with hooks([network.linear(g.name).register_forward_pre_hook(keep(g.name)) for g in network.groups]):
        network.logits(text)
    return found


def rounded(row: list[float], bits: int) -> list[float]:
    """A token, by the formula."""
    top = 2 ** (bits - 1) - 1
    scale = max(map(abs, row)) / top
    return [round(x / scale) * scale for x in row]


@torch.no_grad()
def test_products_equal_those_of_the_dense_hessian(minute_llama: Network) -> None:
    text = TOKENS[:1]
    with input_hessian(minute_llama, text, minute_llama.groups) as (inputs, product):
        for i, group in enumerate(minute_llama.groups):
            assert torch.allclose(inputs[group.name][0], inputs_of(minute_llama, text)[group.name], atol=1e-6)
            v = torch.randn(inputs[group.name].shape, generator=torch.Generator().manual_seed(i))
            image = product({group.name: v})[group.name].flatten()
            truth = dense_input_hessian(minute_llama, text, group) @ v.flatten()
            assert float((image - truth).norm()) < 1e-4 * float(truth.norm())


def test_estimates_are_unbiased_and_their_errors_honest(minute_llama: Network) -> None:
    metric = ActivationTrace(tolerance=0, max_probes=8)
    runs = [metric.measure(subject(minute_llama, seed=seed)) for seed in range(12)]
    names = [group.name for group in minute_llama.groups]
    assert set(runs[0].values) == set(runs[0].error) == set(names)
    within = []
    for group in minute_llama.groups:
        hessians = [dense_input_hessian(minute_llama, text.unsqueeze(0), group) for text in TOKENS]
        truth = fmean(float(h.trace()) / len(h) for h in hessians)
        estimates = [run.values[group.name] for run in runs]
        assert abs(fmean(estimates) - truth) < 4 * stdev(estimates) / sqrt(len(runs))
        within += [abs(run.values[group.name] - truth) < 2.4 * run.error[group.name] for run in runs]
    assert fmean(within) >= 0.85  # 95 % at 7 degrees of freedom


def test_errors_are_those_of_rounding_each_token(minute_llama: Network) -> None:
    found = squared_errors(subject(minute_llama), (3, 8), context=5)
    for group in minute_llama.groups:
        for bits in (3, 8):
            errors = []
            for text in TOKENS[:, :5]:
                rows = inputs_of(minute_llama, text.unsqueeze(0))[group.name].tolist()
                errors.append(sum((x - q) ** 2 for row in rows for x, q in zip(row, rounded(row, bits), strict=True)))
            assert found[group.name][bits] == pytest.approx(fmean(errors), rel=1e-3)


def test_losses_are_traces_times_errors_shared_by_a_group(minute_llama: Network) -> None:
    mine, metric = subject(minute_llama), ActivationTrace(max_probes=2, context=5)
    losses = activation_losses(mine, (4, 8), metric)
    traces, errors = metric.measure(mine).values, squared_errors(mine, (4, 8), 5)
    assert set(losses) == set(minute_llama.linears)
    for group in minute_llama.groups:
        for width in (4, 8):
            shares = [losses[name][width] for name in group.linears]
            assert sum(shares) == pytest.approx(traces[group.name] * errors[group.name][width])
            assert len(set(shares)) == 1


def test_negative_traces_are_kept_and_reported(minute_llama: Network, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = ActivationTrace(tolerance=0, max_probes=8).measure(subject(minute_llama))
    negative = [name for name, value in found.values.items() if value < 0]
    assert negative  # this random model is nowhere near a minimum
    assert f"{len(negative)} of {len(found.values)} Hessian traces are negative: {', '.join(negative)}" in caplog.text


def test_everything_is_measured_once(minute_llama: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, metric = subject(minute_llama), ActivationTrace(max_probes=2)
    first = activation_losses(mine, (4, 8), metric)
    monkeypatch.setattr(minute_llama.model, "forward", None)
    assert activation_losses(mine, (4, 8), metric) == first
    with pytest.raises(TypeError):
        activation_losses(mine, (4,), metric)


def test_each_group_stops_when_its_error_is_small(minute_llama: Network) -> None:
    count = len(minute_llama.groups)

    def passes(tolerance: float) -> int:
        return ActivationTrace(tolerance, max_probes=24).measure(subject(minute_llama)).cost.passes

    assert passes(1e9) == ROUND * (2 + count)
    assert passes(0) == 24 * (2 + count)


def test_only_the_beginning_of_sequences_counts(minute_llama: Network) -> None:
    changed = TOKENS.clone()
    changed[:, 5:] = 0
    metric = ActivationTrace(max_probes=2, context=5)
    losses = [activation_losses(subject(minute_llama, text), (4,), metric) for text in (TOKENS, changed)]
    assert losses[0] == losses[1]


def test_the_model_is_left_as_it_was(minute_llama: Network) -> None:
    required = [p.requires_grad for p in minute_llama.model.parameters()]
    activation_losses(subject(minute_llama), (4,), ActivationTrace(max_probes=2))
    assert [p.requires_grad for p in minute_llama.model.parameters()] == required
    assert not any(minute_llama.linear(name)._forward_pre_hooks for name in minute_llama.linears)


def test_senseless_options_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 probes"):
        ActivationTrace(max_probes=1)
