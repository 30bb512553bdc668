"""Bits and bytes are those of the packed tensors; errors are those of the layer's real outputs."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness import accounting
from harness.calibration import as_statistics, collect
from kernels.linear import QuantLinear
from methods.base import Budget, Quantized, Stat
from methods.formats.dense import Dense
from methods.formats.integer import Integer
from methods.network import discover


@pytest.fixture
def network():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return discover(LlamaForCausalLM(config).eval(), 50)


def quantize(network, fmt) -> Quantized:
    packed = {}
    for name in network.linears:
        weight = network.weight(name)
        grid = fmt.fit(weight)
        packed[name] = grid.pack(grid.encode(weight))
    return Quantized(packed)


def test_bytes_are_counted_from_tensors(network):
    model = accounting.packed_copy(network, quantize(network, Integer(3, 32)))
    storage = accounting.storage(model)
    weights = sum(o * i for o, i in network.shapes)
    # 3 bits a code, and for every 32 of them an fp16 scale and a 3-bit zero.
    assert storage["effective_bits"] == pytest.approx(3 + (16 + 3) / 32, abs=1e-3)
    assert storage["linear_bytes"] == pytest.approx(storage["effective_bits"] * weights / 8, abs=1)
    assert storage["embedding_bytes"] == 2 * 50 * 64
    assert storage["head_bytes"] == 0  # tied
    norms = 2 * 64 * (2 * 2 + 1)
    assert storage["model_bytes"] == storage["linear_bytes"] + storage["embedding_bytes"] + norms


def test_an_untied_head_is_counted_apart(network):
    network.model.lm_head.weight = torch.nn.Parameter(network.model.lm_head.weight.detach().clone())
    storage = accounting.storage(accounting.packed_copy(network, quantize(network, Dense())))
    assert storage["head_bytes"] == storage["embedding_bytes"] == 2 * 50 * 64
    assert storage["effective_bits"] == 16


def test_the_packed_model_computes_what_the_codes_say(network):
    quantized = quantize(network, Integer(4, 32))
    model = accounting.packed_copy(network, quantized)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(network.linears)
    assert not any(isinstance(m, torch.nn.Linear) for n, m in model.named_modules() if "layers" in n)
    expected = copy.deepcopy(network.model)
    for name in network.linears:
        expected.get_submodule(name).weight.data = quantized.packed[name].dequantize()
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


def test_the_original_is_untouched(network):
    before = {name: p.clone() for name, p in network.model.named_parameters()}
    quantized = quantize(network, Integer(2, 32))
    quantized.parameters["model.norm.weight"] = torch.full((64,), 3.0)
    model = accounting.packed_copy(network, quantized)
    assert torch.equal(model.model.norm.weight, torch.full((64,), 3.0))
    assert all(torch.equal(p, before[name]) for name, p in network.model.named_parameters())


def test_output_error_is_the_mean_squared_error_of_outputs(network):
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(1))
    statistics = as_statistics(network, collect(network, tokens, frozenset({Stat.GRAM})))
    quantized = quantize(network, Integer(2, 32))
    name = network.linears[-1]
    inputs = []
    handle = network.linear(name).register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
    network.logits(tokens)
    handle.remove()
    x, weight, rounded = torch.cat(inputs), network.weight(name), quantized.packed[name].dequantize()
    expected = (x @ (rounded - weight).T).square().mean() / (x @ weight.T).square().mean()
    layers = {entry["name"]: entry for entry in accounting.layers(network, quantized, statistics)}
    assert layers[name]["output_error"] == pytest.approx(expected.item(), rel=1e-4)
    assert layers[name]["bits"] == 2


def test_scales_are_undone_before_the_error_is_measured(network):
    """A weight stored as diag(1/t)·W·diag(s), exactly, has no error."""
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    statistics = as_statistics(network, collect(network, tokens, frozenset({Stat.GRAM})))
    quantized = quantize(network, Dense())
    name = network.linears[0]
    t, s = 2.0 ** torch.randint(-2, 3, (64,)), 2.0 ** torch.randint(-2, 3, (64,))
    weight = network.weight(name).half().float() / t[:, None] * s
    grid = Dense().fit(weight)
    quantized.packed[name] = grid.pack(grid.encode(weight))
    entry = accounting.layers(network, quantized, statistics)[0]
    assert entry["output_error"] > 1e-2
    quantized.input_scale[name], quantized.output_scale[name] = s, t
    assert accounting.layers(network, quantized, statistics)[0]["output_error"] < 1e-6


def test_a_method_that_forgets_a_linear_or_returns_nan_is_refused(network):
    quantized = quantize(network, Integer(4, 32))
    name = network.linears[3]
    quantized.packed[name].scale[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} contains NaN"):
        accounting.packed_copy(network, quantized)
    del quantized.packed[name]
    with pytest.raises(ValueError, match="no packed weight for 1 linears"):
        accounting.packed_copy(network, quantized)


def test_ragged_groups_are_mentioned(network):
    assert accounting.ragged_note(network, 32) is None
    assert "64 or 96 input channels, no multiple of the group size 40" in str(accounting.ragged_note(network, 40))
    assert accounting.ragged_note(network, 0) is None


def test_budgets_are_limits_on_stored_bits(network):
    stored = accounting.storage(accounting.packed_copy(network, quantize(network, Integer(4, 32))))
    assert Budget(bits=4, group_size=32).limit(network.shapes) == pytest.approx(stored["effective_bits"], abs=1e-12)
