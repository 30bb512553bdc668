"""INT8 and full precision as the tool answers with them, and the metrics that it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import PerChannelMinMaxObserver

from kernels.packed import PackedDense
from methods.base import Budget, Context
from methods.network import Network
from methods.toolchains.neural_compressor_legacy import INT8, METRICS, ToolINCHAWQV2, batched, measured, read
from methods.toolchains.process import Answer

Build = Callable[..., Network]
Given = Callable[..., Context]


class Quantized:
    """A linear of PyTorch's: its weight is a function."""

    def __init__(self, weight: torch.Tensor) -> None:
        observer = PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
        observer(weight)
        scale, zero = observer.calculate_qparams()
        self.quantized = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)

    def weight(self) -> torch.Tensor:
        return self.quantized


def test_linears_are_int8_or_as_they_were(small_llama: Build, context: Given) -> None:
    network = small_llama()
    modules: dict[str, Any] = {}
    for name in network.linears:
        modules[name] = network.linear(name) if "down_proj" in name else Quantized(network.weight(name))

    def tools(module: str, requirements: Any, settings: Mapping[str, Any]) -> Answer:
        assert module.endswith("neural_compressor_legacy")
        assert json.loads(json.dumps(settings))["loss"] == 0.02
        return Answer({f"{n}/{key}": t for n, m in modules.items() for key, t in read(m).items()}, {}, 1.0, 1)

    ctx = replace(context(network, Budget(bits=8)), tools=tools)
    done = ToolINCHAWQV2(loss=0.02).quantize(ctx)
    for name, packed in done.packed.items():
        weight = network.weight(name)
        if "down_proj" in name:
            assert isinstance(packed, PackedDense)
            assert torch.allclose(packed.dequantize(), weight, atol=1e-3 * weight.abs().max().item())
        else:
            assert packed.stored_bits() == INT8.stored_bits(network.shape(name))
            expected = modules[name].weight().dequantize()
            assert torch.allclose(packed.dequantize(), expected, atol=1e-3 * weight.abs().max().item())
            assert (packed.dequantize() - weight).abs().max() < weight.abs().max() / 127
    assert not done.inputs


def test_metrics_are_over_all_tokens() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0]])
    tokens = torch.tensor([0, 2, 0])
    chosen = logits.softmax(1)[torch.arange(3), tokens]

    class Model(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return logits[inputs]

    batches = [(torch.tensor([0, 1]), tokens[:2]), (torch.tensor([2]), tokens[2:])]
    perplexity, more_is_better = METRICS["perplexity"]
    assert measured(Model(), batches, perplexity) == pytest.approx(float(chosen.prod() ** (-1 / 3)))
    assert not more_is_better
    accuracy, more_is_better = METRICS["accuracy"]
    assert measured(Model(), batches, accuracy) == pytest.approx(2 / 3)
    assert more_is_better


def test_batches_fit_cross_entropy_as_they_are() -> None:
    samples = [(torch.full((4, 5), float(i)), torch.arange(4) + 10 * i) for i in range(3)]
    inputs, tokens = batched(samples)
    assert inputs.shape == (3, 4, 5)
    assert tokens.tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert torch.equal(inputs[:, 0, 0], torch.arange(3.0))


def test_what_it_cannot_do_is_refused_in_words(small_llama: Build) -> None:
    network = small_llama()
    tool = ToolINCHAWQV2()
    assert tool.supports(network, Budget(effective_bits=8.5)) is None
    assert "stores 8.2" in str(tool.supports(network, Budget(effective_bits=4.8)))
    assert "0.5 gigabops" in str(tool.supports(network, Budget(gigabops=0.5)))
    with pytest.raises(ValueError, match="unknown metric"):
        ToolINCHAWQV2(metric="loss")
