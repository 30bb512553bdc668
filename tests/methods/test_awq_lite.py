from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from methods.base import Budget, Context, Stat
from methods.formats.integer import Integer
from methods.modelopt_awq import ModelOptAWQ
from methods.network import Network, hooks
from methods.transforms.awq_clip import RATIOS, AWQClip
from methods.transforms.awq_lite import ALPHAS, AWQLite, candidate_scale, search_scale, weight_magnitude

FORMAT = Integer(3, 32)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def network(small_llama: Callable[..., Network]) -> Network:
    """One head per value head, so that the output projection has a producer, and inputs of uneven energy."""
    network = small_llama(num_key_value_heads=4)
    for name, parameter in network.model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.exp(1.5 * torch.randn(64, generator=torch.Generator().manual_seed(len(name)))))
    return network


def inputs(network: Network, name: str, tokens: Tensor) -> Tensor:
    """[tokens, in]."""
    seen: list[Tensor] = []
    with hooks([network.linear(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))]):
        network.logits(tokens)
    return seen[0].flatten(0, 1)


def rounded(weight: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return FORMAT.fit(weight * scale).snap(weight * scale) / scale


def test_magnitudes_are_relative_to_the_largest_of_the_group() -> None:
    weight = torch.tensor([[1.0, -2.0, 4.0, 8.0, 3.0], [0.0, 0.0, -5.0, 1.0, -6.0]])
    expected = torch.tensor([(0.5 + 0) / 2, (1 + 0) / 2, (0.5 + 1) / 2, (1 + 0.2) / 2, (1 + 1) / 2])
    torch.testing.assert_close(weight_magnitude(weight, 2), expected)


def test_candidates_interpolate_between_weights_and_inputs() -> None:
    mean_abs, magnitude = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.2, 0.8, 0.5])

    def balanced(scale: Tensor) -> Tensor:
        return scale / (scale.max() * scale.min()).sqrt()

    torch.testing.assert_close(candidate_scale(mean_abs, magnitude, 1), balanced(mean_abs))
    torch.testing.assert_close(candidate_scale(mean_abs, magnitude, 0), balanced(1 / magnitude))
    torch.testing.assert_close(candidate_scale(mean_abs, magnitude, 0.5), balanced((mean_abs / magnitude).sqrt()))
    dead = candidate_scale(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert dead.isfinite().all()
    assert (dead > 0).all()


@pytest.mark.parametrize("index", range(4))
def test_the_chosen_scale_is_the_best_of_the_linear(
    network: Network, context: Callable[..., Context], index: int
) -> None:
    ctx, group = context(network), network.blocks[1].groups[index]
    x = inputs(network, group.name, ctx.tokens)
    for name in group.linears:
        weight = network.weight(name)
        scales = [candidate_scale(x.abs().mean(0), weight_magnitude(weight, 32), alpha) for alpha in ALPHAS]
        losses = [float(((rounded(weight, s) - weight) @ x.T).square().sum()) for s in scales]
        chosen = search_scale(weight, FORMAT, x.abs().mean(0), x.T @ x / len(x))
        torch.testing.assert_close(chosen, scales[losses.index(min(losses))])


def test_linears_that_share_an_input_share_the_mean_of_what_multiplies_it(
    network: Network, context: Callable[..., Context]
) -> None:
    ctx, group = context(network), network.blocks[0].groups[0]
    mean_abs, gram = (ctx.statistics(stat, group.name) for stat in (Stat.MEAN_ABS, Stat.GRAM))
    own = [search_scale(network.weight(name), FORMAT, mean_abs, gram) for name in group.linears]
    assert not torch.equal(own[0], own[2])
    folds = AWQLite()(ctx, dict.fromkeys(network.linears, FORMAT))
    factor = sum(1 / scale for scale in own) / 3
    for name in group.linears:
        torch.testing.assert_close(1 / folds.input_scale[name], factor)


def test_scales_are_found_on_unscaled_weights(network: Network, context: Callable[..., Context]) -> None:
    """The values' rows are divided by the scale of the output projection; their own scale must not know."""
    ctx, group = context(network), network.blocks[0].groups[3]
    mean_abs, gram = (ctx.statistics(stat, group.name) for stat in (Stat.MEAN_ABS, Stat.GRAM))
    expected = search_scale(network.weight(group.name), FORMAT, mean_abs, gram)
    folds = AWQLite()(ctx, dict.fromkeys(network.linears, FORMAT))
    torch.testing.assert_close(folds.input_scale[group.name], expected)
    assert set(folds.input_scale) == set(network.linears)


def test_the_function_is_unchanged(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    before, original = network.logits(ctx.scoring), {name: network.weight(name) for name in network.linears}
    folds = AWQLite()(ctx, dict.fromkeys(network.linears, FORMAT))
    torch.testing.assert_close(network.logits(ctx.scoring), before, atol=1e-4, rtol=1e-4)
    one = torch.ones(1)
    for name, weight in original.items():
        s, t = folds.input_scale[name], folds.output_scale.get(name, one)
        torch.testing.assert_close(t.unsqueeze(1) * network.weight(name) / s, weight)
    for name, value in folds.parameters.items():
        assert torch.equal(value, network.model.get_parameter(name))


def test_groups_without_a_producer_or_without_tokens_are_not_scaled(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()  # grouped-query attention
    ctx, dead = context(network), network.blocks[1].groups[3].name
    statistics = ctx.statistics
    ctx.statistics = lambda stat, name: statistics(stat, name) * (name != dead)
    folds = AWQLite()(ctx, dict.fromkeys(network.linears, FORMAT))
    assert set(network.linears) - set(folds.input_scale) == {b.groups[1].name for b in network.blocks} | {dead}


def test_inputs_that_overflow_are_told(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    ctx.statistics = lambda stat, name: torch.full((network.shape(name)[1],) * (1 + (stat == Stat.GRAM)), torch.inf)
    with pytest.raises(FloatingPointError, match="fp32"):
        AWQLite()(ctx, dict.fromkeys(network.linears, FORMAT))


def group_errors(candidate: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    delta = rounded(candidate) - weight
    parts = zip(delta.split(32, 1), x.split(32, 1), strict=True)
    return torch.stack([(part @ d.T).square().sum(0) for d, part in parts], 1)


def best_errors(weight: Tensor, x: Tensor) -> Tensor:
    largest = torch.stack([part.abs().amax(1) for part in weight.split(32, 1)], 1).repeat_interleave(32, 1)
    largest = largest[:, : weight.shape[1]]
    trials = [group_errors(weight.clamp(-c * largest, c * largest), weight, x) for c in RATIOS]
    return torch.stack(trials).amin(0)


def test_all_linears_are_clipped_at_the_best_thresholds(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    before = {name: network.weight(name) for name in network.linears}
    folds = AWQClip()(ctx, dict.fromkeys(network.linears, FORMAT))
    assert not folds.input_scale
    assert min(RATIOS) == pytest.approx(0.5)
    assert len(RATIOS) == 11
    for name, weight in before.items():
        block = int(name.split(".")[2])
        if block == 0:  # inputs of block 1 have changed since the statistics were collected
            x = inputs(network, name, ctx.tokens) if "down" not in name and "o_proj" not in name else None
            if x is not None and "q_proj" in name:
                ours = group_errors(network.weight(name), weight, x)
                torch.testing.assert_close(ours, best_errors(weight, x), rtol=1e-3, atol=1e-5)
        assert not torch.equal(network.weight(name), weight)
        assert (network.weight(name).abs() <= weight.abs()).all()


@pytest.mark.parametrize("algorithm", ["awq_lite", "awq_clip", "awq_full"])
def test_the_method_runs_what_it_names(
    network: Network, small_llama: Callable[..., Network], context: Callable[..., Context], algorithm: str
) -> None:
    ctx = context(network, Budget(bits=3, group_size=32))
    original = {n: p.clone() for n, p in network.model.named_parameters()}
    x = inputs(network, network.blocks[0].groups[0].name, ctx.tokens)
    quantized = ModelOptAWQ(algorithm=algorithm).quantize(ctx)
    assert bool(quantized.input_scale) == (algorithm != "awq_clip")
    one, name = torch.ones(1), network.blocks[0].groups[0].name
    scale = quantized.input_scale.get(name, one)
    weight = original[f"{name}.weight"] * scale
    if algorithm == "awq_lite":
        assert torch.equal(quantized.packed[name].dequantize(), rounded(weight))
    else:
        delta = quantized.packed[name].dequantize() - weight
        parts = zip(delta.split(32, 1), (x / scale).split(32, 1), strict=True)
        errors = torch.stack([(part @ d.T).square().sum(0) for d, part in parts], 1)
        torch.testing.assert_close(errors, best_errors(weight, x / scale), rtol=1e-3, atol=1e-5)

    fresh = small_llama(num_key_value_heads=4)
    for key, parameter in fresh.model.named_parameters():
        parameter.copy_(quantized.parameters.get(key, original[key]))
    for linear in fresh.linears:
        fresh.overwrite(linear, quantized.packed[linear].dequantize())
    torch.testing.assert_close(fresh.logits(ctx.scoring), network.logits(ctx.scoring))


def test_without_data_nothing_is_clipped(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    ctx.statistics = lambda stat, name: torch.zeros(network.shape(name)[1], network.shape(name)[1])
    before = {name: network.weight(name) for name in network.linears}
    AWQClip()(ctx, dict.fromkeys(network.linears, FORMAT))
    assert all(torch.equal(network.weight(name), weight) for name, weight in before.items())


def test_unknown_algorithms_are_told() -> None:
    with pytest.raises(ValueError, match="awq_lite"):
        ModelOptAWQ(algorithm="awq_light")
