from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from methods.base import Context
from methods.formats.integer import Integer
from methods.network import Network, hooks
from methods.transforms.nncf_awq import NNCFAWQ, follows_elementwise, search_scale, sequence_means

FORMAT = Integer(3, 32)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def network(small_llama: Callable[..., Network]) -> Network:
    """One head per value head, so that the output projection has a producer; FFN 96 in three groups."""
    return small_llama(num_key_value_heads=4)


def inputs(network: Network, name: str, tokens: Tensor) -> Tensor:
    """[sequences, length, in]."""
    seen: list[Tensor] = []
    with hooks([network.linear(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))]):
        network.logits(tokens)
    return seen[0]


def test_only_down_projections_follow_elementwise(network: Network) -> None:
    chosen = [group.name.split(".")[-1] for group in network.groups if follows_elementwise(network, group)]
    assert chosen == ["down_proj", "down_proj"]
    assert len([group for group in network.groups if group.producer in network.linears]) == 4


def test_means_are_those_of_each_sequence(network: Network, context: Callable[..., Context]) -> None:
    ctx, groups = context(network), [network.blocks[1].groups[3], network.blocks[0].groups[0]]
    found = sequence_means(ctx, groups)
    for group in groups:
        torch.testing.assert_close(found[group], inputs(network, group.name, ctx.tokens).mean(1), atol=1e-5, rtol=1e-4)


def test_the_function_is_unchanged(network: Network, context: Callable[..., Context]) -> None:
    ctx = context(network)
    before = network.logits(ctx.scoring)
    original = {name: network.weight(name) for name in network.linears}
    folds = NNCFAWQ()(ctx, dict.fromkeys(network.linears, FORMAT))
    torch.testing.assert_close(network.logits(ctx.scoring), before, atol=1e-4, rtol=1e-4)
    assert {name.split(".")[-1] for name in folds.input_scale} == {"down_proj"}
    assert {name.split(".")[-1] for name in folds.output_scale} == {"up_proj"}
    assert not folds.parameters
    one = torch.ones(1)
    for name, weight in original.items():
        s, t = folds.input_scale.get(name, one), folds.output_scale.get(name, one)
        torch.testing.assert_close(t.unsqueeze(1) * network.weight(name) / s, weight)


@pytest.mark.parametrize("share", [0.0, 0.03])
def test_the_groups_of_the_most_salient_channels_are_scaled(
    network: Network, context: Callable[..., Context], share: float
) -> None:
    ctx, name = context(network), network.blocks[0].groups[3].name
    salience = inputs(network, name, ctx.tokens).mean(1).abs().amax(0)
    salient = salience.argsort(descending=True)[: max(int(share * 96), 1)] // 32
    scale = NNCFAWQ(share=share)(ctx, dict.fromkeys(network.linears, FORMAT)).input_scale[name]
    scaled = [group for group in range(3) if not scale[32 * group : 32 * group + 32].eq(1).all()]
    assert scaled == sorted(set(salient.tolist()))
    assert len(scaled) < 3


def test_the_chosen_scale_is_the_best_power_of_the_salience() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    means = torch.randn(6, 32, generator=generator) * torch.exp(1.5 * torch.randn(32, generator=generator))
    salience = means.abs().amax(0)
    bounded = salience.clamp(float(salience.quantile(0.1)), 1e2)

    def loss(scale: Tensor) -> float:
        rounded = FORMAT.fit(weight * scale).snap(weight * scale) @ (means / scale).T
        return float((rounded - weight @ means.T).abs().mean())

    losses = [loss(bounded.pow(i / 100)) for i in range(100)]
    best = losses.index(min(losses))
    assert best > 0
    chosen = search_scale({"a": weight}, {"a": FORMAT}, salience, means, 100)
    torch.testing.assert_close(chosen, bounded.pow(best / 100))


def test_salience_is_bounded_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, means = torch.randn(16, 20, generator=generator), torch.randn(6, 20, generator=generator)
    salience = torch.cat([torch.zeros(4), torch.full((15,), 2.0), torch.tensor([1e6])])
    means[:, :4] = 0
    for steps in (2, 50):
        scale = search_scale({"a": weight}, {"a": FORMAT}, salience, means, steps)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert scale.max() <= 1e2


def test_eight_bits_are_not_scaled(network: Network, context: Callable[..., Context]) -> None:
    first, second = (block.groups[3].name for block in network.blocks)
    plan = dict.fromkeys(network.linears, FORMAT) | {first: Integer(8)}
    assert set(NNCFAWQ()(context(network), plan).input_scale) == {second}


def test_candidates_are_compared_on_some_of_the_sequences(network: Network, context: Callable[..., Context]) -> None:
    ctx, plan = context(network), dict.fromkeys(network.linears, FORMAT)
    groups = [block.groups[3] for block in network.blocks]
    means = {g.name: inputs(network, g.name, ctx.tokens).mean(1) for g in groups}  # of 10 sequences
    weights = {g.name: network.weight(g.name) for g in groups}
    found = NNCFAWQ(search_sequences=1)(ctx, plan).input_scale
    differ = False
    for name, x in means.items():
        salience = x.abs().amax(0)
        part = slice(int(salience.argmax()) // 32 * 32, int(salience.argmax()) // 32 * 32 + 32)
        weight, samples = {name: weights[name][:, part]}, x[:, part]
        few, full = (search_scale(weight, plan, salience[part], chosen, 100) for chosen in (samples[:1], samples))
        torch.testing.assert_close(found[name][part], few)
        differ |= not torch.allclose(few, full)
    assert differ
