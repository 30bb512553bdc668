import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

from methods.base import Stat
from methods.formats.integer import Integer
from methods.network import Network, hooks
from methods.sensitivity.base import Subject, entry
from methods.sensitivity.gradients import propagate
from methods.sensitivity.kfac import KFAC

TOKENS = torch.randint(96, (4, 7), generator=torch.Generator().manual_seed(1))
FORMATS = (Integer(2, 0), Integer(3, 4))


def inputs(network: Network, tokens: Tensor, name: str) -> Tensor:
    """Of one linear: [sequences, length, in]."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        found.append(args[0])

    with hooks([network.linear(name).register_forward_pre_hook(keep)]), torch.no_grad():
        network.logits(tokens)
    return found[0]


def test_losses_are_those_of_the_factors(minute_llama: Network) -> None:
    generator = torch.Generator().manual_seed(3)
    grams = {}
    for name in minute_llama.linears:
        x = torch.randn(20, minute_llama.shape(name)[1], generator=generator)
        grams[name] = x.T @ x / 20

    def statistics(stat: Stat, linear: str) -> Tensor:
        assert stat == Stat.GRAM
        return grams[linear]

    subject = Subject(minute_llama, TOKENS, TOKENS, FORMATS, statistics, seed=5)
    factors = {name: torch.zeros(2 * minute_llama.shape(name)[:1]) for name in minute_llama.linears}

    def accumulate(name: str, x: Tensor, g: Tensor) -> None:
        factors[name] += g.T @ g / (4 * 6)

    labels = subject.generator()
    for text in TOKENS:
        propagate(minute_llama, text, accumulate, labels)
    found = KFAC()(subject)
    for name in minute_llama.linears:
        for fmt in FORMATS:
            delta = subject.delta(name, fmt)
            loss = float(torch.trace(delta @ grams[name] @ delta.T @ factors[name])) / 2
            assert found.values[entry(name, fmt)] == pytest.approx(loss, rel=1e-4)
            assert 0 < found.error[entry(name, fmt)] < loss


def test_for_a_single_token_it_is_the_gauss_newton_quadratic_form(minute_llama: Network) -> None:
    text = TOKENS[:1, :2]  # one token is predicted, from the other
    tokens = text.expand(150, -1)

    seen = {name: inputs(minute_llama, text, name)[0, 0] for name in minute_llama.linears}
    grams = {name: torch.outer(x, x) for name, x in seen.items()}
    subject = Subject(minute_llama, tokens, tokens, FORMATS, lambda stat, linear: grams[linear])
    found = KFAC(sequences=150)(subject)
    compared = 0
    for name in minute_llama.linears:

        def logits(weight: Tensor, name: str = name) -> Tensor:
            arguments = {"input_ids": text, "use_cache": False}
            return functional_call(minute_llama.model, {f"{name}.weight": weight}, kwargs=arguments).logits[0, 0]

        weight = minute_llama.weight(name)
        with torch.no_grad():
            p, jacobian = logits(weight).softmax(-1), jacfwd(logits)(weight)
        for fmt in FORMATS:
            moved = (jacobian * subject.delta(name, fmt)).sum((1, 2))
            form = float(p @ moved**2 - (p @ moved) ** 2) / 2
            key = entry(name, fmt)
            assert abs(found.values[key] - form) <= 4 * found.error[key] + 1e-12
            compared += found.error[key] < 0.2 * form
    assert compared >= 8  # a first token attends to itself alone, so queries and keys do not matter
