"""Accuracy control: what an OpenVINO graph says of each linear, and what becomes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import QuantLinear
from kernels.packed import PackedDense, PackedInteger
from methods.base import Budget, Context
from methods.formats.integer import Integer
from methods.network import Network
from methods.toolchains import nncf_accuracy
from methods.toolchains.base import Work
from methods.toolchains.nncf_accuracy import NonNegative, ToolNNCFAccuracy, negative_losses, others, read, run, step
from methods.toolchains.process import Answer

BUDGET = Budget(bits=8, group_size=0, symmetric=True)


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """OpenVINO's definition of the operator."""
    x = torch.minimum(torch.maximum(x, low), high)
    return torch.round((x - low) / (high - low) * (levels - 1)) / (levels - 1) * (high - low) + low


def symmetric(largest: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """NNCF's range: an even number of levels has one more below zero than above."""
    return -largest * (levels // 2) / ((levels - 1) // 2), largest


def weight_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    return symmetric(weight.abs().amax(1, keepdim=True), 255)


class Node:
    """An operator of an OpenVINO graph; of a constant, and of what is made of constants, with its value."""

    def __init__(self, kind: str, name: str = "", inputs: tuple[Node, ...] = (), value: Any = None, levels: int = 0):
        self.kind, self.name, self.inputs, self.value, self.levels = kind, name, inputs, value, levels
        self.uses: list[tuple[Node, int]] = []
        for index, node in enumerate(inputs):
            node.uses.append((self, index))

    def get_type_name(self) -> str:
        return self.kind

    def get_friendly_name(self) -> str:
        return self.name

    def get_attributes(self) -> dict[str, Any]:
        return {"levels": self.levels}

    def input_value(self, port: int) -> Output:
        return Output(self.inputs[port])

    def output(self, port: int) -> Output:
        assert port == 0
        return Output(self)


class Output:
    def __init__(self, node: Node) -> None:
        self.node = node

    def get_node(self) -> Node:
        return self.node

    def get_target_inputs(self) -> list[Use]:
        return [Use(*use) for use in self.node.uses]


class Use(Output):
    def __init__(self, node: Node, index: int) -> None:
        super().__init__(node)
        self.index = index

    def get_index(self) -> int:
        return self.index


class Graph:
    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def get_ops(self) -> list[Node]:
        return self.nodes

    def add(self, kind: str, *args: Any, **options: Any) -> Node:
        self.nodes.append(Node(kind, *args, **options))
        return self.nodes[-1]

    def constant(self, value: Tensor) -> Node:
        return self.add("Constant", value=value)

    def rounded(self, node: Node, low: Tensor, high: Tensor, levels: int) -> Node:
        value = None if node.value is None else fake_quantize(node.value, low, high, levels)
        ends = tuple(map(self.constant, (low, high, low, high)))
        return self.add("FakeQuantize", "", (node, *ends), value=value, levels=levels)

    def product(self, linear: str, x: Node, weight: Node) -> Node:
        return self.add("MatMul", f"__module.model.{linear}/aten::linear/MatMul", (x, weight))


def known(nodes: Mapping[str, Node]) -> dict[str, Tensor]:
    assert all(node.value is not None for node in nodes.values())
    return {key: node.value.clone() for key, node in nodes.items()}


def test_a_graph_tells_what_each_linear_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nncf_accuracy, "values", known)
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 4, bias=name != "k") for name in ("q", "k", "fc2", "free", "q2")})
    weights = {name: module.weight.detach() for name, module in model.items()}
    before, graph = model["q"].bias.detach().clone(), Graph()
    x, zero = graph.add("Parameter", "x"), torch.zeros(())
    shared = graph.rounded(x, *symmetric(torch.tensor(3.0), 256), 256)
    positive = graph.rounded(graph.add("Relu", "", (x,)), zero, torch.tensor(2.0), 256)
    corrected = {name: torch.randn(1, 1, 4) for name in ("q", "fc2", "free")}
    for name, source in (("q", shared), ("k", shared), ("fc2", positive), ("free", x), ("q2", x)):
        constant = graph.constant(weights[name])
        held = constant if source is x else graph.rounded(constant, *weight_range(weights[name]), 255)
        product = graph.product(name, source, held)
        if name in corrected:
            graph.add("Add", "", (graph.constant(corrected[name]), product))
        if name == "k":
            graph.add("Add", "", (product, x))  # a residual stream is no bias
    found = read(graph, model, ["q", "k", "fc2", "free"])

    for name in ("q", "k", "fc2"):
        low, high = weight_range(weights[name])
        torch.testing.assert_close(found[f"{name}/weight"], fake_quantize(weights[name], low, high, 255))
        torch.testing.assert_close(found[f"{name}/weight_step"], high / 127)
    assert torch.equal(found["free/weight"], weights["free"])
    assert sorted(key for key in found if key.startswith("free")) == ["free/weight"]
    assert found["q/input_step"] == found["k/input_step"] == pytest.approx(3 / 127)
    assert found["q/input_low"] < 0
    assert found["fc2/input_step"] == pytest.approx(2 / 255)
    assert found["fc2/input_low"] == 0
    assert not any(key.startswith("q2") or "bias" in key for key in found)
    assert not torch.equal(before, model["q"].bias)
    for name, bias in corrected.items():
        assert torch.equal(model[name].bias, bias.flatten())


@pytest.mark.parametrize("levels", [255, 256])
def test_steps_of_symmetric_and_of_non_negative_grids(levels: int) -> None:
    low, high = symmetric(torch.tensor([[3.0], [0.01]]), levels)
    for lowest in (low, torch.zeros_like(low)):
        points = torch.stack([torch.linspace(a.item(), b.item(), levels) for a, b in zip(lowest, high, strict=True)])
        torch.testing.assert_close(step(lowest, high, levels), points.diff(dim=1).mean(1, keepdim=True))
        assert (points.abs().amin(1) < 1e-5 * high[:, 0]).all()
    with pytest.raises(ValueError, match="neither in its middle nor as its lowest"):
        step(low * 0.9, high, levels)


def test_inputs_that_are_never_negative_use_all_numbers() -> None:
    x = torch.cat(
        [torch.rand(500, generator=torch.Generator().manual_seed(0)) * 3 - 0.2, torch.tensor([-1.0, 0, 2, 9])]
    )
    tensors = {"input_step": torch.tensor(2 / 255), "input_low": torch.tensor(0.0)}
    rounding = ToolNNCFAccuracy().rounding(BUDGET, tensors)
    assert rounding is not None
    torch.testing.assert_close(rounding(x), fake_quantize(x, torch.tensor(0.0), torch.tensor(2.0), 256))
    assert rounding.bits == 8
    assert torch.equal(
        NonNegative().encode(torch.tensor([-3.0, 7.2, 300.0, torch.inf])).int(), torch.tensor([0, 7, 255, 255])
    )


def tool(network: Network, reverted: Callable[[str], bool], largest: float) -> Callable[..., Answer]:
    """Answers as `run` does, with INT8 for linears that are not reverted."""

    def answer(module: str, requirements: tuple[str, ...], settings: dict[str, Any]) -> Answer:
        assert json.loads(json.dumps(settings))["max_drop"] == 0.5
        tensors = {}
        low, high = symmetric(torch.tensor(largest), 256)
        for name in network.linears:
            weight = network.weight(name)
            tensors[f"{name}/weight"] = weight
            if not reverted(name):
                ends = weight_range(weight)
                tensors[f"{name}/weight"] = fake_quantize(weight, *ends, 255)
                tensors |= {f"{name}/weight_step": step(*ends, 255), f"{name}/weight_low": ends[0]}
                tensors |= {f"{name}/input_step": step(low, high, 256), f"{name}/input_low": low}
        return Answer(tensors, {}, 1.0, 1)

    return answer


def test_linears_are_packed_as_the_tool_left_them(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network, largest = small_llama(), 3.0
    ctx = context(network, BUDGET, statistics=False)
    ctx.tools = tool(network, lambda name: "down_proj" in name, largest)
    done = ToolNNCFAccuracy(max_drop=0.5).quantize(ctx)
    assert set(done.inputs) == {name for name in network.linears if "down_proj" not in name}
    low, high = symmetric(torch.tensor(largest), 256)
    for name, packed in done.packed.items():
        weight, (out, columns) = network.weight(name), network.shape(name)
        x = torch.randn(5, columns).clamp(-largest, largest)
        y = QuantLinear(packed, None, done.inputs.get(name))(x)
        if "down_proj" in name:
            assert type(packed) is PackedDense
            assert packed.stored_bits() == 16 * out * columns
            torch.testing.assert_close(y, x @ weight.T, rtol=1e-2, atol=1e-2)
        else:
            assert type(packed) is PackedInteger
            assert packed.stored_bits() == Integer(8, 0, symmetric=True).stored_bits((out, columns))
            expected = fake_quantize(x, low, high, 256) @ fake_quantize(weight, *weight_range(weight), 255).T
            assert (y - expected).abs().max() < 1e-3 * expected.abs().max()  # scales are kept in fp16


def test_all_but_the_linears_are_ignored(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    first, pattern = network.linears[0], re.compile(others(network.linears))
    for name in network.linears:
        assert not pattern.match(f"__module.model.{name}/aten::linear/MatMul")

    for name in ("lm_head", "model.norm", "model.layers.0.self_attn", f"{first}x"):
        assert pattern.match(f"__module.model.{name}/aten::linear/MatMul")
    assert pattern.match("Parameter_7")


def test_the_metric_falls_as_the_loss_rises() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (3, 5), generator=generator)
    logits = {tuple(row.tolist()): torch.randn(1, 5, 7, generator=generator) for row in tokens}

    def model(item: list[np.ndarray]) -> list[np.ndarray]:
        return [logits[tuple(item[0][0].tolist())].numpy()]

    mean, each = negative_losses(model, [[row[None].numpy()] for row in tokens])
    stacked = torch.cat([logits[tuple(row.tolist())] for row in tokens])
    loss = F.cross_entropy(stacked[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert mean == pytest.approx(-loss.item())
    assert mean == pytest.approx(sum(each) / 3)
    assert len(set(each)) == 3


def test_refusals(small_llama: Callable[..., Network]) -> None:
    network, method = small_llama(), ToolNNCFAccuracy()
    assert method.supports(network, BUDGET) is None
    assert method.supports(network, Budget(bits=8, group_size=0)) is None
    for budget in (Budget(bits=8, group_size=32), Budget(bits=4, group_size=0)):
        assert "take w8channel-sym" in str(method.supports(network, budget))
    assert "bound of 6 effective bits" in str(method.supports(network, Budget(effective_bits=6)))
    for options, sentence in (
        ({"max_drop": -0.1}, "max_drop=-0.1 is negative"),
        ({"max_num_iterations": -1}, "max_num_iterations=-1 is negative"),
        ({"ranking_subset_size": 0}, "ranks by nothing"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ToolNNCFAccuracy(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one sequence"):
        run(nn.Module(), Work("", torch.zeros(1, 4, dtype=torch.int64), ()), {})
