"""AutoQuantize of NVIDIA's Model Optimizer (`mtq.auto_quantize`): a number format for each linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.linear import Inputs
from kernels.packed import Packed
from methods.base import Parts, hint, register
from methods.budget import Budget
from methods.formats.dense import Dense
from methods.network import Network
from methods.toolchains.base import EFFECTIVE_BITS, Toolchain, Work
from methods.toolchains.modelopt import BATCH, REQUIREMENTS, emulate
from methods.toolchains.modelopt_presets import Preset, check_preset, presets

IMPORTS = ("modelopt.torch.quantization",)
SCORES = ("gradient", "kl_div")
NOT_QUANTIZED = -1
HEAD = "*lm_head*"
"""Left out of the search, and of the count: unless told, the library counts what it leaves out with 16 bits."""


@register("tool_modelopt_auto")
@dataclass(frozen=True)
class ToolModelOptAuto(Toolchain):
    """A preset, or no quantization, for each group of linears that engines fuse.

    The library keeps its own count of bits below the budget: 4.5 for NVFP4, the width alone for others, without the
    scales of groups and rows. What is stored may exceed the budget by those; the result then says so.

    Args:
        formats: candidates, see `methods.toolchains.modelopt`; 4-bit integers are in groups of the budget's size.
        score: `gradient` (an integer programme over Σ (∂L/∂Y)² · ΔY²) or `kl_div` (a threshold on the divergence).
        count_stored: tell the library what our forms of the formats store instead of its own count, on average over
            the linears of the model.
        calibration_steps, score_steps: most batches of 8 sequences; the library's defaults.
    """

    formats: tuple[str, ...] = ("nvfp4", "fp8")
    score: str = "gradient"
    count_stored: bool = False
    calibration_steps: int = 512
    score_steps: int = 128

    requirements: ClassVar[tuple[str, ...]] = REQUIREMENTS
    in_original_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r}: {hint(self.score, SCORES)}")
        if not self.formats:
            raise ValueError("method.formats is empty; give candidates such as method.formats=[nvfp4,fp8]")
        for name in self.formats:
            check_preset(name)

    @property
    def parts(self) -> Parts:
        solver = "lp" if self.score == "gradient" else "threshold"
        return Parts(" ".join(self.formats), allocation=f"autoquantize_{self.score} × {solver}")

    def supports(self, network: Network, budget: Budget) -> str | None:
        limit = budget.limit(network.shapes, network.other_parameters)
        if limit is None:
            return f"AutoQuantize bounds stored bits, and the budget is a bound of {budget.bound}"
        counts = [counted(preset, network.shapes, self.count_stored) for preset in self._candidates(budget)]
        if min(counts) > limit:
            return f"the narrowest of {', '.join(self.formats)} counts {min(counts):.4g} bits; the limit is {limit:g}"
        return None

    def settings(self, budget: Budget) -> dict[str, Any]:
        return asdict(self) | {"budget": asdict(budget)}

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        preset = self._chosen(budget, tensors)
        if preset is None:
            grid = Dense().fit(tensors["weight"])
            return grid.pack(grid.encode(tensors["weight"]))
        return preset.packed(tensors)

    def rounding(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Inputs | None:
        preset = self._chosen(budget, tensors)
        return None if preset is None else preset.rounding(tensors)

    def _chosen(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Preset | None:
        """The preset of a linear, or None where the tool left it as it was."""
        index = int(tensors["choice"].item())
        return None if index == NOT_QUANTIZED else self._candidates(budget)[index]

    def _candidates(self, budget: Budget) -> list[Preset]:
        return candidates(self.formats, budget)


def candidates(formats: Iterable[str], budget: Budget) -> list[Preset]:
    """The presets of these names."""
    known = presets(budget.group_size)
    return [known[name] for name in formats]


def counted(preset: Preset, shapes: Iterable[tuple[int, int]], stored: bool) -> float:
    """Bits a weight that a preset counts: what matrices of these shapes store, or what the library counts."""
    if not stored:
        return float(preset.weights.config.get("effective_bits", preset.weights.bits))
    shapes = list(shapes)
    return sum(map(preset.weights.stored_bits, shapes)) / sum(out * columns for out, columns in shapes)


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    import modelopt.torch.quantization as mtq

    emulate()
    budget = Budget(**settings["budget"])
    shapes = [_shape(model, name) for name in work.linears]
    others = sum(p.numel() for p in model.parameters()) - sum(out * columns for out, columns in shapes)
    found = candidates(settings["formats"], budget)
    configs = [preset.config for preset in found]
    if settings["count_stored"]:
        configs = [c | {"effective_bits": counted(p, shapes, True)} for c, p in zip(configs, found, strict=True)]
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": budget.limit(shapes, others), "cost": {"excluded_module_name_patterns": [HEAD]}},
        quantization_formats=configs,
        data_loader=[{"input_ids": batch, "labels": batch} for batch in work.tokens.split(BATCH)],
        disabled_layers=[HEAD],
        num_calib_steps=settings["calibration_steps"],
        num_score_steps=settings["score_steps"],
        method=settings["score"],
        **_scoring(settings["score"]),
    )
    choices = plan(state, len(configs))
    answer = {EFFECTIVE_BITS: torch.tensor(state["best"]["constraints"]["effective_bits"])}
    for name in work.linears:
        module: Any = model.get_submodule(name)
        choice = choices.get(name, NOT_QUANTIZED)
        read = found[choice].read(module) if choice != NOT_QUANTIZED else {"weight": module.weight.detach().float()}
        answer |= {f"{name}/{key}": tensor for key, tensor in read.items()}
        answer[f"{name}/choice"] = torch.tensor(choice)
    return answer


def plan(state: Mapping[str, Any], count: int) -> dict[str, int]:
    """Linear name to the index of its format among `count` that were given; the library's state is read.

    Raises:
        ValueError: the library chose a format under a name that is not of those that it gives to such.
    """
    names = {"NONE": NOT_QUANTIZED, **{f"CUSTOM_{index}": index for index in range(count)}}
    chosen: dict[str, int] = {}
    for group, recipe in state["best"]["recipe"].items():
        name = str(recipe).split("(")[0]
        if name not in names:
            raise ValueError(f"AutoQuantize chose {name}, which is not among its {count} candidates")
        chosen |= dict.fromkeys(state["candidate_stats"][group]["module_names"], names[name])
    return chosen


def _scoring(score: str) -> dict[str, Any]:
    """How the tool runs the model on a batch."""
    if score == "gradient":
        return {
            "forward_step": lambda model, batch: model(**batch, use_cache=False),
            "loss_func": lambda output, _: output.loss,
        }
    return {"forward_step": lambda model, batch: model(input_ids=batch["input_ids"], use_cache=False).logits}


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    out, columns = model.get_parameter(f"{name}.weight").shape
    return out, columns
