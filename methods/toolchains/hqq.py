"""The library of HQQ (mobiusml/hqq)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.packed import Packed
from methods.base import register
from methods.budget import Budget
from methods.formats.affine import Affine, AffineGrid
from methods.toolchains.base import OFF_GRID, Toolchain, Work

ROOM = 10
"""Zero points and scales are stored in fp16, which moves a code of b bits by up to 2**(b − 10) steps."""
IMPORTS = ("hqq.core.quantize",)


@register("tool_hqq")
@dataclass(frozen=True)
class ToolHQQ(Toolchain):
    """HQQ's own solver, in groups along the input, with real zero points."""

    requirements: ClassVar[tuple[str, ...]] = ("hqq==0.2.8.post1",)
    in_original_coordinates: ClassVar[bool] = True

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """On the grid of `hqq`, whose zero points are no whole numbers."""
        assert budget.bits is not None
        weight, scale, zero = (tensors[key].float() for key in ("weight", "scale", "zero"))
        grid = AffineGrid(Affine(budget.bits, budget.group_size), scale, zero, weight.shape[1])
        codes = grid.encode(weight)
        allowed = max(OFF_GRID, 2.0 ** (budget.bits - ROOM))
        if ((grid.decode(codes) - weight).abs() > allowed * scale.repeat_interleave(grid.group_size, 1)).any():
            raise ValueError(f"its weights do not lie on the {budget.bits}-bit grid that it claims")
        return grid.pack(codes)

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
