"""Presets of NVIDIA's Model Optimizer: number formats of weights and inputs, and how they are calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.activations import InputRounding
from kernels.minifloat import E4M3
from kernels.packed import Packed
from kernels.packed_recast import PackedRecast
from kernels.packed_scaled import PackedScaled
from methods.base import hint
from methods.toolchains.modelopt_formats import Float4, Float8, InputIntegers, Integers, MXFloat, Numbers, Prescaled


@dataclass(frozen=True)
class Preset:
    """One of the tool's ways to quantize a linear.

    Attributes:
        weights: what weights are rounded to.
        inputs: what inputs are rounded to, or None for 16 bits.
        algorithm: of the tool's calibration; None where there is nothing to calibrate.
        recast: round the rounded weights to FP8, in which they are multiplied.
    """

    weights: Numbers
    inputs: Numbers | None = None
    algorithm: str | None = "max"
    recast: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """As the tool is told. `lm_head` stays as it is."""
        weights = [self.weights.config, Float8().config] if self.recast else self.weights.config
        inputs = {"cfg": self.inputs.config, "enable": True} if self.inputs else {"enable": False}
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": weights, "enable": True},
                {"quantizer_name": "*input_quantizer", **inputs},
                {"quantizer_name": "*lm_head*", "enable": False},
            ],
            "algorithm": self.algorithm,
        }

    @torch.no_grad()
    def read(self, module: Any) -> dict[str, Tensor]:
        """What a linear of the tool's computes with; in the tool's process."""
        quantizer = module.weight_quantizer[0] if self.recast else module.weight_quantizer
        found = {"weight": quantizer(module.weight).float(), **self.weights.read(quantizer, module.weight.float())}
        if self.recast:
            found["recast"] = Float8().read(module.weight_quantizer[1], module.weight)["tensor_scale"]
        before = getattr(module.input_quantizer, "_pre_quant_scale", None)
        if before is not None:
            found["inputs"] = before.float().flatten()
        if self.inputs and self.inputs.calibrated:
            found["input_maximum"] = module.input_quantizer.amax.float().view(())
        return found

    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        """What `read` found, in our form. FP8's rounding of rounded weights is done anew, from fp16 scales."""
        packed = self.weights.packed(tensors)
        if self.recast:
            packed = PackedRecast(packed, tensors["recast"].float(), E4M3)
        return PackedScaled(packed, tensors["inputs"].half()) if "inputs" in tensors else packed

    def rounding(self, tensors: Mapping[str, Tensor]) -> InputRounding | None:
        """What rounds the linear's input at run time."""
        if self.inputs is None:
            return None
        rounding = self.inputs.rounding(float(tensors["input_maximum"]) if self.inputs.calibrated else 0.0)
        return Prescaled(rounding, tensors["inputs"].half().float()) if "inputs" in tensors else rounding


def presets(group_size: int) -> dict[str, Preset]:
    """By the names of the tool's own, `CFG` left out; integers of 4 bits in groups of this size."""
    int4 = Integers(4, group_size)
    return {
        "int4_awq": Preset(int4, algorithm="awq_lite"),
        "w4a8_awq": Preset(int4, Float8(), "awq_lite", recast=True),
        "int8_smoothquant": Preset(Integers(8), InputIntegers(8), "smoothquant"),
        "mxfp8": Preset(MXFloat(8), MXFloat(8), algorithm=None),
        "mxfp4": Preset(MXFloat(4), MXFloat(4), algorithm=None),
        "fp8": Preset(Float8(), Float8()),
        "nvfp4": Preset(Float4(), Float4()),
    }


PRESET_NAMES = tuple(presets(0))


def check_preset(name: str) -> None:
    """Raise ValueError if there is no such preset."""
    if name not in PRESET_NAMES:
        raise ValueError(f"unknown preset {name!r}: {hint(name, PRESET_NAMES)}")
