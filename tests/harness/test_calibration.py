"""Statistics against direct computation from captured inputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from harness.calibration import as_statistics, collect
from methods.base import Stat
from methods.network import Network, discover, hooks

ALL = frozenset(Stat)
DIRECT: dict[Stat, Callable[[Tensor], Tensor]] = {
    Stat.GRAM: lambda x: torch.stack([torch.outer(row, row) for row in x]).mean(0),
    Stat.MEAN_ABS: lambda x: x.abs().mean(0),
    Stat.MAX_ABS: lambda x: x.abs().amax(0),
    Stat.MEAN: lambda x: x.mean(0),
    Stat.MEAN_SQUARE: lambda x: (x**2).mean(0),
}


def make_network(dtype: torch.dtype = torch.float32) -> Network:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # transformers initializes from the global generator
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return discover(model.to(dtype).eval(), 40)


@pytest.fixture(scope="module")
def network() -> Network:
    return make_network()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(40, (7, 16), generator=torch.Generator().manual_seed(0))


def inputs(network: Network, tokens: Tensor) -> dict[str, Tensor]:
    """Every linear's input, [tokens, in], from one ordinary forward pass."""
    seen: dict[str, Tensor] = {}

    def capture(name: str) -> Callable[..., None]:
        return lambda _, args: seen.update({name: args[0].flatten(0, 1).float()})

    with (
        hooks([network.linear(n).register_forward_pre_hook(capture(n)) for n in network.linears]),
        torch.no_grad(),
    ):
        network.logits(tokens)
    return seen


@pytest.mark.parametrize("stat", Stat)
def test_statistics_are_those_of_each_linears_input(network: Network, tokens: Tensor, stat: Stat) -> None:
    statistics = as_statistics(network, collect(network, tokens, frozenset({stat})))
    for name, x in inputs(network, tokens).items():
        torch.testing.assert_close(statistics(stat, name), DIRECT[stat](x), rtol=1e-4, atol=1e-6)


def test_batch_size_does_not_matter(network: Network, tokens: Tensor) -> None:
    whole = collect(network, tokens, ALL, batch_size=7)
    for size in (1, 3):
        torch.testing.assert_close(collect(network, tokens, ALL, batch_size=size), whole, rtol=1e-4, atol=1e-6)


def test_linears_with_one_input_share_one_tensor(network: Network, tokens: Tensor) -> None:
    statistics = as_statistics(network, collect(network, tokens, ALL))
    q, k, v, o = (f"model.layers.1.self_attn.{x}_proj" for x in "qkvo")
    assert statistics(Stat.GRAM, q) is statistics(Stat.GRAM, k) is statistics(Stat.GRAM, v)
    assert statistics(Stat.GRAM, q) is not statistics(Stat.GRAM, o)


def test_only_what_was_asked_for_is_collected(network: Network, tokens: Tensor) -> None:
    collected = collect(network, tokens, frozenset({Stat.MAX_ABS}))
    assert set(collected) == {Stat.MAX_ABS}
    assert set(collected[Stat.MAX_ABS]) == {group.name for group in network.groups}
    with pytest.raises(KeyError, match="gram was not collected"):
        as_statistics(network, collected)(Stat.GRAM, network.linears[0])
    assert collect(network, tokens, frozenset()) == {}


def test_nothing_is_left_on_the_model(network: Network, tokens: Tensor) -> None:
    before = network.logits(tokens)
    collect(network, tokens, ALL)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.model.modules())
    assert torch.equal(network.logits(tokens), before)


def test_the_head_is_not_run(network: Network, tokens: Tensor) -> None:
    calls: list[str] = []
    head = network.model.get_submodule("lm_head")
    with hooks([head.register_forward_hook(lambda *_: calls.append("head"))]):
        collect(network, tokens, ALL)
    assert not calls


def test_sums_are_fp32_for_a_half_precision_model(tokens: Tensor) -> None:
    network = make_network(torch.bfloat16)
    collected = collect(network, tokens, ALL)
    for name, x in inputs(network, tokens).items():
        gram = as_statistics(network, collected)(Stat.GRAM, name)
        assert gram.dtype == torch.float32
        torch.testing.assert_close(gram, DIRECT[Stat.GRAM](x), rtol=1e-3, atol=1e-3)


def test_progress_is_tracked_by_batch(network: Network, tokens: Tensor) -> None:
    seen: list[int] = []

    def track(items, description):  # type: ignore[no-untyped-def]
        assert description == "calibration"
        for item in items:
            seen.append(len(item))
            yield item

    collect(network, tokens, ALL, track=track, batch_size=3)
    assert seen == [3, 3, 1]
