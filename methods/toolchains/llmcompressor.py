"""llm-compressor (vllm-project): GPTQ and AWQ."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import register
from methods.budget import Budget
from methods.toolchains.base import Toolchain, Work

IMPORTS = ("llmcompressor", "llmcompressor.modifiers.gptq", "llmcompressor.modifiers.transform.awq")


class LLMCompressor(Toolchain):
    """Integers of the budget's width and groups, by one of the library's modifiers."""

    requirements: ClassVar[tuple[str, ...]] = ("llmcompressor==0.14.0.1",)

    @property
    @abstractmethod
    def modifier(self) -> dict[str, Any]:
        """Name and options of what rounds."""

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {
            "modifier": self.modifier,
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
    def modifier(self) -> dict[str, Any]:
        return {"name": "gptq", "dampening_frac": 0.01, "actorder": None}


@register("tool_llmcompressor_awq")
@dataclass(frozen=True)
class ToolAWQ(LLMCompressor):
    """The library's AWQ: scales by activations alone (`duo_scaling` off), or by activations and weights.

    Args:
        duo_scaling: the library's default.
    """

    duo_scaling: bool = True

    @property
    def modifier(self) -> dict[str, Any]:
        return {"name": "awq", "duo_scaling": self.duo_scaling}


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    from compressed_tensors.quantization import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot

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
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    options = dict(settings["modifier"])
    weights = {"weights": settings["weights"], "targets": ["Linear"]}
    groups = {"config_groups": {"all": weights}, "ignore": ["lm_head"]}
    if options.pop("name") == "gptq":
        return [GPTQModifier(**groups, **options)]
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # its search pins memory for a GPU, which fails without one
    return [AWQModifier(**options), QuantizationModifier(**groups)]
