"""NNCF (openvinotoolkit/nncf): weight compression of an OpenVINO model.

Only there does it have GPTQ. Its LoRA correction is left out: what it inserts are further layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.packed import Packed
from methods.base import Parts, hint, register
from methods.budget import Budget
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid

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
    """

    ratio: float = 1.0
    metric: str = "max_variance"
    awq: bool = False
    scale_estimation: bool = False
    gptq: bool = False

    requirements: ClassVar[tuple[str, ...]] = ("nncf==3.4.0", "openvino==2026.4.1")

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}: {hint(self.metric, METRICS)}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"method.ratio={self.ratio:g} is no share; take 0 to 1")

    @property
    def parts(self) -> Parts:
        chosen = [name for name in ("scale_estimation", "gptq") if getattr(self, name)]
        return Parts(
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
            if budget.group_size or self.ratio < 1 or self.awq or self.scale_estimation or self.gptq:
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
        switches = {"awq": self.awq, "scale_estimation": self.scale_estimation, "gptq": self.gptq}
        return settings | {"ratio": self.ratio, "sensitivity_metric": criterion, "all_layers": True} | switches

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """In the width that the tool names. Symmetric grids have their additional code on the side of the weight that
        is largest, for which scales have signs."""
        bits = int(tensors["width"].item())
        fmt = budget.format() if bits == budget.bits else Budget(bits=bits, group_size=0).format()
        weight, scale = tensors["weight"].float(), tensors["scale"].float()
        sign = torch.where(scale < 0, -1.0, 1.0)
        side = sign.repeat_interleave(fmt.columns_per_group(weight.shape[1]), 1)
        packed = on_grid(weight * side, scale * sign, tensors.get("zero"), fmt)
        packed.get_buffer("scale").mul_(sign)
        return packed


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    import nncf

    options = dict(settings)
    mode = getattr(nncf.CompressWeightsMode, options.pop("mode"))
    if options.get("sensitivity_metric"):
        options["sensitivity_metric"] = getattr(nncf.SensitivityMetric, options["sensitivity_metric"])
    eager: Any = model
    eager.set_attn_implementation("eager")
    samples = [_inputs(row) for row in work.tokens]
    if not mode.value.startswith("int8"):
        options |= {"dataset": nncf.Dataset([[t.numpy() for t in s] for s in samples]), "subset_size": len(samples)}
    scope = nncf.IgnoredScope(patterns=others(model, work.linears), validate=False)
    done = nncf.compress_weights(_converted(eager, samples[0]), mode=mode, ignored_scope=scope, **options)
    return read(done, work.linears)


def others(model: nn.Module, linears: Sequence[str]) -> list[str]:
    """Patterns of the operators that hold the model's other matrices."""
    named = [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    return [rf"__module\.model\.{re.escape(name)}/.*" for name in named if name not in linears]


def read(compressed: Any, linears: Sequence[str]) -> dict[str, Tensor]:
    """Codes, scales and zero points in an OpenVINO model, as `ToolNNCF.packed` wants them.

    Raises:
        ValueError: the model has an operator that no linear of ours can stand for.
    """
    constants = {op.get_friendly_name(): op for op in compressed.get_ops() if op.get_type_name() == "Constant"}
    added = [op.get_friendly_name() for op in compressed.get_ops() if "awq_mul" in op.get_friendly_name()]
    if added:
        raise ValueError(f"NNCF multiplies activations at {added[0]}, which is not supported here")
    found: dict[str, Any] = {}
    for name in linears:
        key = f"self.model.{name}.weight"
        if f"{key}/scale" in constants:
            parts = {"codes": key, "scale": f"{key}/scale", "zero": f"{key}/zero_point"}
            found |= {f"{name}/{part}": constants[k] for part, k in parts.items() if k in constants}
    values = _values(found)
    answer: dict[str, Tensor] = {}
    for name in linears:
        if f"{name}/codes" in found:
            made = dequantized(values[f"{name}/codes"], values[f"{name}/scale"], values.get(f"{name}/zero"))
            answer |= {f"{name}/{key}": tensor for key, tensor in made.items()}
            answer[f"{name}/width"] = torch.tensor(found[f"{name}/codes"].get_element_type().bitwidth)
    return answer


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


class _Logits(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        return logits


def _inputs(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the causal mask and positions: without the mask, the conversion of what makes it fails."""
    length = len(row)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    return row[None], mask[None, None], torch.arange(length)[None]


def _converted(model: nn.Module, example: tuple[Tensor, ...]) -> Any:
    import openvino as ov

    return ov.convert_model(_Logits(model), example_input=example)


def _values(constants: Mapping[str, Any]) -> dict[str, Tensor]:
    """What constants of any type hold: fp32."""
    import openvino as ov

    nodes = [ov.opset13.convert(constant, "f32") for constant in constants.values()]
    results = ov.compile_model(ov.Model(nodes, []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
    return {name: torch.from_numpy(results[i].copy()) for i, name in enumerate(constants)}
