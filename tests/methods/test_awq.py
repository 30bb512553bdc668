from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from methods.awq import AWQ
from methods.base import Budget, Context, Stat
from methods.formats.integer import Integer
from methods.network import Group, Network, hooks
from methods.transforms.awq import (
    RATIOS,
    SHRINK,
    AWQScales,
    candidate_scale,
    clip_weight,
    clipped_linears,
    search_scale,
)

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


def scope_inputs(network: Network, group: Group, tokens: Tensor) -> list[tuple[tuple, dict]]:
    calls: list[tuple[tuple, dict]] = []
    scope = network.module(group.scope)
    with hooks([scope.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)]):
        network.logits(tokens)
    return calls


def rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return FORMAT.fit(weight * scale).snap(weight * scale) / scale


def scope_loss(network: Network, group: Group, tokens: Tensor, scale: Tensor) -> float:
    """Squared error of the scope's output if the group is rounded under a scale."""
    ((args, kwargs),) = scope_inputs(network, group, tokens)

    def run() -> Tensor:
        output = network.module(group.scope)(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    target, weights = run(), {name: network.weight(name) for name in group.linears}
    for name, weight in weights.items():
        network.overwrite(name, rounded(weight, scale))
    error = float((run() - target).square().sum())
    for name, weight in weights.items():
        network.overwrite(name, weight)
    return error


def test_the_structure_has_all_kinds_of_groups(network: Network) -> None:
    producers = [group.producer and group.producer.split(".")[-1] for group in network.blocks[0].groups]
    assert producers == ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"]


def test_folding_leaves_the_function_unchanged(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    before = network.logits(ctx.scoring)
    original = {name: network.weight(name) for name in network.linears}
    norms = {n: p.clone() for n, p in network.model.named_parameters() if p.dim() == 1}
    folds = AWQScales(clip=False)(ctx, dict.fromkeys(network.linears, FORMAT))
    torch.testing.assert_close(network.logits(ctx.scoring), before, atol=1e-4, rtol=1e-4)

    assert any((scale - 1).abs().max() > 0.1 for scale in folds.input_scale.values())
    one = torch.ones(1)
    for name, weight in original.items():
        s, t = folds.input_scale.get(name, one), folds.output_scale.get(name, one)
        torch.testing.assert_close(t.unsqueeze(1) * network.weight(name) / s, weight)
    changed = {n for n, p in network.model.named_parameters() if n in norms and not p.equal(norms[n])}
    assert changed <= set(folds.parameters) <= set(norms)
    for name, value in folds.parameters.items():
        assert torch.equal(value, network.model.get_parameter(name))


def test_biases_of_the_producer_are_reported(network: Network, context: Callable[..., Context]) -> None:
    group = network.blocks[0].groups[-1]
    up = network.linear(str(group.producer))
    up.bias = torch.nn.Parameter(torch.ones(up.out_features))
    folds = AWQScales(clip=False)(context(network), dict.fromkeys(network.linears, FORMAT))
    assert torch.equal(folds.parameters[f"{group.producer}.bias"], up.bias)
    assert f"{group.producer}.weight" not in folds.parameters


def test_ratio_zero_is_rounding_to_nearest_and_extremes_balance() -> None:
    mean_abs = torch.tensor([0.0, 1e-9, 0.5, 1.0, 40.0])
    assert torch.equal(candidate_scale(mean_abs, 0), torch.ones(5))
    scale = candidate_scale(mean_abs, 0.5)
    assert float(scale.max() * scale.min()) == pytest.approx(1)
    torch.testing.assert_close(scale[3] / scale[2], torch.tensor(2**0.5))


@pytest.mark.parametrize("index", range(4))
def test_the_chosen_scale_is_the_best_of_all_candidates(
    network: Network, context: Callable[..., Context], index: int
) -> None:
    group, ctx = network.blocks[1].groups[index], context(network)
    mean_abs = ctx.statistics(Stat.MEAN_ABS, group.name)
    calls = scope_inputs(network, group, ctx.tokens)
    chosen = search_scale(network, group, dict.fromkeys(group.linears, FORMAT), mean_abs, calls)
    losses = [scope_loss(network, group, ctx.tokens, candidate_scale(mean_abs, r)) for r in RATIOS]
    best = losses.index(min(losses))
    assert torch.equal(chosen, candidate_scale(mean_abs, RATIOS[best]))
    assert losses[best] < losses[0]  # rounding to nearest, and not by accident the best


def test_the_loss_of_a_single_linear_is_that_of_its_output(network: Network, context: Callable[..., Context]) -> None:
    group, ctx = network.blocks[0].groups[-1], context(network)
    weight = network.weight(group.name).double()
    gram = ctx.statistics(Stat.GRAM, group.name).double() * ctx.tokens.numel()
    mean_abs = ctx.statistics(Stat.MEAN_ABS, group.name)
    for ratio in (0, 0.25, 0.5):
        scale = candidate_scale(mean_abs, ratio)
        delta = rounded(weight.float(), scale).double() - weight
        expected = float((delta @ gram * delta).sum())
        assert scope_loss(network, group, ctx.tokens, scale) == pytest.approx(expected, rel=1e-4)


def test_clipping_takes_the_best_threshold_of_every_row_and_group() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 80, generator=generator), torch.randn(50, 80, generator=generator)
    weight[:, ::32] *= 3

    def errors(candidate: Tensor) -> Tensor:
        """Per row and group: squared error of the group's contribution to the output."""
        delta = FORMAT.fit(candidate).snap(candidate) - weight
        parts = zip(delta.split(32, 1), x.split(32, 1), strict=True)
        return torch.stack([(part @ d.T).square().sum(0) for d, part in parts], 1)

    group = torch.arange(80) // 32
    largest = torch.stack([part.abs().amax(1) for part in weight.split(32, 1)], 1)[:, group]
    best = torch.stack([errors(weight.clamp(-c * largest, c * largest)) for c in SHRINK]).amin(0)
    ours = errors(clip_weight(weight, FORMAT, x))
    torch.testing.assert_close(ours, best)
    assert (ours <= errors(weight)).all()
    assert (ours < errors(weight)).any()


def test_later_blocks_see_the_activations_of_the_full_model(network: Network, context: Callable[..., Context]) -> None:
    ctx, plan = context(network), dict.fromkeys(network.linears, Integer(2, 32))
    group = network.blocks[1].groups[0]
    calls = scope_inputs(network, group, ctx.tokens[:8])
    expected = search_scale(network, group, plan, ctx.statistics(Stat.MEAN_ABS, group.name), calls)
    folds = AWQScales(search_sequences=8)(ctx, plan)  # clips block 0 before it searches block 1
    torch.testing.assert_close(folds.input_scale[group.name], expected)


def test_queries_and_keys_are_not_clipped(network: Network, context: Callable[..., Context]) -> None:
    first, *others = network.blocks[0].groups
    assert [name.split(".")[-1] for name in clipped_linears(first)] == ["v_proj"]
    assert all(clipped_linears(group) == group.linears for group in others)
    before = {name: network.weight(name) for name in network.linears}
    folds = AWQScales()(context(network), dict.fromkeys(network.linears, FORMAT))
    for name, weight in before.items():
        scale = folds.input_scale.get(name, 1) / folds.output_scale.get(name, torch.ones(1)).unsqueeze(1)
        changed = not torch.allclose(network.weight(name), weight * scale)
        assert changed == (name.split(".")[-1] not in ("q_proj", "k_proj"))


def test_thresholds_are_searched_on_the_scaled_inputs(network: Network, context: Callable[..., Context]) -> None:
    ctx, group = context(network), network.blocks[0].groups[2]
    weight, inputs = network.weight(group.name), []
    keep = network.linear(group.name).register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1)))
    with hooks([keep]):
        network.logits(ctx.tokens[:8])
    folds = AWQScales(search_sequences=8)(ctx, dict.fromkeys(network.linears, FORMAT))
    scale = folds.input_scale[group.name]
    expected = clip_weight(weight * scale, FORMAT, inputs[0] / scale)
    differently = clip_weight(weight * scale, FORMAT, inputs[0])
    assert not torch.allclose(expected, differently)
    torch.testing.assert_close(network.weight(group.name), expected)


def test_linears_without_a_producer_are_clipped_only(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()  # grouped-query attention
    group = network.blocks[0].groups[1]
    assert group.producer is None
    before = network.weight(group.name)
    folds = AWQScales()(context(network), dict.fromkeys(network.linears, FORMAT))
    assert group.name not in folds.input_scale
    assert (network.weight(group.name).abs() <= before.abs()).all()
    assert not torch.equal(network.weight(group.name), before)


def test_formats_may_differ_between_linears(network: Network, context: Callable[..., Context]) -> None:
    plan = {name: Integer(2 + i % 3, 32) for i, name in enumerate(network.linears)}
    ctx = context(network)
    before = network.logits(ctx.scoring)
    AWQScales(clip=False)(ctx, plan)
    torch.testing.assert_close(network.logits(ctx.scoring), before, atol=1e-4, rtol=1e-4)


def test_the_result_describes_the_quantized_model(
    network: Network, small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    ctx = context(network, Budget(bits=6, group_size=32))
    original = {n: p.clone() for n, p in network.model.named_parameters()}
    full = network.logits(ctx.scoring)
    quantized = AWQ().quantize(ctx)
    result = network.logits(ctx.scoring)

    fresh = small_llama(num_key_value_heads=4)
    for name, parameter in fresh.model.named_parameters():
        parameter.copy_(quantized.parameters.get(name, original[name]))
    for name in fresh.linears:
        fresh.overwrite(name, quantized.packed[name].dequantize())
    torch.testing.assert_close(fresh.logits(ctx.scoring), result)
    assert not torch.equal(result, full)
    for name in fresh.linears:  # in original coordinates the weights are close to the original ones
        s, t = quantized.input_scale.get(name, torch.ones(1)), quantized.output_scale.get(name, torch.ones(1))
        weight = original[f"{name}.weight"]
        error = t.unsqueeze(1) * quantized.packed[name].dequantize() / s - weight
        assert error.square().mean() < 0.05 * weight.square().mean()


def test_activations_that_overflow_are_reported(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    group = network.blocks[0].groups[0]
    ctx.statistics = lambda stat, name: torch.full((network.shape(name)[1],), torch.inf)
    with pytest.raises(FloatingPointError, match=group.scope):
        AWQScales()(ctx, dict.fromkeys(network.linears, FORMAT))
