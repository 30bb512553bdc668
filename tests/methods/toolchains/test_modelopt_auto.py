"""AutoQuantize's plans, read from a state like the library's, and what becomes of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.packed import PackedDense
from kernels.packed_float import PackedFloat
from kernels.packed_tensor_float import PackedTensorFloat
from methods.base import Budget, Context
from methods.network import Network
from methods.toolchains.base import EFFECTIVE_BITS
from methods.toolchains.modelopt import ToolModelOpt, ToolModelOptPreset
from methods.toolchains.modelopt_auto import ToolModelOptAuto, counted, plan
from methods.toolchains.modelopt_formats import emulate_nvfp4
from methods.toolchains.modelopt_presets import presets
from methods.toolchains.process import Answer

BUDGET = Budget(effective_bits=6)


class Recipe:
    """Shown as the library shows a candidate."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"{self.name}(effective-bits: 4.5)"


class Amax:
    def __init__(self, amax: Tensor) -> None:
        self.amax = amax


def state(**recipes: str) -> dict[str, Any]:
    groups = {"a": ["q", "k"], "b": ["o"]}
    return {
        "best": {"recipe": {name: Recipe(recipe) for name, recipe in recipes.items()}},
        "candidate_stats": {name: {"module_names": modules} for name, modules in groups.items()},
    }


def test_a_plan_names_the_format_of_every_linear() -> None:
    assert plan(state(a="CUSTOM_1", b="NONE"), 2) == {"q": 1, "k": 1, "o": -1}
    with pytest.raises(ValueError, match="chose FP8_DEFAULT_CFG"):
        plan(state(a="FP8_DEFAULT_CFG", b="NONE"), 2)
    with pytest.raises(ValueError, match="chose CUSTOM_2"):
        plan(state(a="CUSTOM_2", b="NONE"), 2)


def tool(network: Network, claim: Callable[[float], float]) -> Callable[..., Answer]:
    """Answers with NVFP4, FP8 and no quantization in turn."""

    def answer(module: str, requirements: tuple[str, ...], settings: dict[str, Any]) -> Answer:
        assert json.loads(json.dumps(settings))["budget"]["effective_bits"] == 6
        tensors, bits, weights = {}, 0.0, 0
        for index, name in enumerate(network.linears):
            weight = network.weight(name)
            preset = list(presets(128).values())[-1 - index % 2]  # NVFP4, FP8
            found = preset.weights.read(Amax(weight.abs().amax()), weight) | {"input_maximum": torch.tensor(3.0)}
            rounded = emulate_nvfp4(weight, Amax(weight.abs().amax()))
            if index % 2:
                rounded = (weight / found["tensor_scale"]).to(torch.float8_e4m3fn).float() * found["tensor_scale"]
            if index % 3 == 2:
                found, rounded = {}, weight
            tensors |= {f"{name}/{key}": tensor for key, tensor in found.items()}
            tensors |= {f"{name}/weight": rounded, f"{name}/choice": torch.tensor(index % 2 if index % 3 < 2 else -1)}
            stored = preset.weights.stored_bits(network.shape(name)) if index % 3 < 2 else 16 * weight.numel()
            bits, weights = bits + stored, weights + weight.numel()
        tensors[EFFECTIVE_BITS] = torch.tensor(claim(bits / weights))
        return Answer(tensors, {}, 1.0, 1)

    return answer


@pytest.mark.parametrize(("claim", "warned"), [(lambda bits: bits, False), (lambda bits: bits - 0.2, True)])
def test_plans_are_packed_format_by_format_and_claims_compared(
    small_llama: Callable[..., Network],
    context: Callable[..., Context],
    caplog: pytest.LogCaptureFixture,
    claim: Callable[[float], float],
    warned: bool,
) -> None:
    network = small_llama()
    ctx = context(network, BUDGET, statistics=False)
    ctx.tools = tool(network, claim)
    with caplog.at_level(logging.WARNING):
        done = ToolModelOptAuto().quantize(ctx)
    kinds = [PackedFloat, PackedTensorFloat, PackedDense, PackedTensorFloat, PackedFloat, PackedDense]
    for index, name in enumerate(network.linears):
        assert type(done.packed[name]) is kinds[index % 6]
        assert (name in done.inputs) == (index % 3 < 2)
        error = (done.packed[name].dequantize() - network.weight(name)).norm() / network.weight(name).norm()
        assert error < {4: 0.15, 8: 0.04, 16: 1e-3}[int(done.packed[name].bits)]
    assert ("effective bits" in caplog.text) == warned


def test_a_count_is_of_codes_or_of_all_that_is_stored() -> None:
    known = presets(16)
    shapes = [(8, 64), (4, 32)]
    assert [counted(known[n], shapes, False) for n in ("int4_awq", "fp8", "nvfp4", "int8_smoothquant")] == [
        4,
        8,
        4.5,
        8,
    ]
    assert counted(known["int4_awq"], shapes, True) == 4 + 16 / 16
    assert counted(known["int8_smoothquant"], shapes, True) == 8 + (8 + 4) * 16 / (8 * 64 + 4 * 32)
    assert counted(known["fp8"], shapes, True) == 8 + 2 * 32 / (8 * 64 + 4 * 32)
    assert counted(known["nvfp4"], shapes, True) == 4.5 + 2 * 32 / (8 * 64 + 4 * 32)


def test_budgets_and_options_that_cannot_be_met(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    auto = ToolModelOptAuto()
    assert auto.supports(network, BUDGET) is None
    assert "counts 4.5 bits" in str(auto.supports(network, Budget(effective_bits=4.2)))
    assert "bound of 3 gigabops" in str(auto.supports(network, Budget(gigabops=3)))
    assert ToolModelOptAuto(("int4_awq", "fp8")).supports(network, Budget(effective_bits=4.2, group_size=32)) is None
    stored = ToolModelOptAuto(("int4_awq", "fp8"), count_stored=True)
    assert "counts 4.5 bits" in str(stored.supports(network, Budget(effective_bits=4.2, group_size=32)))
    for options, sentence in (
        ({"formats": ()}, "formats is empty"),
        ({"formats": ("nvfp5",)}, "unknown preset 'nvfp5'"),
        ({"score": "hessian"}, "unknown score 'hessian'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ToolModelOptAuto(**options)  # type: ignore[arg-type]


def test_presets_want_their_width(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    assert ToolModelOptPreset("fp8").supports(network, Budget(bits=8)) is None
    assert "has 8 bits, not 4" in str(ToolModelOptPreset("fp8").supports(network, Budget(bits=4)))
    assert "w4g128-sym" in str(ToolModelOptPreset("w4a8_awq").supports(network, Budget(bits=4)))
    assert ToolModelOptPreset("w4a8_awq").supports(network, Budget(bits=4, symmetric=True)) is None
    assert ToolModelOpt().supports(network, Budget(bits=3, symmetric=True)) is None
    assert "symmetric groups" in str(ToolModelOpt().supports(network, Budget(bits=3)))
    with pytest.raises(ValueError, match="unknown preset"):
        ToolModelOptPreset("fp9")
