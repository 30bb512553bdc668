import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kernels.dyadic import PackedDyadic
from kernels.linear import QuantLinear
from kernels.packed import PackedInteger
from methods.base import Budget, Context
from methods.dyadic import input_maxima, output_maxima, to_integer_only
from methods.formats.dense import Dense
from methods.formats.integer import Integer
from methods.network import Network
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest, round_to_nearest

Build = Callable[..., Network]
BuildContext = Callable[..., Context]


def rounded(network: Network, width: int) -> dict[str, PackedInteger]:
    fmt, packed = Integer(width, symmetric=True), {}
    for name in network.linears:
        weight = network.weight(name)
        grid = fmt.fit(weight)
        packed[name] = grid.pack(grid.encode(weight))
    return packed


def replaced(network: Network, modules: dict[str, nn.Module]) -> nn.Module:
    """A copy of the model with other modules in place of its linears."""
    model = copy.deepcopy(network.model)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def integer_only(context: Context, width: int, output_bits: int) -> dict[str, PackedDyadic]:
    network = context.network
    inputs, outputs = input_maxima(network, context.statistics), output_maxima(network, context.tokens)
    return to_integer_only(network, rounded(network, width), inputs, outputs, output_bits)


def relative_error(context: Context, width: int, output_bits: int) -> float:
    linears = {name: QuantLinear(packed) for name, packed in integer_only(context, width, output_bits).items()}
    expected = logits(context.network.model, context.tokens)
    return float((logits(replaced(context.network, linears), context.tokens) - expected).norm() / expected.norm())


class FakeQuantLinear(nn.Module):
    """What the integer-only linear stands for, in fp64: rounded input, weight, bias and output."""

    def __init__(self, linear: nn.Linear, packed: PackedInteger, input_max: float, output_max: float) -> None:
        super().__init__()
        self.input_step, self.output_step = input_max / 127, output_max / 32767
        self.weight = packed.dequantize().double()
        step = packed.scale[:, 0].double() * self.input_step
        self.bias = None if linear.bias is None else torch.round(linear.bias.detach() / step) * step

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.round(x.double() / self.input_step).clamp(-128, 127)
        y = nn.functional.linear(codes * self.input_step, self.weight, self.bias)
        return (torch.round(y / self.output_step).clamp(-(2**15), 2**15 - 1) * self.output_step).to(x.dtype)


def test_maxima_are_those_of_inputs_and_outputs_bias_included(small_llama: Build, context: BuildContext) -> None:
    ctx = context(small_llama(attention_bias=True))
    inputs, outputs = input_maxima(ctx.network, ctx.statistics), output_maxima(ctx.network, ctx.tokens, batch_size=3)
    assert set(inputs) == set(outputs) == set(ctx.network.linears)
    first = ctx.network.blocks[0].groups[0].linears
    with torch.no_grad():
        hidden = ctx.network.module("model.embed_tokens")(ctx.tokens)
        x = ctx.network.module("model.layers.0.input_layernorm")(hidden)
        for name in first:
            assert inputs[name] == pytest.approx(float(x.abs().max()))
            assert outputs[name] == pytest.approx(float(ctx.network.linear(name)(x).abs().max()))


def test_linears_of_a_group_share_the_input_scale_and_keep_their_biases(
    small_llama: Build, context: BuildContext
) -> None:
    ctx = context(small_llama(attention_bias=True))
    packed = integer_only(ctx, 8, 8)
    for group in ctx.network.groups:
        assert len({float(packed[name].input_scale) for name in group.linears}) == 1
    assert len({float(p.input_scale) for p in packed.values()}) == len(ctx.network.groups)
    for name, made in packed.items():
        assert (made.bias is None) == (ctx.network.linear(name).bias is None)


def test_eight_bit_integer_only_logits_are_near_those_of_the_float_model(
    small_llama: Build, context: BuildContext
) -> None:
    ctx = context(small_llama(attention_bias=True, mlp_bias=True))
    assert relative_error(ctx, 8, 8) < 0.03
    assert relative_error(ctx, 8, 16) < 0.02
    assert relative_error(ctx, 4, 16) > 0.08


def test_integer_only_logits_are_those_of_a_fake_quantized_model(small_llama: Build, context: BuildContext) -> None:
    ctx = context(small_llama(attention_bias=True))
    network, packed = ctx.network, rounded(ctx.network, 8)
    inputs, outputs = input_maxima(network, ctx.statistics), output_maxima(network, ctx.tokens)
    made = to_integer_only(network, packed, inputs, outputs, 16)
    fakes: dict[str, nn.Module] = {
        name: FakeQuantLinear(network.linear(name), weight, inputs[name], outputs[name])
        for name, weight in packed.items()
    }
    expected = logits(replaced(network, fakes), ctx.tokens)
    actual = logits(replaced(network, {name: QuantLinear(p) for name, p in made.items()}), ctx.tokens)
    # Equal to 1e-5 unless fp32 carries an input across a half; one code more or less then moves logits by 1e-3.
    assert (actual - expected).norm() / expected.norm() < 2e-3


def test_mixed_widths_of_the_pipeline_become_integer_only(small_llama: Build, context: BuildContext) -> None:
    ctx = context(small_llama(), Budget(bits=8, group_size=0, symmetric=True))
    inputs = input_maxima(ctx.network, ctx.statistics)
    widths = {name: 4 if "mlp" in name else 8 for name in ctx.network.linears}
    packed = quantize_network(ctx, {name: ctx.budget.format(width) for name, width in widths.items()}, Nearest())
    made = to_integer_only(ctx.network, packed, inputs, output_maxima(ctx.network, ctx.tokens), 8)
    assert {name: p.bits for name, p in made.items()} == widths
    for name, p in made.items():
        assert torch.equal(p.dequantize(), ctx.network.weight(name))


def test_ranges_never_seen_are_one_and_logged(
    small_llama: Build, context: BuildContext, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = context(small_llama())
    dead = ctx.network.linears[0]
    ctx.network.overwrite(dead, torch.zeros(ctx.network.shape(dead)))
    with caplog.at_level(logging.WARNING):
        made = integer_only(ctx, 8, 8)[dead]
    assert [record.args for record in caplog.records] == [("output", dead)]
    assert float(made.output_scale) == pytest.approx(1 / 127)
    assert not made(torch.ones(1, ctx.network.shape(dead)[1])).any()


@pytest.mark.parametrize(
    ("fmt", "message"),
    [(Integer(8), "zero points"), (Integer(8, 32, symmetric=True), "per output channel"), (Dense(), "integer codes")],
)
def test_other_codes_are_refused_with_the_linears_name(small_llama: Build, fmt: Integer | Dense, message: str) -> None:
    network = small_llama()
    name = network.linears[1]
    packed = {name: round_to_nearest(network.weight(name), fmt).packed}
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        to_integer_only(network, packed, {name: 1.0}, {name: 1.0}, 8)


@pytest.mark.parametrize("maximum", [-1.0, float("nan"), float("inf")])
def test_impossible_maxima_are_refused(small_llama: Build, maximum: float) -> None:
    network = small_llama()
    name = network.linears[0]
    with pytest.raises(ValueError, match=f"{name}: .*input"):
        to_integer_only(network, {name: rounded(network, 8)[name]}, {name: maximum}, {name: 1.0}, 8)
