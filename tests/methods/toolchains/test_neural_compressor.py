"""What Neural Compressor leaves in its linears, with stand-ins for them, and TEQ's training."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Budget
from methods.formats.integer import Integer
from methods.network import Network
from methods.toolchains.neural_compressor import LR, ToolINC, train, unpacked

GENERATOR = torch.Generator().manual_seed(0)


class Packed:
    """As the library's: codes, scales and zeros, and weights computed from them in `difference`'s integers."""

    def __init__(self, weight: Tensor, fmt: Integer, difference: torch.dtype) -> None:
        grid = fmt.fit(weight)
        self.codes, self.scale, self.zero = grid.encode(weight).short(), grid.scale, grid.zero.short()
        self.size, self.difference = grid.group_size, difference

    def unpack(self) -> dict[str, Tensor]:
        return {"int_weight": self.codes, "scales": self.scale.half(), "zp": self.zero}

    def recover(self) -> Tensor:
        zero, scale = (t.repeat_interleave(self.size, 1) for t in (self.zero, self.scale))
        return (self.codes - zero).to(self.difference) * scale.half()


def weights() -> Tensor:
    return torch.randn(6, 64, generator=GENERATOR) + 0.5  # zeros away from the middle


def test_what_a_linear_holds_is_packed_exactly() -> None:
    weight, budget = weights(), Budget(bits=4, group_size=16)
    packed = ToolINC().packed(budget, unpacked(Packed(weight, budget.format(), torch.int8)))
    torch.testing.assert_close(packed.dequantize(), budget.format().fit(weight).snap(weight))
    assert packed.stored_bits() == budget.format().stored_bits((6, 64))


def test_scales_of_inputs_stay_in_front_of_the_linear() -> None:
    weight, budget = weights(), Budget(bits=4, group_size=16)
    before = torch.rand(64, generator=GENERATOR).half() + 0.5
    module = SimpleNamespace(input_scale=before, linear=Packed(weight, budget.format(), torch.int8))
    packed = ToolINC("awq").packed(budget, unpacked(module))
    x = torch.randn(3, 64, generator=GENERATOR)
    torch.testing.assert_close(packed(x), F.linear(x * before, module.linear.recover().float()), rtol=1e-3, atol=1e-2)


def test_differences_modulo_256_are_off_the_grid() -> None:
    """The fault for which asymmetric integers of 8 bits are refused: codes minus zeros reach ±255."""
    weight, budget = weights(), Budget(bits=8, group_size=16)
    ToolINC().packed(budget, unpacked(Packed(weight, budget.format(), torch.int16)))
    with pytest.raises(ValueError, match="8-bit grid"):
        ToolINC().packed(budget, unpacked(Packed(weight, budget.format(), torch.int8)))


def test_what_the_library_spoils_is_refused(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    for algorithm in ("rtn", "gptq", "awq"):
        assert "w8g128-sym" in str(ToolINC(algorithm).supports(network, Budget(bits=8)))
        assert ToolINC(algorithm).supports(network, Budget(bits=8, symmetric=True)) is None
        assert ToolINC(algorithm).supports(network, Budget(bits=3)) is None
    assert "packs codes of 4 bits" in str(ToolINC("teq").supports(network, Budget(bits=3)))
    assert ToolINC("teq").supports(network, Budget(bits=4)) is None
    assert "uniform widths" in str(ToolINC().supports(network, Budget(effective_bits=4)))
    with pytest.raises(ValueError, match="did you mean gptq"):
        ToolINC("gpqt")


def test_settings_speak_the_library_s_language() -> None:
    told = ToolINC().settings(Budget(bits=8, group_size=0, symmetric=True))
    assert told["integers"] == {"bits": 8, "group_size": -1, "use_sym": True}


class Slope(nn.Module):
    """A loss whose gradient in the scale is 1 in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.seen: list[int] = []
        self.path: list[float] = []

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        assert torch.equal(input_ids, labels)
        self.seen.append(int(input_ids[0, 0]))
        self.path.append(float(self.scale.detach()[0]))
        return SimpleNamespace(loss=self.scale.sum())


def test_scales_are_trained_by_the_schedule() -> None:
    """Under a constant gradient a step of Adam is the learning rate, so that the path is the sum of the rates."""
    model, steps = Slope(), 40
    train(model, [model.scale], torch.arange(3).unsqueeze(1), steps)
    rates = [n / 2 if n < 2 else (steps - n) / (steps - 2) for n in range(steps)]
    path = 1 - LR * torch.tensor([0.0, *rates]).cumsum(0)  # before each step, and at the end
    torch.testing.assert_close(torch.tensor([*model.path, float(model.scale.detach()[0])]), path, rtol=1e-5, atol=0)
    assert model.seen[:4] == [0, 1, 2, 0]
    untouched = Slope()
    train(untouched, [untouched.scale], torch.zeros(1, 1, dtype=torch.long), 0)
    assert torch.equal(untouched.scale.detach(), torch.ones(4))
