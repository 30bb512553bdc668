"""Reading NNCF's grids, whose symmetric ones have scales of either sign."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.base import Budget
from methods.formats.integer import Integer
from methods.lora_correction import Corrected
from methods.network import Network
from methods.toolchains import nncf
from methods.toolchains.nncf import ToolNNCF, dequantized, others, read

WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) + 0.3


def symmetric(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """NNCF's: the weight that is largest in its group gets the lowest of the codes −2**(bits − 1) to 2**(bits − 1) − 1,
    by the sign of the scale."""
    half = 2 ** (bits - 1)
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    scale = (-largest / half).half().float()
    return (weight / scale).round().clamp(-half, half - 1), scale


def tensors(width: int, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> dict[str, Tensor]:
    return dequantized(codes, scale, zero) | {"width": torch.tensor(width)}


def test_asymmetric_groups_are_packed_exactly() -> None:
    budget = Budget(bits=4, group_size=16)
    grid = budget.format().fit(WEIGHT)
    codes = grid.encode(WEIGHT).float().view(6, 4, 16)
    packed = ToolNNCF().packed(budget, tensors(4, codes, grid.scale[..., None], grid.zero[..., None]))
    assert torch.equal(packed.dequantize(), grid.snap(WEIGHT))
    assert packed.stored_bits() == budget.format().stored_bits((6, 64))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_grids_keep_the_sign_of_their_scales(bits: int) -> None:
    budget = Budget(bits=bits, group_size=16, symmetric=True)
    codes, scale = symmetric(WEIGHT.view(6, 4, 16), bits)
    assert (scale < 0).any() and (scale > 0).any()
    expected = (codes * scale).view(6, 64)
    offset = torch.tensor(float(2 ** (bits - 1)))
    for told in (tensors(bits, codes, scale), tensors(bits, codes + offset, scale, offset)):
        packed = ToolNNCF().packed(budget, told)
        assert torch.equal(packed.dequantize(), expected)
        assert packed.stored_bits() == budget.format().stored_bits((6, 64))
        x = torch.randn(3, 64)
        torch.testing.assert_close(packed(x), x @ expected.T)


def test_linears_of_the_backup_format_are_packed_per_channel() -> None:
    grid = Integer(8, 0).fit(WEIGHT)
    told = tensors(8, grid.encode(WEIGHT).float(), grid.scale, grid.zero)
    packed = ToolNNCF(ratio=0.5).packed(Budget(bits=4, group_size=16), told)
    assert torch.equal(packed.dequantize(), grid.snap(WEIGHT))
    assert packed.stored_bits() == Integer(8, 0).stored_bits((6, 64))


def test_a_width_that_is_no_witness_is_refused() -> None:
    grid = Integer(8, 0).fit(WEIGHT)
    told = tensors(4, grid.encode(WEIGHT).float(), grid.scale, grid.zero)
    with pytest.raises(ValueError, match="4-bit grid"):
        ToolNNCF().packed(Budget(bits=4, group_size=0), told)


class Constant:
    """A constant of an OpenVINO model, or another operator."""

    def __init__(self, name: str, kind: str = "Constant", width: int = 4, value: Tensor | None = None) -> None:
        self.name, self.kind, self.width, self.value = name, kind, width, value

    def get_friendly_name(self) -> str:
        return self.name

    def get_type_name(self) -> str:
        return self.kind

    def get_element_type(self) -> SimpleNamespace:
        return SimpleNamespace(bitwidth=self.width)


def test_constants_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def values(constants: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: constant.value for name, constant in constants.items()}

    monkeypatch.setattr(nncf, "values", values)
    codes, scale = symmetric(WEIGHT.view(6, 4, 16), 4)
    ops = [
        Constant("self.model.a.weight", value=codes),
        Constant("self.model.a.weight/scale", value=scale),
        Constant("self.model.head.weight", value=WEIGHT),
        Constant("self.model.b.weight", value=WEIGHT),
    ]
    model = SimpleNamespace(get_ops=lambda: ops)
    found = read(model, ["a", "b"])
    assert sorted(found) == ["a/scale", "a/weight", "a/width"]  # b was left as it was
    torch.testing.assert_close(found["a/weight"], (codes * scale).view(6, 64))
    ops.append(Constant("x/awq_mul", kind="Multiply"))
    with pytest.raises(ValueError, match="multiplies activations at x/awq_mul"):
        read(model, ["a"])


def thin(generator: torch.Generator, rows: int, columns: int) -> dict[str, Tensor]:
    """Asymmetric INT8 as constants hold it, and the matrix it stands for."""
    codes = torch.randint(256, (rows, columns), generator=generator).float()
    scale = (torch.rand(rows, 1, generator=generator) / 64 + 2.0**-8).half().float()
    zero = torch.randint(256, (rows, 1), generator=generator).float()
    return {"": codes, "/scale": scale, "/zero_point": zero, "matrix": (codes - zero) * scale}


def test_a_correction_is_read_packed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nncf, "values", lambda constants: {name: c.value for name, c in constants.items()})
    generator = torch.Generator().manual_seed(1)
    grid = Integer(4, 16).fit(WEIGHT)
    own = {"": grid.encode(WEIGHT).float().view(6, 4, 16), "/scale": grid.scale[..., None]}
    own["/zero_point"] = grid.zero[..., None]
    held = {"self.model.b.1.weight": own}
    held["__module.model.b.1/aten::linear/MatMul_lora_A"] = first = thin(generator, 2, 64)
    held["__module.model.b.1/aten::linear/MatMul_lora_B"] = second = thin(generator, 6, 2)
    held["__module.model.b.11/aten::linear/MatMul_lora_A"] = thin(generator, 2, 64)
    held["__module.model.bx1/aten::linear/MatMul_lora_B"] = thin(generator, 6, 2)
    ops = [
        Constant(name + end, value=value, width=8 if "lora" in name else 4)
        for name, parts in held.items()
        for end, value in parts.items()
    ]
    found = read(SimpleNamespace(get_ops=lambda: ops), ["b.1"])
    told = {key.removeprefix("b.1/"): tensor for key, tensor in found.items()}
    packed = ToolNNCF(lora=True).packed(Budget(bits=4, group_size=16), told)
    product = second["matrix"] @ first["matrix"]
    torch.testing.assert_close(packed.dequantize(), grid.snap(WEIGHT) + product)
    assert packed.stored_bits() == Corrected(Integer(4, 16), 2).stored_bits((6, 64))
    x = torch.randn(3, 64, generator=generator)
    torch.testing.assert_close(packed(x), x @ (grid.snap(WEIGHT) + product).T, rtol=1e-4, atol=1e-3)


def test_what_is_no_linear_to_quantize_is_ignored(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    patterns = others(network.model, network.linears)
    nodes = {name: f"__module.model.{name}/aten::linear/MatMul" for name, _ in network.model.named_modules()}
    hit = {name for name, node in nodes.items() if any(re.match(pattern, node) for pattern in patterns)}
    assert {"lm_head", "model.embed_tokens"} <= hit
    assert not hit & set(network.linears)


@pytest.mark.parametrize(
    ("budget", "options", "sentence"),
    [
        (Budget(bits=3, group_size=16), {}, "no integers like w3g16"),
        (Budget(bits=8, group_size=16), {}, "per channel"),
        (Budget(bits=8, group_size=0), {"gptq": True}, "rounded to nearest"),
        (Budget(bits=8, group_size=0), {"lora": True}, "rounded to nearest"),
        (Budget(bits=4, group_size=48), {}, "groups of 48"),
    ],
)
def test_refusals(small_llama: Callable[..., Network], budget: Budget, options: dict[str, Any], sentence: str) -> None:
    reason = ToolNNCF(**options).supports(small_llama(), budget)
    assert reason is not None and sentence in reason


def test_settings_and_options() -> None:
    eight, four = Budget(bits=8, group_size=0, symmetric=True), Budget(bits=4, group_size=32)
    assert ToolNNCF().settings(eight) == {"mode": "INT8_SYM", "group_size": -1}
    assert ToolNNCF().settings(four)["sensitivity_metric"] is None  # nothing to choose
    mixed = ToolNNCF(ratio=0.6, metric="hessian", gptq=True).settings(four)
    assert (mixed["ratio"], mixed["sensitivity_metric"]) == (0.6, "HESSIAN_INPUT_ACTIVATION")
    assert (mixed["gptq"], mixed["awq"], mixed["lora_correction"]) == (True, False, False)
    assert ToolNNCF(lora=True).settings(four)["lora_correction"] is True
    with pytest.raises(ValueError, match="unknown metric"):
        ToolNNCF(metric="hesian")
    with pytest.raises(ValueError, match="no share"):
        ToolNNCF(ratio=60)
    with pytest.raises(ValueError, match="refuses LoRA correction after GPTQ"):
        ToolNNCF(gptq=True, lora=True)
