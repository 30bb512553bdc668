"""Fixtures for all tests: small random models, and the context that the harness would give a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from methods.base import Budget, Context, Stat
from methods.network import Network, discover, hooks

VOCABULARY = 96

REDUCTIONS: dict[Stat, Callable[[Tensor], Tensor]] = {
    Stat.GRAM: lambda x: x.T @ x / len(x),
    Stat.MEAN_ABS: lambda x: x.abs().mean(0),
    Stat.MAX_ABS: lambda x: x.abs().amax(0),
    Stat.MEAN: lambda x: x.mean(0),
    Stat.MEAN_SQUARE: lambda x: x.square().mean(0),
}


@pytest.fixture
def small_llama() -> Callable[..., Network]:
    """Builds a random Llama with grouped-query attention: 2 blocks, hidden 64, FFN 96."""

    def build(seed: int = 0, **options: Any) -> Network:
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        config = LlamaConfig(**(sizes | options))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).eval()
            for parameter in model.parameters():  # larger than the usual initialization: visible nonlinearity
                torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.3)
        return discover(model, config.vocab_size)

    return build


@pytest.fixture
def context() -> Callable[..., Context]:
    """Builds the context of a method: random tokens, and statistics collected directly."""

    def build(
        network: Network, budget: Budget | None = None, tokens: Tensor | None = None, statistics: bool = True
    ) -> Context:
        generator = torch.Generator().manual_seed(0)
        if tokens is None:
            tokens = torch.randint(VOCABULARY, (10, 16), generator=generator)
        return Context(
            network=network,
            tokens=tokens,
            scoring=torch.randint(VOCABULARY, (4, 16), generator=generator),
            statistics=_statistics(network, tokens) if statistics else _none,
            budget=budget or Budget(bits=3, group_size=32),
            generator=generator,
        )

    return build


def _none(stat: Stat, linear: str) -> Tensor:
    raise KeyError(f"{stat} of {linear}: this context was built without statistics")


@torch.no_grad()
def _statistics(network: Network, tokens: Tensor) -> Callable[[Stat, str], Tensor]:
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args[0].flatten(0, -2))

    with hooks([network.linear(n).register_forward_pre_hook(keep(n)) for n in network.linears]):
        network.logits(tokens)
    return lambda stat, name: REDUCTIONS[stat](inputs[name])
