"""llm-compressor (vllm-project): GPTQ, AWQ and SmoothQuant."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.activations import TokenScale, integers
from kernels.linear import Inputs
from methods.base import Context, Parts, Quantized, register
from methods.budget import Budget
from methods.network import Network
from methods.toolchains.base import Toolchain, Work

MODIFIERS = {
    "gptq": ("llmcompressor.modifiers.gptq", "GPTQModifier"),
    "nearest": ("llmcompressor.modifiers.quantization", "QuantizationModifier"),
    "awq": ("llmcompressor.modifiers.transform.awq", "AWQModifier"),
    "smoothquant": ("llmcompressor.modifiers.transform.smoothquant", "SmoothQuantModifier"),
}
"""Where the library has what it does."""
ROUNDINGS = ("gptq", "nearest")
IMPORTS = ("llmcompressor", *(module for module, _ in MODIFIERS.values()))
W8A8 = Budget(bits=8, group_size=0, symmetric=True)
INT8_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


class LLMCompressor(Toolchain):
    """Integers of the budget's width and groups, by the library's modifiers."""

    requirements: ClassVar[tuple[str, ...]] = ("llmcompressor==0.14.0.1",)
    inputs: ClassVar[dict[str, Any] | None] = None
    """How inputs are quantized, as the library is told; None for 16 bits."""

    @property
    @abstractmethod
    def modifiers(self) -> dict[str, dict[str, Any]]:
        """What the library does, in order: names of `MODIFIERS` and options."""

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {
            "modifiers": self.modifiers,
            "inputs": self.inputs,
            "weights": {
                "num_bits": budget.bits,
                "type": "int",
                "symmetric": budget.symmetric,
                "strategy": "group" if budget.group_size else "channel",
                "group_size": budget.group_size or None,
            },
        }


@register("tool_llmcompressor_gptq")
@dataclass(frozen=True)
class ToolGPTQ(LLMCompressor):
    """The library's GPTQ, with the paper's damping and column order."""

    in_original_coordinates: ClassVar[bool] = True

    @property
    def modifiers(self) -> dict[str, dict[str, Any]]:
        return {"gptq": {"dampening_frac": 0.01, "actorder": None}}


@register("tool_llmcompressor_awq")
@dataclass(frozen=True)
class ToolAWQ(LLMCompressor):
    """The library's AWQ: scales by activations alone (`duo_scaling` off), or by activations and weights.

    Args:
        duo_scaling: the library's default.
    """

    duo_scaling: bool = True

    @property
    def modifiers(self) -> dict[str, dict[str, Any]]:
        return {"awq": {"duo_scaling": self.duo_scaling}, "nearest": {}}


@register("tool_llmcompressor_smoothquant")
@dataclass(frozen=True)
class ToolSmoothQuant(LLMCompressor):
    """The library's W8A8: smoothing by its mappings for the model, INT8 weights, INT8 inputs.

    Its scales have the range of an input, max − min, for max|x|, and 2·max|w| for max|w|. Inputs are rounded as vLLM
    does, with scale max|x| / 127; in the library's own simulation it is max|x| / 127.5, and the largest saturates.

    Args:
        strength: the α of SmoothQuant; the library's default. Its examples for Llama have 0.8.
        gptq: round by GPTQ with the library's defaults, as its examples do, and not to nearest.
    """

    strength: float = 0.5
    gptq: bool = False

    inputs: ClassVar[dict[str, Any] | None] = INT8_TOKENS

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"method.strength={self.strength:g} is outside 0 to 1; take 0.5")

    @property
    def parts(self) -> Parts:
        return Parts(transform="smoothquant", rounding="gptq" if self.gptq else "nearest")

    @property
    def modifiers(self) -> dict[str, dict[str, Any]]:
        return {"smoothquant": {"smoothing_strength": self.strength}, self.parts.rounding: {}}

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is None and budget != W8A8:
            return f"its W8A8 has symmetric integers per output channel; take {W8A8.name}, not {budget.name}"
        return reason

    def rounding(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Inputs:
        del budget, tensors
        return TokenScale(integers(8))

    def quantize(self, ctx: Context) -> Quantized:
        done = super().quantize(ctx)
        if not done.parameters:
            raise ValueError("llm-compressor smoothed nothing: its mappings name no norm of this model")
        return done


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    from compressed_tensors.quantization import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # AWQ's search pins memory for a GPU, which fails without one
    sequences, length = work.tokens.shape
    everything = torch.ones_like(work.tokens).tolist()
    data = Dataset.from_dict({"input_ids": work.tokens.tolist(), "attention_mask": everything})
    oneshot(
        model=model,
        dataset=data,
        recipe=_recipe(settings),
        num_calibration_samples=sequences,
        max_seq_length=length,
        shuffle_calibration_samples=False,
    )
    answer = {}
    for name in work.linears:
        module: Any = model.get_submodule(name)
        args = module.quantization_scheme.weights
        zero = module.weight_zero_point if not settings["weights"]["symmetric"] else None
        answer[f"{name}/weight"] = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, args)
        answer[f"{name}/scale"] = module.weight_scale.float()
        if zero is not None:
            answer[f"{name}/zero"] = zero.float() + 2 ** (settings["weights"]["num_bits"] - 1)  # its codes are signed
    return answer


def _recipe(settings: Mapping[str, Any]) -> list[Any]:
    scheme = {"weights": settings["weights"], "input_activations": settings["inputs"], "targets": ["Linear"]}
    groups = {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}
    recipe = []
    for name, options in settings["modifiers"].items():
        module, modifier = MODIFIERS[name]
        what = groups if name in ROUNDINGS else {}
        recipe.append(getattr(importlib.import_module(module), modifier)(**what, **options))
    return recipe
