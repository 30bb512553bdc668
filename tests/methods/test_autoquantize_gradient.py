from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.formats.integer import Integer
from methods.network import Network, hooks
from methods.sensitivity.autoquantize_gradient import AutoQuantizeGradient
from methods.sensitivity.autoscheme import AutoScheme
from methods.sensitivity.base import Subject, entry

TOKENS = torch.randint(96, (3, 7), generator=torch.Generator().manual_seed(1))
FORMATS = (Integer(4, 0), Integer(2, 0))


def subject_of(network: Network, formats: tuple[Any, ...] = FORMATS) -> Subject:
    return Subject(network, TOKENS, TOKENS, formats, lambda stat, linear: torch.empty(0))


def forward(network: Network, text: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The mean loss of a sequence, and the linear's output."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        outputs.append(output)

    with hooks([network.linear(name).register_forward_hook(keep)]):
        loss = F.cross_entropy(network.logits(text[None])[0, :-1], text[1:])
    return loss, outputs[0]


def direct(network: Network, subject: Subject, name: str, fmt: Any) -> Tensor:
    """Two forward passes, with the weight and with the rounded weight, for every sequence."""
    found = []
    for text in TOKENS:
        loss, output = forward(network, text, name)
        (slope,) = torch.autograd.grad(loss, output)
        weight, delta = network.weight(name), subject.delta(name, fmt)
        network.overwrite(name, weight + delta)
        _, rounded = forward(network, text, name)
        network.overwrite(name, weight)
        found.append((slope**2 * (rounded - output).detach() ** 2).sum())
    return torch.stack(found)


def test_scores_are_those_of_two_forward_passes(minute_llama: Network) -> None:
    subject = subject_of(minute_llama)
    found = AutoQuantizeGradient()(subject)
    for name in minute_llama.linears:
        for fmt in FORMATS:
            terms = direct(minute_llama, subject, name, fmt)
            assert found.values[entry(name, fmt)] == pytest.approx(float(terms.sum()), rel=1e-3)
            assert found.error[entry(name, fmt)] == pytest.approx(float(terms.std()) * 3**0.5, rel=1e-3)
    assert found.cost.passes == 6


@dataclass(frozen=True)
class Shifted:
    """A format that adds `shift` to each weight."""

    name: str
    bits: float
    shift: float

    def fit(self, weight: Tensor) -> Any:
        return SimpleNamespace(snap=lambda w: w + self.shift)


def test_a_wider_format_never_scores_worse(minute_llama: Network) -> None:
    formats = (Shifted("a8", 8, 0.03), Shifted("b4", 4, 0.02), Shifted("c4", 4, 0.05), Shifted("d2", 2, 0.04))
    found = AutoQuantizeGradient()(subject_of(minute_llama, formats))
    for name in minute_llama.linears:
        best = found.values[entry(name, formats[1])]
        relative = [found.values[entry(name, fmt)] / best for fmt in formats]
        # 8 bits take the score of b4; c4 not that of b4, which is as wide, but that of d2, which is narrower.
        assert relative == pytest.approx([1, 1, 4, 4], rel=1e-3)
        assert found.error[entry(name, formats[0])] == found.error[entry(name, formats[1])]


def test_autoscheme_sums_magnitudes_of_first_order_changes(minute_llama: Network) -> None:
    subject = subject_of(minute_llama)
    found = AutoScheme()(subject)
    for name in minute_llama.linears:
        weight = minute_llama.linear(name).weight.requires_grad_(True)
        slopes = [torch.autograd.grad(forward(minute_llama, text, name)[0], weight)[0] for text in TOKENS]
        for fmt in FORMATS:
            terms = torch.stack([(slope * subject.delta(name, fmt)).abs().sum() for slope in slopes])
            assert found.values[entry(name, fmt)] == pytest.approx(float(terms.mean()), rel=1e-3)
            assert found.error[entry(name, fmt)] == pytest.approx(float(terms.std()) / 3**0.5, rel=1e-3)
    assert found.cost.passes == 6
