"""bitsandbytes: LLM.int8() and NF4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.activations import ExceptOutliers, TokenScale, integers
from kernels.linear import Inputs
from kernels.packed import Packed
from methods.base import register
from methods.budget import Budget
from methods.formats.registry import named_format
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid

IMPORTS = ("bitsandbytes",)
THRESHOLD = 6.0
REQUIREMENTS = ("bitsandbytes==0.50.2",)


@register("tool_llm_int8")
@dataclass(frozen=True)
class ToolInt8(Toolchain):
    """The library's INT8 rows. Its outlier columns, at run time, are ours: see `kernels.activations`."""

    requirements: ClassVar[tuple[str, ...]] = REQUIREMENTS
    in_original_coordinates: ClassVar[bool] = True

    def supports(self, network: Network, budget: Budget) -> str | None:
        del network
        return None if budget.bits == 8 else f"LLM.int8() has 8 bits, and the budget is {budget.name}"

    def settings(self, budget: Budget) -> dict[str, Any]:
        del budget
        return {"format": "int8"}

    def rounding(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Inputs:
        del budget, tensors
        return ExceptOutliers(TokenScale(integers(8)), THRESHOLD)

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        del budget
        return on_grid(tensors["weight"], tensors["scale"], None, Budget(bits=8, group_size=0).format())


@register("tool_nf4")
@dataclass(frozen=True)
class ToolNF4(Toolchain):
    """The library's NF4 in blocks of 64, without double quantization."""

    requirements: ClassVar[tuple[str, ...]] = REQUIREMENTS
    in_original_coordinates: ClassVar[bool] = True

    def supports(self, network: Network, budget: Budget) -> str | None:
        del network
        return None if budget.bits == 4 else f"NF4 has 4 bits, and the budget is {budget.name}"

    def settings(self, budget: Budget) -> dict[str, Any]:
        del budget
        return {"format": "nf4"}

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """Re-encoded by our NF4, which must reproduce the library's numbers."""
        del budget
        weight = tensors["weight"].float()
        grid = named_format("nf4").fit(weight)
        codes = grid.encode(weight)
        if not torch.allclose(grid.decode(codes), weight, rtol=1e-3, atol=1e-6):
            raise ValueError("its numbers are not those of NF4 in blocks of 64")
        return grid.pack(codes)


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    import bitsandbytes.functional as functional

    answer = {}
    for name in work.linears:
        weight = model.get_parameter(f"{name}.weight").detach().float()
        if settings["format"] == "int8":
            codes, maxima, _ = functional.int8_vectorwise_quant(weight.half())
            scale = maxima.float().view(-1, 1) / 127
            answer[f"{name}/scale"] = scale
            answer[f"{name}/weight"] = codes.float() * scale
        else:
            packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            answer[f"{name}/weight"] = functional.dequantize_4bit(packed, state).float()
    return answer
