"""The library of HQQ (mobiusml/hqq)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import register
from methods.budget import Budget
from methods.toolchains.base import Toolchain, Work

IMPORTS = ("hqq.core.quantize",)


@register("tool_hqq")
@dataclass(frozen=True)
class ToolHQQ(Toolchain):
    """HQQ's own solver, in groups along the input, with real zero points."""

    requirements: ClassVar[tuple[str, ...]] = ("hqq==0.2.8.post1",)

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {"nbits": budget.bits, "group_size": budget.group_size or None}


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    answer = {}
    for name in work.linears:
        config = BaseQuantizeConfig(**settings, axis=1)
        done = HQQLinear(model.get_submodule(name), config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        weight = done.dequantize()
        answer[f"{name}/weight"] = weight
        answer[f"{name}/scale"] = done.meta["scale"].float().view(len(weight), -1)
        answer[f"{name}/zero"] = done.meta["zero"].float().view(len(weight), -1)
    return answer
