"""What llm-compressor is told, and what becomes of its answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.accounting import packed_copy
from methods.base import Budget, Context
from methods.network import Network
from methods.toolchains.llmcompressor import MODIFIERS, LLMCompressor, ToolAWQ, ToolGPTQ, ToolSmoothQuant, _recipe
from methods.toolchains.process import Answer

W8A8 = Budget(bits=8, group_size=0, symmetric=True)
W4 = Budget(bits=4, group_size=32)


class Modifier:
    """One of the library's, that only remembers its options."""

    def __init__(self, **options: Any) -> None:
        self.options = options


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in MODIFIERS.values():
        stand_in = ModuleType(module)
        setattr(stand_in, name, type(name, (Modifier,), {}))
        monkeypatch.setitem(sys.modules, module, stand_in)


def told(method: LLMCompressor, budget: Budget) -> list[tuple[str, dict[str, Any]]]:
    """The recipe from settings that have travelled as JSON: names and options of modifiers."""
    settings = json.loads(json.dumps(method.settings(budget)))
    return [(type(modifier).__name__, modifier.options) for modifier in _recipe(settings)]


def groups(budget: Budget, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    weights = {"num_bits": budget.bits, "type": "int", "symmetric": budget.symmetric, "group_size": None}
    weights |= {"strategy": "group", "group_size": budget.group_size} if budget.group_size else {"strategy": "channel"}
    scheme = {"weights": weights, "input_activations": inputs, "targets": ["Linear"]}
    return {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}


@pytest.mark.usefixtures("library")
def test_recipes() -> None:
    assert told(ToolGPTQ(), W4) == [("GPTQModifier", groups(W4) | {"dampening_frac": 0.01, "actorder": None})]
    assert told(ToolAWQ(duo_scaling=False), W4) == [
        ("AWQModifier", {"duo_scaling": False}),
        ("QuantizationModifier", groups(W4)),
    ]
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}  # as in W8A8
    assert told(ToolSmoothQuant(), W8A8) == [
        ("SmoothQuantModifier", {"smoothing_strength": 0.5}),
        ("QuantizationModifier", groups(W8A8, tokens)),
    ]
    assert told(ToolSmoothQuant(0.8, gptq=True), W8A8) == [
        ("SmoothQuantModifier", {"smoothing_strength": 0.8}),
        ("GPTQModifier", groups(W8A8, tokens)),
    ]


def smoothed(network: Network, ctx: Context, strength: float) -> dict[str, Tensor]:
    """Weights and norm gains under the library's formula, not rounded."""
    weights = {name: network.weight(name) for name in network.linears}
    parameters = dict(network.model.named_parameters())
    changed = {}
    for group in network.groups:
        if group.producer is None or group.producer in network.linears:
            continue
        x: list[Tensor] = []
        handle = network.module(group.name).register_forward_pre_hook(lambda _, args, x=x: x.append(args[0]))
        network.logits(ctx.tokens)
        handle.remove()
        columns = torch.cat(x).flatten(0, -2)
        largest = torch.cat([weights[name] for name in group.linears]).abs().amax(0)
        scale = (columns.amax(0) - columns.amin(0)) ** strength / (2 * largest) ** (1 - strength)
        weights |= {name: weights[name] * scale for name in group.linears}
        changed[f"{group.producer}.weight"] = parameters[f"{group.producer}.weight"].detach() / scale
    return weights | changed


def tool(network: Network, ctx: Context, *, forget: bool = False) -> Callable[..., Answer]:
    """Answers as the library does: its symmetric grids have 255 steps between −max and max."""

    def answer(module: str, requirements: tuple[str, ...], settings: dict[str, Any]) -> Answer:
        assert module == "methods.toolchains.llmcompressor"
        found = smoothed(network, ctx, settings["modifiers"]["smoothquant"]["smoothing_strength"])
        tensors = {}
        for name in network.linears:
            weight = found.pop(name)
            scale = weight.abs().amax(1, keepdim=True) / 127.5
            tensors |= {f"{name}/weight": (weight / scale).round().clamp(-128, 127) * scale, f"{name}/scale": scale}
        return Answer(tensors, {} if forget else found, 1.0, 1)

    return answer


@torch.no_grad()
def test_the_smoothed_model_is_the_same_function(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, W8A8, statistics=False)
    ctx.tools = tool(network, ctx)
    done = ToolSmoothQuant(0.7).quantize(ctx)
    norms = ("input_layernorm", "post_attention_layernorm")
    assert set(done.parameters) == {f"model.layers.{i}.{norm}.weight" for i in (0, 1) for norm in norms}
    original = network.logits(ctx.tokens)

    def error(**changes: Any) -> float:
        logits = packed_copy(network, replace(done, **changes))(ctx.tokens).logits
        return float((logits - original).norm() / original.norm())

    assert error() < 0.05
    assert error(inputs={}) < error()  # inputs are rounded
    assert error(parameters={}) > 0.5  # and the gains belong to the weights


def test_inputs_are_rounded_token_by_token(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, W8A8, statistics=False)
    ctx.tools = tool(network, ctx)
    done = ToolSmoothQuant().quantize(ctx)
    assert set(done.inputs) == set(network.linears)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [10], [100]])
    scale = x.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(done.inputs[network.linears[0]](x), (x / scale).round() * scale)


def test_what_cannot_be_is_refused(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network, method = small_llama(), ToolSmoothQuant()
    assert method.supports(network, W8A8) is None
    for budget in (Budget(bits=8, group_size=0), Budget(bits=8, symmetric=True), Budget(bits=4, symmetric=True)):
        assert "take w8channel-sym" in (method.supports(network, budget) or "")
    assert "bound" in (method.supports(network, Budget(effective_bits=8)) or "")
    with pytest.raises(ValueError, match=r"strength=1\.5 is outside"):
        ToolSmoothQuant(strength=1.5)
    ctx = context(network, W8A8, statistics=False)
    ctx.tools = tool(network, ctx, forget=True)
    with pytest.raises(ValueError, match="smoothed nothing"):
        method.quantize(ctx)
