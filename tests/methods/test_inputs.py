"""Names of input formats, static ranges, and methods that round inputs beside weights."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.accounting import packed_copy
from kernels.activations import InputRounding, StaticScale, TensorScale, TokenScale, integers
from kernels.minifloat import E4M3
from methods.awq import AWQ
from methods.base import Budget, Context, Method, Stat, discover
from methods.formats.registry import named_format
from methods.gptq import GPTQ
from methods.inputs import INPUT_FORMATS, input_format, input_roundings
from methods.network import Network, hooks
from methods.rtn import RTN
from methods.uniform import AnyFormat

EIGHT = Budget(bits=8, group_size=0)
METHODS = [RTN, GPTQ, AWQ]


def quantized_logits(network: Network, ctx: Context, method: Method) -> Tensor:
    """Logits of the model that the evaluation would run."""
    original = Network(packed_copy(network, network_unchanged(network, ctx, method)), ())
    return original.logits(ctx.scoring)


def network_unchanged(network: Network, ctx: Context, method: Method) -> Any:
    saved = {name: value.clone() for name, value in network.model.state_dict().items()}
    done = method.quantize(ctx)
    network.model.load_state_dict(saved)
    return done


def test_names_are_elements_times_scopes() -> None:
    assert {f"int{bits}-{scope}" for bits, scope in product(range(2, 9), ["token", "tensor", "static"])} | {
        f"{name}-{scope}" for name, scope in product(["fp8", "fp8-e5m2"], ["token", "tensor", "static"])
    } == {name for name in INPUT_FORMATS if not name.endswith("-block")}
    expected: dict[str, InputRounding] = {
        "int8-token": TokenScale(integers(8)),
        "int4-token": TokenScale(integers(4)),
        "int8-tensor": TensorScale(integers(8)),
        "int8-static": StaticScale(integers(8), 3.0),
        "fp8-token": TokenScale(E4M3),
        "fp8-static": StaticScale(E4M3, 3.0),
    }
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for name, rounding in expected.items():
        assert torch.equal(input_format(name).rounding(3.0)(x), rounding(x))
    assert {name for name, fmt in INPUT_FORMATS.items() if fmt.needs} == {n for n in INPUT_FORMATS if "static" in n}


@pytest.mark.parametrize(("name", "remedy"), [("int8-tokens", "int8-token"), ("e4m3", "there are")])
def test_wrong_names_are_refused_at_once(name: str, remedy: str) -> None:
    for method in METHODS:
        with pytest.raises(ValueError, match=f"unknown input format '{name}': .*{remedy}"):
            method(inputs=name)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_an_option_beside_the_weights(
    method: Any, small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, Budget(bits=4, group_size=32))
    plain = network_unchanged(network, ctx, method())
    rounded = network_unchanged(network, ctx, method(inputs="int8-token"))
    assert plain.inputs == {}
    assert list(rounded.inputs) == list(network.linears)
    for name in network.linears:
        assert isinstance(rounded.inputs[name], TokenScale) and rounded.inputs[name].bits == 8
        assert torch.equal(rounded.packed[name].dequantize(), plain.packed[name].dequantize())
    assert method(inputs="int8-token").label == f"{method.name} inputs=int8-token"


def test_no_method_with_this_option_can_forget_it() -> None:
    """`AnyFormat.quantize` rounds inputs; what a method adds is how it quantizes weights."""
    classes = [cls for cls in discover().values() if issubclass(cls, AnyFormat)]
    assert {cls.name for cls in classes} >= {"rtn", "gptq", "awq", "smoothquant"}
    assert [cls.name for cls in classes if cls.quantize is not AnyFormat.quantize] == []
    assert [cls.name for cls in classes if cls.quantize_weights is AnyFormat.quantize_weights] == []


@pytest.mark.parametrize("method", METHODS)
def test_only_static_ranges_need_calibration(method: Any) -> None:
    assert method(inputs="int8-token").statistics == method().statistics
    assert method(inputs="fp8-static").statistics == method().statistics | {Stat.MAX_ABS}


@torch.no_grad()
def test_static_ranges_are_those_of_the_transformed_input(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    """AWQ divides inputs by its scales: the range must be what its rescaled model, not yet rounded, shows."""
    network = small_llama(num_key_value_heads=4)
    ctx = context(network, Budget(bits=8, group_size=32))
    done = AWQ(clip=False, inputs="int8-static").quantize(ctx)
    fresh = small_llama(num_key_value_heads=4)
    for group in fresh.groups:
        if group.name in done.input_scale:
            fresh.fold(group, done.input_scale[group.name])
    largest: dict[str, float] = {}

    def spy(name: str) -> Any:
        return lambda module, args: largest.__setitem__(name, float(args[0].abs().max()))

    with hooks([fresh.linear(name).register_forward_pre_hook(spy(name)) for name in fresh.linears]):
        fresh.logits(ctx.tokens)
    for name in fresh.linears:
        rounding = done.inputs[name]
        assert isinstance(rounding, StaticScale)
        assert float(rounding.step) * 127 == pytest.approx(largest[name], rel=1e-3)
    moved = [name for name in fresh.linears if name in done.input_scale]
    assert any(
        largest[name] != pytest.approx(float(ctx.statistics(Stat.MAX_ABS, name).max()), rel=0.05) for name in moved
    )


@torch.no_grad()
def test_errors_grow_from_no_rounding_over_8_to_4_bits(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, EIGHT)
    exact = network.logits(ctx.scoring)
    names = ("", "int8-token", "int4-token", "int4-tensor")
    errors = [float((quantized_logits(network, ctx, RTN(inputs=name)) - exact).norm()) for name in names]
    assert errors == sorted(errors)
    assert errors[2] > 5 * errors[1]


@torch.no_grad()
def test_fp8_weights_and_inputs(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    ctx = context(network, EIGHT)
    exact = network.logits(ctx.scoring)
    for scope in ("token", "tensor", "static"):
        logits = quantized_logits(network, ctx, RTN(format="fp8", inputs=f"fp8-{scope}"))
        assert 1e-3 < float((logits - exact).norm() / exact.norm()) < 0.1


def test_an_input_that_is_always_zero_has_no_static_range(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network)
    ctx.statistics = lambda stat, name: torch.zeros(network.shape(name)[1])
    with pytest.raises(ValueError, match=r"input of model\.layers\.0.*q_proj is always zero.*with int4-token"):
        input_roundings(ctx, "int4-static")


@pytest.mark.parametrize(
    ("options", "budget", "refused"),
    [
        ({"format": "nvfp4"}, Budget(bits=4), True),
        ({"format": "mxfp8"}, EIGHT, True),
        ({"format": "nvfp4", "static_groups": True}, Budget(bits=4), False),
        ({"format": "nvfp4", "act_order": False}, Budget(bits=4), False),
        ({"format": "fp8"}, EIGHT, False),
        ({}, Budget(bits=4, group_size=32), False),
    ],
)
def test_gptq_says_early_where_reordered_groups_cannot_be_stored(
    options: dict[str, Any], budget: Budget, refused: bool, small_llama: Callable[..., Network], context: Any
) -> None:
    network = small_llama()
    method = GPTQ(**{"act_order": True} | options)
    reason = method.supports(network, budget)
    if refused:
        assert reason is not None and "static_groups=true" in reason
        assert method.format and named_format(method.format).name in reason
        with pytest.raises(ValueError, match="stores no group index"):
            method.quantize(context(network, budget))
    else:
        assert reason is None
        method.quantize(context(network, budget))


def test_mxfp4_inputs_are_rounded_block_by_block() -> None:
    """Every block of 32 has the power of two of the specification and the nearest of E2M1's eight magnitudes."""
    x = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0)) * 3
    found = input_format("mxfp4-block").rounding()(x)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for token, rounded in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        for block, told in zip(token.split(32), rounded.split(32), strict=True):
            scale = 2.0 ** (block.abs().max().log2().floor() - 2)
            nearest = magnitudes[(block.abs()[:, None] / scale - magnitudes).abs().argmin(1)] * scale
            assert torch.equal(told, nearest.copysign(block))


def test_nvfp4_inputs_have_a_scale_of_the_whole_input() -> None:
    """A block scale is the E4M3 number nearest to max|x| / 6 in units of the tensor's scale."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    tensor = x.abs().max() / (448 * 6)
    blocks = x.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1) / (6 * tensor)).to(torch.float8_e4m3fn).float() * tensor
    found = input_format("nvfp4-block").rounding().scale(x)
    torch.testing.assert_close(found, scale.repeat_interleave(16, dim=1))


@pytest.mark.parametrize("name", [name for name in INPUT_FORMATS if name.endswith("-block")])
def test_blocks_of_zeros_and_of_nothing_stay(name: str) -> None:
    rounding = input_format(name).rounding()
    assert torch.equal(rounding(torch.zeros(2, 40)), torch.zeros(2, 40))
    assert rounding(torch.zeros(0, 40)).shape == (0, 40)
