"""NVIDIA's Model Optimizer: AWQ for weights, and its presets for weights and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kernels.linear import Inputs
from kernels.packed import Packed
from methods.base import Parts, hint, register
from methods.budget import Budget
from methods.network import Network
from methods.toolchains.base import Toolchain, Work
from methods.toolchains.modelopt_formats import BACKENDS, Integers
from methods.toolchains.modelopt_presets import Preset, check_preset, presets

IMPORTS = ("modelopt.torch.quantization",)
REQUIREMENTS = ("nvidia-modelopt==0.47.0",)
ALGORITHMS = ("max", "awq_lite", "awq_clip", "awq_full")
BATCH = 8


class ModelOpt(Toolchain):
    """One preset for all linears. Scales of inputs stay where the tool has them, in front of each linear."""

    requirements: ClassVar[tuple[str, ...]] = REQUIREMENTS
    in_original_coordinates: ClassVar[bool] = True

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        return _preset(self.settings(budget)).packed(tensors)

    def rounding(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Inputs | None:
        return _preset(self.settings(budget)).rounding(tensors)


@register("tool_modelopt")
@dataclass(frozen=True)
class ToolModelOpt(ModelOpt):
    """Symmetric integers in groups.

    Args:
        algorithm: `max` (rounding to nearest), `awq_lite`, `awq_clip` or `awq_full`.
    """

    algorithm: str = "awq_lite"

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


@register("tool_modelopt_preset")
@dataclass(frozen=True)
class ToolModelOptPreset(ModelOpt):
    """Weights and inputs in a preset of the library. Ranges of inputs are calibrated, one for the whole input.

    Args:
        preset: `int4_awq`; `w4a8_awq` (the same weights as FP8, FP8 inputs); `int8_smoothquant` (INT8 rows and
            inputs, α = 1); `fp8`; `nvfp4`, `mxfp4` or `mxfp8`, see `methods.toolchains.modelopt_formats`.
    """

    preset: str = "fp8"

    def __post_init__(self) -> None:
        check_preset(self.preset)

    @property
    def parts(self) -> Parts:
        return Parts(self.preset)

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is not None:
            return reason
        weights = presets(budget.group_size)[self.preset].weights
        if isinstance(weights, Integers) and weights.bits == 4 and not (budget.symmetric and budget.group_size):
            return f"{self.preset} has symmetric integers in groups; take a budget such as w4g128-sym"
        return None if weights.bits == budget.bits else f"{self.preset} has {weights.bits} bits, not {budget.bits}"

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {"preset": self.preset, "group_size": budget.group_size}


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    import modelopt.torch.quantization as mtq

    preset = _preset(settings)
    emulate()

    def calibrate(network: nn.Module) -> None:
        for batch in work.tokens.split(BATCH):
            network(input_ids=batch, use_cache=False)

    mtq.quantize(model, preset.config, forward_loop=calibrate)
    return {f"{name}/{key}": t for name in work.linears for key, t in preset.read(model.get_submodule(name)).items()}


def emulate() -> None:
    """Make NVFP4 and the MX formats computable without a GPU; in the tool's process."""
    from modelopt.torch.quantization.nn import register_quant_backend

    for name, backend in BACKENDS.items():
        register_quant_backend(name, backend)


def _preset(settings: Mapping[str, Any]) -> Preset:
    if "preset" in settings:
        return presets(settings["group_size"])[settings["preset"]]
    return Preset(Integers(settings["bits"], settings["group_size"]), algorithm=settings["algorithm"])
