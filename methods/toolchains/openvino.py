"""A language model in OpenVINO: how it gets there, what its inputs are, and what its constants hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

REQUIREMENTS = ("nncf==3.4.0", "openvino==2026.4.1")


def converted(model: nn.Module, tokens: Tensor) -> Any:
    """The OpenVINO model of `model`, in fp32: from `inputs` of a row of tokens [sequences, length] to logits."""
    import openvino as ov

    eager: Any = model
    eager.set_attn_implementation("eager")  # what fused attention makes of masks cannot be converted
    return ov.convert_model(_Logits(model), example_input=inputs(tokens[0]))


def inputs(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the causal mask and positions: without the mask, the conversion of what makes it fails."""
    length = len(row)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    return row[None], mask[None, None], torch.arange(length)[None]


def samples(tokens: Sequence[Tensor] | Tensor) -> list[list[Any]]:
    """Inputs of each row of tokens, as the arrays that OpenVINO wants."""
    return [[tensor.numpy() for tensor in inputs(row)] for row in tokens]


def operators(name: str) -> str:
    """What the names of a module's operators begin with, as a regular expression."""
    return rf"__module\.model\.{re.escape(name)}/"


def parameter(name: str) -> str:
    """The name of the constant that holds a parameter."""
    return f"self.model.{name}"


def values(nodes: Mapping[str, Any]) -> dict[str, Tensor]:
    """What constants of any type hold, and what operators make of constants alone: fp32."""
    import openvino as ov

    outputs = [ov.opset13.convert(node, "f32") for node in nodes.values()]
    results = ov.compile_model(ov.Model(outputs, []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
    return {name: torch.from_numpy(results[i].copy()) for i, name in enumerate(nodes)}


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
