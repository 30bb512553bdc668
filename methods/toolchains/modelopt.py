"""NVIDIA's Model Optimizer: AWQ for weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.packed import Packed
from kernels.packed_scaled import PackedScaled
from methods.base import hint, register
from methods.budget import Budget
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid

IMPORTS = ("modelopt.torch.quantization",)
ALGORITHMS = ("max", "awq_lite", "awq_clip", "awq_full")


@register("tool_modelopt")
@dataclass(frozen=True)
class ToolModelOpt(Toolchain):
    """Symmetric integers in groups. Scales of inputs stay where the tool has them, in front of each linear.

    Args:
        algorithm: `max` (rounding to nearest), `awq_lite`, `awq_clip` or `awq_full`.
    """

    algorithm: str = "awq_lite"

    requirements: ClassVar[tuple[str, ...]] = ("nvidia-modelopt==0.47.0",)
    in_original_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {self.algorithm!r}: {hint(self.algorithm, ALGORITHMS)}")

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is None and not (budget.symmetric and budget.group_size):
            return f"Model Optimizer's integers are symmetric and in groups; take {budget.name} with symmetric groups"
        return reason

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {"bits": budget.bits, "group_size": budget.group_size, "algorithm": self.algorithm}

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        codes = on_grid(tensors["weight"], tensors["scale"], None, budget.format())
        return PackedScaled(codes, tensors["inputs"].half()) if "inputs" in tensors else codes


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    import modelopt.torch.quantization as mtq

    weights = {"num_bits": settings["bits"], "block_sizes": {-1: settings["group_size"], "type": "static"}}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weights, "enable": True},
            {"quantizer_name": "*lm_head*", "enable": False},
        ],
        "algorithm": settings["algorithm"],
    }

    def calibrate(network: nn.Module) -> None:
        for batch in work.tokens.split(8):
            network(input_ids=batch, use_cache=False)

    mtq.quantize(model, config, forward_loop=calibrate)
    answer = {}
    for name in work.linears:
        module: Any = model.get_submodule(name)
        quantizer = module.weight_quantizer
        with torch.no_grad():
            answer[f"{name}/weight"] = quantizer(module.weight).float()
        answer[f"{name}/scale"] = quantizer.amax.float().view(len(module.weight), -1) / quantizer.maxbound
        before = getattr(module.input_quantizer, "_pre_quant_scale", None)
        if before is not None:
            answer[f"{name}/inputs"] = before.float().flatten()
    return answer
