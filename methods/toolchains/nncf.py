"""NNCF (openvinotoolkit/nncf): weight compression of an OpenVINO model.

Only there does it have GPTQ and LoRA correction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.packed import Packed
from kernels.packed_sum import PackedLowRank, PackedSum
from methods.base import Parts, hint, register
from methods.budget import Budget
from methods.lora_correction import ADAPTER
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid
from methods.toolchains.openvino import REQUIREMENTS, converted, operators, parameter, samples, values

IMPORTS = ("nncf", "openvino")
METRICS = {
    "weight_error": "WEIGHT_QUANTIZATION_ERROR",
    "hessian": "HESSIAN_INPUT_ACTIVATION",
    "mean_variance": "MEAN_ACTIVATION_VARIANCE",
    "max_variance": "MAX_ACTIVATION_VARIANCE",
    "mean_magnitude": "MEAN_ACTIVATION_MAGNITUDE",
}
MODES = {
    (8, False): "INT8_ASYM",
    (8, True): "INT8_SYM",
    (4, False): "INT4_ASYM",
    (4, True): "INT4_SYM",
    (3, True): "INT3_SYM",
    (2, True): "INT2_SYM",
}
PARTS = {"codes": "", "scale": "/scale", "zero": "/zero_point"}
"""What constants of a compressed matrix hold, and what their names end with."""
SIDES = {"left_": "B", "right_": "A"}
"""What the tensors of a correction's two matrices begin with, and the library's names of them."""


@register("tool_nncf")
@dataclass(frozen=True)
class ToolNNCF(Toolchain):
    """Grouped integers, and INT8 per output channel for the most sensitive linears where `ratio` leaves some.

    Args:
        ratio: the share of weights, at most, that get the budget's format. What the others store beyond it comes on
            top of the budget.
        metric: the criterion, as in `nncf`: `weight_error`, `hessian`, `mean_variance`, `max_variance` (the
            library's default) or `mean_magnitude`.
        awq, scale_estimation, gptq: the library's options of these names, all off by default as they are there.
        lora: the library's LoRA correction: of the linears in the budget's format, two INT8 matrices of rank 8, the
            library's, on top of the budget. See `methods.lora_correction`.
    """

    ratio: float = 1.0
    metric: str = "max_variance"
    awq: bool = False
    scale_estimation: bool = False
    gptq: bool = False
    lora: bool = False

    requirements: ClassVar[tuple[str, ...]] = REQUIREMENTS

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}: {hint(self.metric, METRICS)}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"method.ratio={self.ratio:g} is no share; take 0 to 1")
        if self.gptq and self.lora:
            raise ValueError("NNCF refuses LoRA correction after GPTQ; leave method.gptq or method.lora off")

    @property
    def parts(self) -> Parts:
        chosen = [name for name in ("scale_estimation", "gptq") if getattr(self, name)]
        return Parts(
            format="integer + lora8" if self.lora else "integer",
            transform="nncf_awq" if self.awq else "none",
            rounding=" + ".join(chosen) or "nearest",
            allocation="uniform" if self.ratio == 1 else f"nncf_{self.metric} × ordered",
        )

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is not None or budget.bits is None:
            return reason
        if (budget.bits, budget.symmetric) not in MODES:
            return f"NNCF has no integers like {budget.name}: 4 and 8 bits, and 2 and 3 that are symmetric"
        if budget.bits == 8:
            if budget.group_size or self.ratio < 1 or any(self._switches.values()):
                return "NNCF's integers of 8 bits are per channel, and rounded to nearest"
            return None
        size = budget.group_size
        torn = next((c for _, c in network.shapes if size and c % size), None)
        return f"NNCF does not compress rows of {torn} weights in groups of {size}" if torn else None

    def settings(self, budget: Budget) -> dict[str, Any]:
        assert budget.bits is not None
        settings = {"mode": MODES[budget.bits, budget.symmetric], "group_size": budget.group_size or -1}
        if budget.bits == 8:
            return settings
        criterion = METRICS[self.metric] if self.ratio < 1 else None
        return settings | {"ratio": self.ratio, "sensitivity_metric": criterion, "all_layers": True} | self._switches

    @property
    def _switches(self) -> dict[str, bool]:
        """The library's options that are on or off."""
        return {
            "awq": self.awq,
            "scale_estimation": self.scale_estimation,
            "gptq": self.gptq,
            "lora_correction": self.lora,
        }

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """In the width that the tool names. Symmetric grids have their additional code on the side of the weight that
        is largest, for which scales have signs."""
        bits = int(tensors["width"].item())
        fmt = budget.format() if bits == budget.bits else Budget(bits=bits, group_size=0).format()
        packed = on_grid(tensors["weight"], tensors["scale"], tensors.get("zero"), fmt)
        if "left_weight" not in tensors:
            return packed
        left, right = (
            on_grid(tensors[f"{side}weight"], tensors[f"{side}scale"], tensors[f"{side}zero"], ADAPTER)
            for side in SIDES
        )
        return PackedSum(packed, PackedLowRank(left, right))


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    import nncf

    options = dict(settings)
    mode = getattr(nncf.CompressWeightsMode, options.pop("mode"))
    if options.get("sensitivity_metric"):
        options["sensitivity_metric"] = getattr(nncf.SensitivityMetric, options["sensitivity_metric"])
    if not mode.value.startswith("int8"):
        options |= {"dataset": nncf.Dataset(samples(work.tokens)), "subset_size": len(work.tokens)}
    scope = nncf.IgnoredScope(patterns=others(model, work.linears), validate=False)
    done = nncf.compress_weights(converted(model, work.tokens), mode=mode, ignored_scope=scope, **options)
    return read(done, work.linears)


def others(model: nn.Module, linears: Sequence[str]) -> list[str]:
    """Patterns of the operators that hold the model's other matrices."""
    named = [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    return [f"{operators(name)}.*" for name in named if name not in linears]


def read(compressed: Any, linears: Sequence[str]) -> dict[str, Tensor]:
    """Codes, scales and zero points in an OpenVINO model, as `ToolNNCF.packed` wants them.

    Raises:
        ValueError: the model has an operator that no linear of ours can stand for.
    """
    constants = {op.get_friendly_name(): op for op in compressed.get_ops() if op.get_type_name() == "Constant"}
    added = [op.get_friendly_name() for op in compressed.get_ops() if "awq_mul" in op.get_friendly_name()]
    if added:
        raise ValueError(f"NNCF multiplies activations at {added[0]}, which is not supported here")
    found = {
        f"{name}/{side}{part}": constants[matrix + end]
        for name in linears
        for side, matrix in matrices(name, constants).items()
        for part, end in PARTS.items()
        if matrix + end in constants
    }
    held = values(found)
    answer: dict[str, Tensor] = {}
    for key in [key.removesuffix("codes") for key in found if key.endswith("codes")]:
        made = dequantized(held[f"{key}codes"], held[f"{key}scale"], held.get(f"{key}zero"))
        answer |= {f"{key}{part}": tensor for part, tensor in made.items()}
        answer[f"{key}width"] = torch.tensor(found[f"{key}codes"].get_element_type().bitwidth)
    return answer


def matrices(name: str, constants: Collection[str]) -> dict[str, str]:
    """The constants with codes of a linear: its own, under the empty prefix, and those of its correction."""
    own = parameter(f"{name}.weight")
    thin = {side: re.compile(rf"{operators(name)}.*_lora_{letter}") for side, letter in SIDES.items()}
    beside = {side: key for side, pattern in thin.items() for key in constants if pattern.fullmatch(key)}
    return {"": own, **beside} if f"{own}/scale" in constants else {}


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> dict[str, Tensor]:
    """Weights [out, in], scales and zero points [out, groups].

    Args:
        codes: [out, groups, size], or [out, in] where rows are groups; signed where there are no zero points.
        scale: [out, groups, 1] or [out, 1]; symmetric grids have scales of either sign.
        zero: as `scale`; or one number for all, with which symmetric codes are stored unsigned.
    """
    out = len(codes)
    weight = (codes - (0 if zero is None else zero)) * scale
    found = {"weight": weight.reshape(out, -1), "scale": scale.reshape(out, -1)}
    return found if zero is None or zero.ndim == 0 else found | {"zero": zero.reshape(out, -1)}
