"""Fixtures for Hessians: a model small enough for the dense matrix, and a loss with a known spectrum."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods.network import Block, Group, Network
from methods.sensitivity.hvp import mean_loss


@pytest.fixture
def minute_llama(small_llama: Callable[..., Network]) -> Network:
    """One block, hidden 8, FFN 12; 456 weights in linears."""
    return small_llama(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )


@pytest.fixture
def dense_hessian() -> Callable[[Network, Tensor, str], Tensor]:
    """The Hessian [n, n] of the mean next-token loss in the n weights of one linear."""

    def compute(network: Network, tokens: Tensor, linear: str) -> Tensor:
        shape = network.shape(linear)

        def loss(flat: Tensor) -> Tensor:
            parameters = {f"{linear}.weight": flat.view(shape)}
            logits = functional_call(network.model, parameters, kwargs={"input_ids": tokens, "use_cache": False}).logits
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        with torch.enable_grad():
            return torch.autograd.functional.hessian(loss, network.weight(linear).flatten())

    return compute


@pytest.fixture
def quadratic(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[float]]], Network]:
    """Builds a network of linears with a loss ½ Σ aᵢwᵢ² each: their Hessians are diagonal, with the aᵢ given."""

    def build(spectra: dict[str, list[float]]) -> Network:
        layers = {name: nn.Linear(len(values), 1, bias=False) for name, values in spectra.items()}
        model = nn.ModuleDict(layers)
        model.config = SimpleNamespace(_attn_implementation="eager")  # type: ignore[assignment]

        def loss(network: Network, tokens: Tensor) -> Tensor:
            del tokens
            terms = [torch.tensor(a) @ network.linear(n).weight[0] ** 2 / 2 for n, a in spectra.items()]
            return torch.stack(terms).sum()

        monkeypatch.setattr(f"{mean_loss.__module__}.{mean_loss.__name__}", loss)
        groups = tuple(Group((name,), None, name) for name in spectra)
        return Network(model, (Block("block", groups),))

    return build
