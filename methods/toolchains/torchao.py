"""torchao's weight-only integers: rounding to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import register
from methods.budget import Budget
from methods.network import Network
from methods.toolchains.base import Toolchain, Work

IMPORTS = ("torchao.quantization",)


@register("tool_torchao")
@dataclass(frozen=True)
class ToolTorchAO(Toolchain):
    """IntxWeightOnlyConfig, asymmetric or symmetric, in groups along the input."""

    requirements: ClassVar[tuple[str, ...]] = ("torchao==0.18.0",)
    in_original_coordinates: ClassVar[bool] = True

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is None and budget.group_size == 0:
            return "torchao's integers want a group size; take a budget such as w4g128"
        return reason

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {"bits": budget.bits, "group_size": budget.group_size, "symmetric": budget.symmetric}


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    wanted = set(work.linears)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{settings['bits']}"),
        granularity=PerGroup(settings["group_size"]),
        mapping_type=MappingType.SYMMETRIC if settings["symmetric"] else MappingType.ASYMMETRIC,
    )
    quantize_(model, config, filter_fn=lambda _, name: name in wanted)
    answer = {}
    for name in work.linears:
        weight: Any = model.get_submodule(name).weight
        answer[f"{name}/weight"] = weight.dequantize().float()
        answer[f"{name}/scale"] = weight.scale.float()
        if not settings["symmetric"]:
            # codes of torchao are signed
            answer[f"{name}/zero"] = weight.zero_point.float() + 2 ** (settings["bits"] - 1)
    return answer
