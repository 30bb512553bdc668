"""Identities of the smoothing scale, what is smoothed, static ranges, the choice of alpha, and planted outliers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.accounting import packed_copy
from harness.outliers import Outliers, plant
from kernels.activations import StaticScale, TensorScale, TokenScale
from kernels.packed import PackedInteger
from methods.base import Budget, Context, Method, Stat
from methods.formats.integer import Integer
from methods.inputs import input_format
from methods.network import Network, hooks
from methods.rtn import RTN
from methods.smoothquant import SmoothQuant
from methods.transforms.smoothquant import SmoothQuantScales

EIGHT = Budget(bits=8, group_size=0)
FORMAT = Integer(8, symmetric=True, restricted=True)
SMOOTHED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def network(small_llama: Callable[..., Network]) -> Network:
    """A producer for every group: one head per value head."""
    return small_llama(num_key_value_heads=4)


def smoothed(ctx: Context, **options: Any) -> Any:
    return SmoothQuantScales(**options)(ctx, dict.fromkeys(ctx.network.linears, FORMAT))


def largest_inputs(network: Network, tokens: Tensor) -> dict[str, Tensor]:
    """max|x| over tokens [in] of each linear's input."""
    found: dict[str, Tensor] = {}

    def spy(name: str) -> Any:
        return lambda module, args: found.__setitem__(name, args[0].abs().flatten(0, -2).amax(0))

    with hooks([network.linear(name).register_forward_pre_hook(spy(name)) for name in network.linears]):
        network.logits(tokens)
    return found


def largest_weights(network: Network, linears: tuple[str, ...]) -> Tensor:
    return torch.cat([network.weight(name) for name in linears]).abs().amax(0)


def error(build: Callable[[], Network], context: Callable[..., Context], method: Method) -> float:
    """Relative error of the logits of the model that the evaluation would run."""
    network, original = build(), build()
    ctx = context(network, EIGHT)
    exact = original.logits(ctx.scoring)
    logits = Network(packed_copy(original, method.quantize(ctx)), ()).logits(ctx.scoring)
    return float((logits - exact).norm() / exact.norm())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smoothing_leaves_the_function_unchanged(
    network: Network, context: Callable[..., Context], alpha: float
) -> None:
    plant(network, Outliers(channels=4))
    ctx = context(network)
    before, norms = network.logits(ctx.scoring), dict(network.model.named_parameters())
    folds = smoothed(ctx, alpha=alpha)
    torch.testing.assert_close(network.logits(ctx.scoring), before, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(norms[name], value) for name, value in folds.parameters.items())


def test_only_inputs_that_a_norm_produces_are_smoothed(network: Network, context: Callable[..., Context]) -> None:
    assert all(group.producer for group in network.groups)
    before = {name: network.weight(name) for name in network.linears}
    folds = smoothed(context(network))
    assert set(folds.input_scale) == {name for name in network.linears if name.endswith(SMOOTHED)}
    assert folds.output_scale == {}
    for name, weight in before.items():
        assert torch.equal(network.weight(name), weight) == (not name.endswith(SMOOTHED))


def test_at_one_half_inputs_and_weights_have_equal_ranges(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    smoothed(ctx, alpha=0.5)
    inputs = largest_inputs(network, ctx.tokens)
    for group in network.groups:
        if group.name.endswith(SMOOTHED):
            torch.testing.assert_close(inputs[group.name], largest_weights(network, group.linears), rtol=1e-3, atol=0)


def test_at_the_ends_one_side_has_range_1_in_every_channel(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    smoothed(ctx, alpha=1.0)
    inputs = largest_inputs(network, ctx.tokens)
    groups = [group for group in network.groups if group.name.endswith(SMOOTHED)]
    for group in groups:
        torch.testing.assert_close(inputs[group.name], torch.ones(64), rtol=1e-3, atol=0)
    ctx = context(network)
    smoothed(ctx, alpha=0.0)
    for group in groups:
        torch.testing.assert_close(largest_weights(network, group.linears), torch.ones(64))


def test_dead_channels_and_zero_columns_are_bounded(network: Network, context: Callable[..., Context]) -> None:
    group = network.groups[0]
    assert group.producer
    network.module(group.producer).weight[3] = 0
    for name in group.linears:
        weight = network.weight(name)
        weight[:, 7] = 0
        network.overwrite(name, weight)
    ctx = context(network)
    before = network.logits(ctx.scoring)
    largest = ctx.statistics(Stat.MAX_ABS, group.name)
    scale = smoothed(ctx).input_scale[group.name]
    assert scale[3] == pytest.approx(1e-5)
    assert scale[7] == pytest.approx(float((largest[7] / 1e-5).sqrt()))
    torch.testing.assert_close(network.logits(ctx.scoring), before, atol=1e-4, rtol=1e-4)


def test_inputs_that_overflow_are_reported(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    ctx.statistics = lambda stat, name: torch.full((network.shape(name)[1],), torch.inf)
    with pytest.raises(FloatingPointError, match="run the model in fp32"):
        smoothed(ctx)


def test_weights_are_restricted_integers_of_the_budgets_groups(
    network: Network, small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    for other, budget in ((network, EIGHT), (small_llama(), Budget(bits=4, group_size=32))):
        done = SmoothQuant().quantize(context(other, budget))
        for packed in done.packed.values():
            assert isinstance(packed, PackedInteger) and packed.zero is None and packed.bits == budget.bits
            assert packed.group_size == (budget.group_size or packed.shape[1])
            assert int(packed.unpacked_codes().min()) >= 1


@pytest.mark.parametrize(("name", "kind"), [("token", TokenScale), ("tensor", TensorScale), ("static", StaticScale)])
def test_the_papers_three_ways_to_round_inputs(
    network: Network, context: Callable[..., Context], name: str, kind: type
) -> None:
    ctx = context(network, EIGHT)
    transformed = context(network)  # the same statistics, which are read before anything changes
    done = SmoothQuant(inputs=f"int8-{name}").quantize(ctx)
    assert all(type(done.inputs[linear]) is kind for linear in network.linears)
    for linear, rounding in done.inputs.items():
        if isinstance(rounding, StaticScale):  # after smoothing
            scale = done.input_scale.get(linear, torch.ones(1))
            largest = (transformed.statistics(Stat.MAX_ABS, linear) / scale).max()
            torch.testing.assert_close(rounding.step * 127, largest)


def test_smoothing_half_and_half_undoes_planted_outliers_exactly(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    """Planting multiplies max|x| by κ and divides max|w| by it, so that their geometric mean stays."""

    def planted() -> Network:
        network = small_llama()
        plant(network, Outliers(channels=4))
        return network

    without, with_outliers = (error(build, context, SmoothQuant()) for build in (small_llama, planted))
    assert with_outliers == pytest.approx(without, rel=0.02)
    for inputs in ("int8-token", "int8-tensor", "int8-static"):
        plain, smooth = (error(planted, context, method(inputs=inputs)) for method in (RTN, SmoothQuant))
        assert smooth < plain / 5


def test_the_search_takes_the_alpha_of_least_output_error(network: Network, context: Callable[..., Context]) -> None:
    plant(network, Outliers(channels=2, scale=16))
    ctx, alphas = context(network), (0.1, 0.4, 0.6, 0.9)
    exact = {name: network.weight(name) for name in network.linears}
    inputs: dict[str, Tensor] = {}

    def spy(name: str) -> Any:
        return lambda module, args: inputs.__setitem__(name, args[0].flatten(0, -2))

    with hooks([network.linear(name).register_forward_pre_hook(spy(name)) for name in network.linears]):
        network.logits(ctx.scoring)
    ctx.tokens = ctx.tokens[:0]  # the choice is made on the scoring text
    folds = SmoothQuantScales(alphas=alphas, inputs="int4-tensor")(ctx, dict.fromkeys(network.linears, Integer(3)))
    best = set()
    for group in network.groups:
        if not group.name.endswith(SMOOTHED):
            continue
        largest, weights = ctx.statistics(Stat.MAX_ABS, group.name), [exact[name] for name in group.linears]
        column = torch.cat(weights).abs().amax(0)
        scales = [largest**alpha / column ** (1 - alpha) for alpha in alphas]
        losses = []
        for scale in scales:
            x = input_format("int4-tensor").rounding()(inputs[group.name] / scale)
            rounded = [Integer(3).fit(w * scale).snap(w * scale) for w in weights]
            pairs = zip(rounded, weights, strict=True)
            losses.append(sum(float((x @ r.T - inputs[group.name] @ w.T).square().sum()) for r, w in pairs))
        best.add(losses.index(min(losses)))
        torch.testing.assert_close(folds.input_scale[group.name], scales[losses.index(min(losses))])
    assert best != {0}


def test_a_search_among_one_alpha_is_that_alpha(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    first, second = (context(small_llama(), EIGHT) for _ in range(2))
    one, other = SmoothQuant(alphas=(0.3,)).quantize(first), SmoothQuant(alpha=0.3).quantize(second)
    for name, scale in one.input_scale.items():
        assert torch.equal(scale, other.input_scale[name])


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha=1\.5 is outside 0 to 1"):
        SmoothQuant(alpha=1.5)
    with pytest.raises(ValueError, match="alpha=-1 is outside"):
        SmoothQuant(alphas=(0.5, -1))
    with pytest.raises(ValueError, match="unknown input format 'int8-rows': did you mean int8-token"):
        SmoothQuant(inputs="int8-rows")
