from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Stat
from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.autoquantize_kl import AutoQuantizeKL
from methods.sensitivity.base import METRICS, Subject, entry

TOKENS = torch.randint(96, (5, 7), generator=torch.Generator().manual_seed(1))
FORMATS = (Integer(2), Integer(5))


def no_statistics(stat: Stat, linear: str) -> Tensor:
    raise AssertionError(f"{stat} of {linear} was not declared")


def subject_of(network: Network) -> Subject:
    return Subject(network, TOKENS, TOKENS, FORMATS, no_statistics)


@torch.no_grad()
def divergences(network: Network, linear: str, fmt: Integer) -> Tensor:
    """KL(p‖q) of every token by torch's own divergence, fp64 [sequences, length], from full forward passes."""
    log_p = network.logits(TOKENS).double().log_softmax(-1)
    weight = network.weight(linear)
    network.overwrite(linear, fmt.fit(weight).snap(weight))
    log_q = network.logits(TOKENS).double().log_softmax(-1)
    network.overwrite(linear, weight)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def entropy(network: Network) -> float:
    return float(torch.distributions.Categorical(logits=network.logits(TOKENS).double()).entropy().mean())


def test_it_is_the_mean_divergence_a_token(minute_llama: Network) -> None:
    found = METRICS["autoquantize_kl"](batch=2)(subject_of(minute_llama))
    for name in minute_llama.linears:
        for fmt in FORMATS:
            per_sequence = divergences(minute_llama, name, fmt).mean(1)
            assert found.values[entry(name, fmt)] == pytest.approx(float(per_sequence.mean()), rel=1e-6)
            error = float(per_sequence.std() / 5**0.5)
            assert found.error[entry(name, fmt)] == pytest.approx(error, rel=1e-6)


def test_without_subtraction_it_is_larger_by_the_entropy(minute_llama: Network) -> None:
    with_entropy = AutoQuantizeKL(subtract_entropy=False)(subject_of(minute_llama)).values
    divergence = AutoQuantizeKL(subtract_entropy=True)(subject_of(minute_llama)).values
    base = entropy(minute_llama)
    assert base > 1
    for key, value in divergence.items():
        assert value > 0
        assert with_entropy[key] - value == pytest.approx(base, rel=1e-9)


def test_the_ranking_in_a_linear_does_not_depend_on_the_entropy_but_none_versus_any_does(
    minute_llama: Network,
) -> None:
    """A linear that is not rounded at all costs 0, and that is what a linear of zeros has in any format."""
    name = minute_llama.linears[-1]
    minute_llama.overwrite(name, torch.zeros(minute_llama.shape(name)))
    with_entropy = AutoQuantizeKL(subtract_entropy=False)(subject_of(minute_llama)).values
    divergence = AutoQuantizeKL()(subject_of(minute_llama)).values
    assert sorted(divergence, key=divergence.__getitem__) == sorted(with_entropy, key=with_entropy.__getitem__)
    assert divergence[entry(name, FORMATS[0])] == 0
    assert with_entropy[entry(name, FORMATS[0])] == pytest.approx(entropy(minute_llama), rel=1e-5)


def test_the_next_tokens_do_not_matter_beyond_what_is_read(minute_llama: Network) -> None:
    """No labels: the last token is read and predicted from, like every other one."""
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 96
    key = entry(minute_llama.linears[-1], FORMATS[0])
    values = [
        AutoQuantizeKL()(Subject(minute_llama, t, t, FORMATS, no_statistics)).values[key] for t in (TOKENS, changed)
    ]
    assert values[0] != values[1]
