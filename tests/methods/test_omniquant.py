from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from kernels.activations import TokenScale
from kernels.packed import Packed, PackedInteger
from methods import omniquant
from methods.base import Budget, Context, Quantized, Stat
from methods.learned_clipping import LearnedInteger
from methods.network import Network, discover
from methods.omniquant import OmniQuant
from methods.reconstruction import Loop
from methods.rtn import RTN
from methods.stream import BlockStream
from methods.transforms.base import Folds

BUDGETS = [
    Budget(bits=2, group_size=32),
    Budget(bits=3, group_size=40),  # the last group of a row is shorter
    Budget(bits=3, group_size=0, symmetric=True),
]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def neox(**options: Any) -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48, **options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "neox": neox,
    "neox without biases in attention": lambda: neox(attention_bias=False),
}


def build(name: str) -> Network:
    """A random model of LayerNorms, with inputs that are far from 0 and of uneven magnitude."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for key, parameter in model.named_parameters():
            if "norm" in key and parameter.dim() == 1:
                nn.init.normal_(parameter, mean=1.0, std=1.0)
            elif parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.3)
    return discover(model, SIZES["vocab_size"])


@pytest.fixture
def uneven(small_llama: Callable[..., Network]) -> Callable[[], Network]:
    """A Llama with one head per value head, so that the output projection has a producer, and outliers."""

    def make() -> Network:
        network = small_llama(num_key_value_heads=4)
        for name, parameter in network.model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.randn(64, generator=torch.Generator().manual_seed(len(name)))
                parameter.data.copy_(torch.exp(1.5 * noise))
        return network

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(96, (16, 16), generator=torch.Generator().manual_seed(5))


def buffers(quantized: Quantized) -> dict[str, Tensor]:
    return {f"{n}.{key}": value for n, p in quantized.packed.items() for key, value in p.named_buffers()}


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_ranges_that_are_not_clipped_round_to_nearest(
    small_llama: Callable[..., Network],
    context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    budget: Budget,
) -> None:
    monkeypatch.setattr(omniquant, "LOGIT", 40.0)
    ours = OmniQuant(epochs=0).quantize(context(small_llama(), budget, statistics=False))
    expected = buffers(RTN().quantize(context(small_llama(), budget)))
    assert set(buffers(ours)) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in buffers(ours).items())
    assert not (ours.parameters or ours.input_scale or ours.output_scale or ours.inputs)


def test_clipping_begins_at_0982(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    weight = network.weight(network.linears[0])
    quantized = OmniQuant(epochs=0).quantize(context(network, Budget(bits=3, group_size=0), statistics=False))
    low, high = 0.98201379 * weight.amin(1, keepdim=True), 0.98201379 * weight.amax(1, keepdim=True)
    scale = ((high - low) / 7).half().float()
    zero = torch.round(-low / scale)
    expected = ((torch.round(weight / scale) + zero).clamp(0, 7) - zero) * scale
    torch.testing.assert_close(quantized.packed[network.linears[0]].dequantize(), expected, atol=1e-6, rtol=0)


def test_both_ends_of_a_range_have_factors_of_their_own(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, Budget(bits=3, group_size=0), statistics=False)
    student = omniquant._Clipped(OmniQuant(), ctx, Folds(), None, network.blocks[0])
    name = network.linears[0]
    with torch.no_grad():
        for logit, value in zip(student.linears[name].logits, (0.0, 40.0), strict=True):
            logit.fill_(value)
    weight = network.weight(name)
    low, high = 0.5 * weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = ((high - low) / 7).half().float()
    zero = torch.round(-low / scale)
    expected = ((torch.round(weight / scale) + zero).clamp(0, 7) - zero) * scale
    torch.testing.assert_close(student.tensors()[f"{name}.weight"], expected, atol=1e-6, rtol=0)


class Exact(Packed):
    """A matrix that is not rounded."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.bits = (weight.shape[0], weight.shape[1]), 32
        self.register_buffer("weight", weight)

    def dequantize(self) -> Tensor:
        return self.get_buffer("weight")


@pytest.fixture
def no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay as they are: what is left of OmniQuant is the transformation."""
    monkeypatch.setattr(LearnedInteger, "rounded", lambda self, groups, *_: self._matrix(groups))
    monkeypatch.setattr(LearnedInteger, "pack", lambda self, groups, *_: Exact(self._matrix(groups).detach().clone()))


@pytest.mark.parametrize("name", ["llama", *MODELS])
@pytest.mark.usefixtures("no_rounding")
def test_the_transformation_leaves_the_function_unchanged(
    context: Callable[..., Context],
    uneven: Callable[[], Network],
    monkeypatch: pytest.MonkeyPatch,
    tokens: Tensor,
    name: str,
) -> None:
    """With inputs that are transformed as if they were rounded, but are not."""
    monkeypatch.setattr(TokenScale, "forward", lambda self, x: x)
    network = uneven() if name == "llama" else build(name)
    original = {n: network.weight(n) for n in network.linears}
    known = {n: p.detach().clone() for n, p in network.model.named_parameters()}
    with torch.no_grad():
        before = network.logits(tokens)
    quantized = OmniQuant(epochs=1, batch=8, input_bits=8, lr_let=0.1).quantize(
        context(network, Budget(bits=8, group_size=0), tokens)
    )
    with torch.no_grad():
        torch.testing.assert_close(network.logits(tokens), before, atol=1e-3, rtol=1e-3)

    one = torch.ones(1)
    for n, weight in original.items():
        s, t = quantized.input_scale.get(n, one), quantized.output_scale.get(n, one)
        torch.testing.assert_close(t.unsqueeze(1) * network.weight(n) / s, weight, atol=1e-5, rtol=1e-4)
    assert all((scale - 1).abs().max() > 0.1 for scale in quantized.input_scale.values())
    kinds = {group.producer.split(".")[-1] for g in [network.group_of] for group in g.values() if group.producer}
    assert len(kinds) >= 2
    now = dict(network.model.named_parameters())
    changed = {n for n in now if n not in known or not torch.equal(now[n], known[n])}
    assert changed - {f"{n}.weight" for n in network.linears} == set(quantized.parameters)
    assert all(torch.equal(value, now[n]) for n, value in quantized.parameters.items())
    shifted = [n for n in network.linears if f"{n}.bias" in quantized.parameters]
    assert bool(shifted) == (name != "llama")  # RMSNorms have no bias to shift


def test_which_inputs_are_transformed(
    context: Callable[..., Context], uneven: Callable[[], Network], tokens: Tensor
) -> None:
    network = uneven()
    quantized = OmniQuant(epochs=0, let=True).quantize(context(network, Budget(bits=8, group_size=0), tokens))
    kinds = {name.split(".")[-1] for name in quantized.input_scale}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert {name.split(".")[-1] for name in quantized.output_scale} == {"v_proj"}
    assert not OmniQuant().statistics
    assert OmniQuant(let=True).statistics == OmniQuant(input_bits=8).statistics == {Stat.MAX_ABS, Stat.MEAN}


def test_scales_begin_as_those_of_smoothquant(
    context: Callable[..., Context], uneven: Callable[[], Network], tokens: Tensor
) -> None:
    """At α = 0.5 the largest magnitudes of a channel in inputs and in weights become equal."""
    network = uneven()
    ctx = context(network, Budget(bits=8, group_size=0), tokens)
    group = network.groups[0]
    weights = torch.cat([network.weight(name) for name in group.linears]).abs().amax(0)
    inputs = ctx.statistics(Stat.MAX_ABS, group.name)
    quantized = OmniQuant(epochs=0, let=True).quantize(ctx)
    scale = quantized.input_scale[group.name]
    torch.testing.assert_close(inputs / scale, weights * scale)


def first_block_error(network: Network, original: Network, tokens: Tensor, quantized: Quantized) -> float:
    handles = [
        network.linear(n).register_forward_pre_hook(lambda m, a, r=r: r(a[0])) for n, r in quantized.inputs.items()
    ]
    outputs = [torch.cat(BlockStream(n, tokens).run(0)) for n in (network, original)]
    for handle in handles:
        handle.remove()
    return float((outputs[0] - outputs[1]).square().mean())


@pytest.mark.parametrize("options", [{}, {"let": True}, {"input_bits": 4}], ids=str)
def test_learning_brings_the_output_closer(
    context: Callable[..., Context], uneven: Callable[[], Network], tokens: Tensor, options: dict[str, Any]
) -> None:
    budget, errors = Budget(bits=3, group_size=0), []
    for epochs in (0, 5):
        network = uneven()
        quantized = OmniQuant(epochs=epochs, batch=4, lr_lwc=0.2, **options).quantize(context(network, budget, tokens))
        errors.append(first_block_error(network, uneven(), tokens, quantized))
        for name, packed in quantized.packed.items():
            assert isinstance(packed, PackedInteger)
            assert torch.equal(packed.dequantize(), network.weight(name))
            assert packed.stored_bits() == budget.format().stored_bits(network.shape(name))
    assert errors[1] < 0.85 * errors[0]


def test_it_beats_nearest_where_bits_are_few(
    small_llama: Callable[..., Network], context: Callable[..., Context], tokens: Tensor
) -> None:
    errors = []
    for method in (RTN(), OmniQuant(epochs=8, batch=4, lr_lwc=0.2)):
        network = small_llama()
        quantized = method.quantize(context(network, Budget(bits=2, group_size=0), tokens))
        errors.append(first_block_error(network, small_llama(), tokens, quantized))
    assert errors[1] < 0.7 * errors[0]


def test_inputs_are_rounded_in_every_linear(
    context: Callable[..., Context], uneven: Callable[[], Network], tokens: Tensor
) -> None:
    network = uneven()
    quantized = OmniQuant(epochs=0, input_bits=6).quantize(context(network, Budget(bits=8, group_size=0), tokens))
    assert set(quantized.inputs) == set(network.linears)
    assert {(type(rounding), rounding.bits) for rounding in quantized.inputs.values()} == {(TokenScale, 6)}


def test_the_augmented_loss_matters_from_the_second_block_on(
    context: Callable[..., Context], small_llama: Callable[..., Network], tokens: Tensor
) -> None:
    """The first block reads what the full-precision block reads."""
    plain, augmented = (
        buffers(
            OmniQuant(epochs=2, batch=4, lr_lwc=0.3, aug_loss=augment).quantize(
                context(small_llama(), Budget(bits=2, group_size=0), tokens)
            )
        )
        for augment in (False, True)
    )
    differ = {name.split(".")[2] for name, value in plain.items() if not torch.equal(value, augmented[name])}
    assert differ == {"1"}


def test_a_silent_channel_has_a_scale(
    context: Callable[..., Context], uneven: Callable[[], Network], tokens: Tensor
) -> None:
    network = uneven()
    dead = "model.layers.0.input_layernorm.weight"
    with torch.no_grad():
        network.model.get_parameter(dead)[3] = 0
    network.overwrite(network.linears[0], network.weight(network.linears[0]).index_fill(0, torch.arange(4), 0))
    quantized = OmniQuant(epochs=1, batch=8, let=True).quantize(context(network, Budget(bits=3), tokens))
    assert all(scale.isfinite().all() and (scale >= 0.01 - 1e-9).all() for scale in quantized.input_scale.values())
    assert all(packed.dequantize().isfinite().all() for packed in quantized.packed.values())
    assert not quantized.packed[network.linears[0]].dequantize()[:4].any()


def test_scales_stay_positive(
    context: Callable[..., Context],
    uneven: Callable[[], Network],
    monkeypatch: pytest.MonkeyPatch,
    tokens: Tensor,
) -> None:
    """At a rate that throws them about, and with the last ones taken, however bad they are."""
    monkeypatch.setattr(OmniQuant, "_loop", lambda self, sequences: Loop(6, 4))
    method = OmniQuant(let=True, lr_let=1.0)
    quantized = method.quantize(context(uneven(), Budget(bits=3, group_size=0), tokens))
    scales = torch.cat(list(quantized.input_scale.values()))
    assert scales.min() == torch.tensor(0.01)


def test_what_makes_no_sense_is_refused() -> None:
    for options, word in (({"input_bits": 1}, "2 to 8"), ({"lr_let": 0.0}, "positive"), ({"epochs": -1}, "steps")):
        with pytest.raises(ValueError, match=word):
            OmniQuant(**options)
