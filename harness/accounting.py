"""What a quantized model stores, counted from its packed tensors, and what rounding did to each layer's output."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.cpu.pages import huge
from kernels.linear import QuantLinear
from kernels.packed import Packed
from methods.base import Quantized, Stat, Statistics
from methods.network import Network

SIXTEEN_BITS = 2  # bytes of a parameter that is not quantized, whatever dtype it has in memory


def packed_copy(network: Network, quantized: Quantized) -> nn.Module:
    """The model with a `QuantLinear` in place of each linear; everything else copied from `network`, untouched.

    Raises:
        ValueError: the method left a linear out, or returned a matrix of another shape or with NaN or Inf.
    """
    missing = [name for name in network.linears if name not in quantized.packed]
    if missing:
        raise ValueError(f"the method returned no packed weight for {len(missing)} linears, first {missing[0]}")
    replacements: dict[int, Any] = {}
    for name in network.linears:
        linear, packed = network.linear(name), quantized.packed[name]
        if packed.shape != network.shape(name):
            raise ValueError(f"{name} is {network.shape(name)} but was packed as {packed.shape}")
        if not torch.isfinite(packed.dequantize()).all():
            raise ValueError(f"the packed weight of {name} contains NaN or Inf")
        bias = quantized.parameters.get(f"{name}.bias", linear.bias) if packed.bias_name is None else None
        replacements[id(linear)] = QuantLinear(
            packed, None if bias is None else bias.detach().clone(), quantized.inputs.get(name)
        )
    model = copy.deepcopy(network.model, replacements)
    _set_parameters(model, quantized.parameters)
    huge(model)
    return model


@torch.no_grad()
def _set_parameters(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in changed.items():
        if name in parameters:  # biases of linears are buffers of their QuantLinear by now
            parameters[name].copy_(value)


def storage(model: nn.Module) -> dict[str, Any]:
    """Bytes by part and effective bits of the linears, of a model made by `packed_copy`.

    Embedding and head (zero bytes when tied to the embedding), norms and biases count 16 bits a parameter.
    """
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    stored_bits = sum(m.packed.stored_bits() for m in linears)
    weights = sum(m.in_features * m.out_features for m in linears)
    biases = sum(bias.numel() for m in linears for bias in (m.bias, _own_bias(m.packed)) if bias is not None)
    embedding, head = _weight(model, "get_input_embeddings"), _weight(model, "get_output_embeddings")
    unquantized = SIXTEEN_BITS * (sum(p.numel() for p in model.parameters()) + biases)
    return {
        "effective_bits": stored_bits / weights,
        "linear_bytes": stored_bits // 8,
        "model_bytes": stored_bits // 8 + unquantized,
        "embedding_bytes": SIXTEEN_BITS * embedding.numel() if embedding is not None else 0,
        "head_bytes": SIXTEEN_BITS * head.numel() if head is not None and head is not embedding else 0,
    }


def _own_bias(packed: Packed) -> Tensor | None:
    return None if packed.bias_name is None else dict(packed.named_buffers()).get(packed.bias_name)


def _weight(model: nn.Module, getter: str) -> nn.Parameter | None:
    module = getattr(model, getter)()
    return None if module is None else module.weight


def layers(network: Network, quantized: Quantized, statistics: Statistics | None) -> list[dict[str, Any]]:
    """One entry a linear: width, stored bits a weight, relative output error and sensitivity.

    The output error is E‖(Ŵ−W)x‖² / E‖Wx‖² over the calibration tokens, through the Gram matrix of the original
    model's inputs; None without statistics.
    """
    entries = []
    for name in network.linears:
        packed, (out, columns) = quantized.packed[name], network.shape(name)
        entries.append(
            {
                "name": name,
                "bits": packed.bits,
                "input_bits": quantized.inputs[name].bits if name in quantized.inputs else None,
                "effective_bits": packed.stored_bits() / (out * columns),
                "output_error": None if statistics is None else _output_error(network, quantized, name, statistics),
                "sensitivity": quantized.sensitivity.get(name),
            }
        )
    return entries


def _output_error(network: Network, quantized: Quantized, name: str, statistics: Statistics) -> float:
    weight, rounded = network.weight(name), quantized.packed[name].dequantize()
    if name in quantized.input_scale:
        rounded = rounded / quantized.input_scale[name]
    if name in quantized.output_scale:
        rounded = rounded * quantized.output_scale[name].unsqueeze(1)
    gram = statistics(Stat.GRAM, name)
    power = ((weight @ gram) * weight).sum()
    delta = rounded - weight
    return float(((delta @ gram) * delta).sum() / power.clamp(min=torch.finfo(torch.float32).tiny))


def ragged_note(network: Network, group_size: int) -> str | None:
    """A sentence on linears whose last group is shorter than the others, or None."""
    ragged = [n for n in network.linears if group_size and network.shape(n)[1] % group_size]
    if not ragged:
        return None
    widths = sorted({network.shape(n)[1] for n in ragged})
    return (
        f"{len(ragged)} linears have {' or '.join(map(str, widths))} input channels, no multiple of the group size "
        f"{group_size}: their last group is shorter and has its own scale"
    )
