"""What GPTQModel leaves in its linears, with a stand-in for them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from methods.base import Budget
from methods.formats.integer import Integer
from methods.network import Network
from methods.toolchains.gptqmodel import ToolGPTQModel, unpacked


def ordered(symmetric: bool, group_size: int, permuted: bool) -> tuple[SimpleNamespace, Tensor]:
    """A linear as the library's, codes rotated by one to stand for a packed layout, and the weights it stands for."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 64, generator=generator) + 0.4
    order = torch.randperm(64, generator=generator) if permuted else torch.arange(64)
    grid = Integer(4, group_size, symmetric).fit(weight[:, order])
    codes, rounded = torch.empty(32, 64), torch.empty(32, 64)
    codes[:, order] = grid.encode(weight[:, order]).float()
    rounded[:, order] = grid.snap(weight[:, order])
    group = torch.empty(64, dtype=torch.int32)
    group[order] = (torch.arange(64) // grid.group_size).int()
    return SimpleNamespace(
        qweight=codes.T.roll(1, 0), scales=grid.scale.half().T, zeros=grid.zero.T, g_idx=group
    ), rounded


def dequantize(module: SimpleNamespace) -> Tensor:
    group = module.g_idx.long()
    difference: Tensor = module.qweight.roll(-1, 0) - module.zeros[group]
    return module.scales[group] * difference.half()


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("symmetric", "group_size"), [(False, 16), (True, 16), (False, 0)])
def test_linears_are_packed_exactly(symmetric: bool, group_size: int, permuted: bool) -> None:
    module, rounded = ordered(symmetric, group_size, permuted)
    found = unpacked(module, dequantize)
    if symmetric:
        assert (found.pop("zero") == 8).all()
    budget = Budget(bits=4, group_size=group_size, symmetric=symmetric)
    packed = ToolGPTQModel().packed(budget, found)
    torch.testing.assert_close(packed.dequantize(), rounded, rtol=0, atol=0)
    index = 16 * 64 if permuted and group_size else 0
    assert packed.stored_bits() == budget.format().stored_bits((32, 64)) + index


def test_groups_of_other_sizes_are_refused() -> None:
    module, _ = ordered(False, 16, permuted=True)
    found = unpacked(module, dequantize)
    found["group"][0] = (found["group"][0] + 1) % 4
    with pytest.raises(ValueError, match="16 columns each"):
        ToolGPTQModel().packed(Budget(bits=4, group_size=16), found)


def test_group_aware_order_gives_way_to_desc_act(small_llama: Callable[..., Network]) -> None:
    budget = Budget(bits=3, group_size=0, symmetric=True)
    told = ToolGPTQModel(desc_act=True).settings(budget)
    assert told["desc_act"] and not told["act_group_aware"]
    assert (told["bits"], told["group_size"], told["sym"]) == (3, -1, True)
    assert "method.act_group_aware=false" in str(ToolGPTQModel().supports(small_llama(), budget))
    assert ToolGPTQModel(act_group_aware=False).supports(small_llama(), budget) is None
    with pytest.raises(ValueError, match="damp_percent"):
        ToolGPTQModel(damp_percent=1.0)
