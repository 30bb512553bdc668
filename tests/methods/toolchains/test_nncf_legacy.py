"""The plain Llama against the library's, the budget in the tool's terms by brute force, and what the tool answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.base import Budget, Context
from methods.formats.integer import Integer
from methods.network import Network
from methods.toolchains.nncf_legacy import (
    INITIALIZERS,
    ToolNNCFHAWQ,
    code_bits,
    configuration,
    predicted,
    read,
)
from methods.toolchains.plain_llama import PlainLlama, plain_name, why_not
from methods.toolchains.process import Answer

Build = Callable[..., Network]
Given = Callable[..., Context]

OPTIONS: dict[str, Any] = {
    "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    "attention_bias": True,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
WIDTHS = (2, 4, 8)
SHAPES = [(8, 64), (4, 128), (16, 30)]


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_the_plain_form_computes_what_the_model_computes(small_llama: Build, options: dict[str, Any]) -> None:
    network = small_llama(**options)
    plain = PlainLlama(network.model, 9)
    tokens = torch.randint(96, (3, 10), generator=torch.Generator().manual_seed(1))
    inputs, targets = plain.text(tokens).tensors
    assert torch.equal(targets, tokens[:, 1:])
    with torch.no_grad():
        expected = network.logits(tokens[:, :-1]).flatten(0, 1)
        traced = torch.fx.symbolic_trace(plain)
        for computed in (plain(inputs), traced(inputs), traced(inputs[:2])):
            assert torch.allclose(computed, expected[: len(computed)], atol=1e-4 * expected.abs().max().item())


def test_the_plain_form_has_the_linears_of_the_model_and_no_other_parameters(small_llama: Build) -> None:
    network = small_llama(**OPTIONS)
    network.model.requires_grad_(False)
    plain = PlainLlama(network.model, 9)
    for name in network.linears:
        assert plain.get_submodule(plain_name(name)) is network.linear(name)
    own = {id(p) for name in network.linears for p in network.linear(name).parameters()}
    assert {id(p) for p in plain.parameters()} == own
    weights = {id(network.linear(name).weight) for name in network.linears}
    assert {id(p) for p in network.model.parameters() if p.requires_grad} == weights
    with pytest.raises(ValueError, match="lm_head is no linear of a block"):
        plain_name("lm_head")


def test_a_model_that_is_no_plain_llama_is_refused(small_llama: Build) -> None:
    with pytest.raises(ValueError, match="misses its logits"):
        PlainLlama(small_llama(hidden_act="gelu").model, 9)
    assert why_not(small_llama().model) is None
    assert "type is unknown" in str(why_not(nn.Linear(2, 2)))


def plans(shapes: list[tuple[int, int]]) -> list[dict[tuple[int, tuple[int, int]], int]]:
    return [dict(zip(enumerate(shapes), plan, strict=True)) for plan in product(WIDTHS, repeat=len(shapes))]


def codes(plan: Mapping[tuple[int, tuple[int, int]], int]) -> float:
    """Bits a weight of codes alone."""
    return sum(w * s[0] * s[1] for (_, s), w in plan.items()) / sum(s[0] * s[1] for _, s in plan)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("limit", [3.0, 4.5, 6.0])
def test_what_the_tool_may_choose_is_what_the_budget_allows(limit: float, symmetric: bool) -> None:
    left = code_bits(SHAPES, limit, WIDTHS, symmetric)
    missed = 0
    for plan in plans(SHAPES):
        stored = sum(Integer(w, symmetric=symmetric).stored_bits(s) for (_, s), w in plan.items())
        fits = stored <= limit * sum(s[0] * s[1] for _, s in plan)
        assert fits or codes(plan) > left
        missed += fits and codes(plan) > left
    assert missed <= 2
    assert code_bits(SHAPES, 100.0, WIDTHS) == 8
    assert code_bits([(8, 64)], 4.5, [4, 8], True) == 4.5 - 16 / 64


@pytest.mark.parametrize("left", [2.0, 3.1, 4.0, 6.5, 8.0])
def test_ratios_are_those_of_the_library(left: float) -> None:
    """HAWQ: 8 bits for every multiplication, to those of the plan. AutoQ: codes to 32 bits."""
    options = ToolNNCFHAWQ().settings(Budget(effective_bits=4))
    hawq = INITIALIZERS["hawq"](options, left, None)[0]["compression_ratio"]
    autoq = INITIALIZERS["autoq"](options, left, None)[0]["compression_ratio"]
    for plan in plans(SHAPES):
        multiplications = {key: key[1][0] * key[1][1] for key in plan}
        operations = sum(plan[key] * count for key, count in multiplications.items())
        assert (8 * sum(multiplications.values()) / operations >= hawq) == (codes(plan) <= left)
        assert (operations <= 32 * sum(multiplications.values()) * autoq) == (codes(plan) <= left)
    assert 1 <= hawq <= 4  # of 8 bits everywhere and of 2: the library refuses what lies beyond


class Quantizer:
    """Rounds as the library does: between `low` and `high`, at levels from `lowest` on."""

    def __init__(self, width: int, low: Tensor, high: Tensor, lowest: int) -> None:
        self.num_bits, self.lowest = width, lowest
        self.scale = (high - low) / (2**width - 1)
        self.zero = lowest - (low / self.scale).round()

    def get_parameters_for_torch_fq(self) -> tuple[int, int, Tensor, Tensor]:
        return self.lowest, self.lowest + 2**self.num_bits - 1, self.scale.view(-1), self.zero.view(-1).int()

    def __call__(self, weight: Tensor) -> Tensor:
        steps = (weight / self.scale + self.zero).round()
        return (steps.clamp(self.lowest, self.lowest + 2**self.num_bits - 1) - self.zero) * self.scale


def quantized(weight: Tensor, width: int, symmetric: bool, lowest: int = 0) -> Any:
    """A linear of the library's."""
    if symmetric:
        high = weight.abs().amax(1, keepdim=True)
        quantizer = Quantizer(width, -high * 2 ** (width - 1) / (2 ** (width - 1) - 1), high, -(2 ** (width - 1)))
    else:
        step = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / (2**width - 1)
        low = (weight.amin(1, keepdim=True) / step).round() * step
        quantizer = Quantizer(width, low, low + step * (2**width - 1), lowest)
    return SimpleNamespace(weight=weight, pre_ops={"0": SimpleNamespace(op=quantizer)})


def width(name: str) -> int:
    return {"v_proj": 8, "down_proj": 2}.get(name.rsplit(".", 1)[1], 4)


@pytest.mark.parametrize(("symmetric", "lowest"), [(True, 0), (False, 0), (False, -128)])
def test_each_linear_is_packed_in_its_width(small_llama: Build, context: Given, symmetric: bool, lowest: int) -> None:
    network = small_llama()
    modules = {n: quantized(network.weight(n), width(n), symmetric, lowest) for n in network.linears}

    def tools(module: str, requirements: Any, settings: Mapping[str, Any]) -> Answer:
        assert module.endswith("nncf_legacy")
        assert Budget(**json.loads(json.dumps(settings))["budget"]).effective_bits == 4.8
        found = {f"{n}/{key}": t for n, m in modules.items() for key, t in read(m, symmetric).items()}
        return Answer(found, {}, 1.0, 1)

    budget = Budget(effective_bits=4.8, symmetric=symmetric)
    done = ToolNNCFHAWQ().quantize(replace(context(network, budget), tools=tools))
    for name, packed in done.packed.items():
        expected = modules[name].pre_ops["0"].op(network.weight(name))
        assert torch.allclose(packed.dequantize(), expected, atol=2e-3 * expected.abs().max().item())
        assert packed.stored_bits() == Integer(width(name), symmetric=symmetric).stored_bits(network.shape(name))
    assert not done.inputs


def test_a_width_that_the_tool_does_not_have_is_refused(small_llama: Build, context: Given) -> None:
    network = small_llama()
    found = {}
    for name in network.linears:
        tensors = read(quantized(network.weight(name), 4, False), False) | {"width": torch.tensor(2)}
        found |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    ctx = replace(context(network, Budget(effective_bits=4.8)), tools=lambda *_: Answer(found, {}, 1.0, 1))
    with pytest.raises(ValueError, match="2-bit grid"):
        ToolNNCFHAWQ().quantize(ctx)


def test_only_linears_of_blocks_are_quantized() -> None:
    linears = ["model.layers.3.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    told = configuration(linears, (10, 7, 64), {"type": "hawq"}, symmetric=True)
    quantization = told["compression"]
    assert told["input_info"] == [{"sample_size": [1, 7, 64]}]
    assert quantization["weights"]["target_scopes"] == quantization["activations"]["target_scopes"]
    assert quantization["weights"]["target_scopes"] == [
        "PlainLlama/ModuleList[blocks]/_Block[3]/NNCFLinear[up_proj]/linear_0",
        "PlainLlama/ModuleList[blocks]/_Block[0]/NNCFLinear[q_proj]/linear_0",
    ]
    assert quantization["weights"]["mode"] == "symmetric"
    assert configuration(linears, (1, 7, 64), {}, symmetric=False)["compression"]["weights"]["mode"] == "asymmetric"


def test_the_reward_is_the_share_of_tokens_predicted_without_rounded_inputs() -> None:
    state = {"a": True, "b": True}

    class Model:
        """Predicts token 1 always; rounded inputs would be in the way."""

        nncf = SimpleNamespace(
            external_quantizers={n: SimpleNamespace(disable_quantization=lambda n=n: state.pop(n)) for n in "ab"}
        )

        def __call__(self, inputs: Tensor) -> Tensor:
            assert not state
            return torch.tensor([0.0, 1.0, 0.5]).expand(inputs.shape[0] * inputs.shape[1], 3)

    batches = [(torch.zeros(2, 2, 5), torch.tensor([[1, 0], [2, 1]])), (torch.zeros(1, 2, 5), torch.tensor([[1, 1]]))]
    assert predicted(Model(), batches) == pytest.approx(100 * 4 / 6)


def test_what_it_cannot_do_is_refused_in_words(small_llama: Build) -> None:
    network = small_llama()
    tool = ToolNNCFHAWQ()
    assert tool.supports(network, Budget(effective_bits=4.8)) is None
    assert "at 2 bits" in str(tool.supports(network, Budget(effective_bits=2.1)))
    assert "0.5 gigabops" in str(tool.supports(network, Budget(gigabops=0.5)))
    for options, sentence in (
        ({"initializer": "hawk"}, "unknown initializer 'hawk'"),
        ({"bits": ()}, "are no widths"),
        ({"bits": (1, 4)}, "are no widths"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ToolNNCFHAWQ(**options)  # type: ignore[arg-type]
