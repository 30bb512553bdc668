from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from methods.base import Stat
from methods.formats.integer import Integer
from methods.network import Network, discover, hooks
from methods.sensitivity.base import METRICS, Subject, entry
from methods.sensitivity.hvp import mean_loss
from methods.sensitivity.measured import Measured
from methods.sensitivity.substitution import Replay, substituted

TOKENS = torch.randint(96, (6, 9), generator=torch.Generator().manual_seed(1))
FORMATS = (Integer(2, 16), Integer(4, 16))
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48)),
}


@pytest.fixture(params=["llama", *OTHERS])
def network(request: pytest.FixtureRequest, small_llama: Callable[..., Network]) -> Network:
    """Three blocks each: with gated MLPs, with biases, and with attention and MLP in parallel."""
    if request.param == "llama":
        return small_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return discover(OTHERS[request.param]().eval(), SIZES["vocab_size"])


def no_statistics(stat: Stat, linear: str) -> Tensor:
    raise AssertionError(f"{stat} of {linear} was not declared")


def subject_of(network: Network, tokens: Tensor = TOKENS, formats: tuple[Integer, ...] = FORMATS) -> Subject:
    return Subject(network, tokens, tokens, formats, no_statistics)


def parameters_of(network: Network) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.model.parameters()]


@torch.no_grad()
def logits_rounded(network: Network, linear: str, fmt: Integer, tokens: Tensor) -> Tensor:
    """A full forward pass with the rounded weight written into the linear."""
    weight = network.weight(linear)
    network.overwrite(linear, fmt.fit(weight).snap(weight))
    try:
        return network.logits(tokens)
    finally:
        network.overwrite(linear, weight)


@torch.no_grad()
def test_it_is_the_increase_of_the_mean_loss(network: Network) -> None:
    found = METRICS["measured"](sequences=6, batch=4)(subject_of(network))
    base = mean_loss(network, TOKENS)
    assert set(found.values) == set(found.error) == {entry(n, f) for n in network.linears for f in FORMATS}
    for name in network.linears:
        for fmt in FORMATS:
            logits = logits_rounded(network, name, fmt, TOKENS)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
            assert found.values[entry(name, fmt)] == pytest.approx(float(loss - base), abs=2e-6)
    sizes = [abs(value) for value in found.values.values()]
    assert max(sizes) > 1e-3  # so that the tolerance means something
    assert min(found.values.values()) < 0  # kept, not clipped


@torch.no_grad()
def test_the_error_is_that_of_paired_differences(network: Network) -> None:
    found = Measured(sequences=6, batch=4)(subject_of(network))
    name, fmt = network.linears[-1], FORMATS[0]
    rise = [
        F.cross_entropy(logits_rounded(network, name, fmt, text)[0, :-1], text[0, 1:]) - mean_loss(network, text)
        for text in TOKENS.split(1)
    ]
    drawn = torch.stack(rise).double()
    assert found.values[entry(name, fmt)] == pytest.approx(float(drawn.mean()), abs=1e-6)
    assert found.error[entry(name, fmt)] == pytest.approx(float(drawn.std() / 6**0.5), rel=1e-3)


def test_a_replayed_pass_equals_a_full_one_in_any_order(network: Network) -> None:
    replay = Replay(network, TOKENS)
    for name in (network.linears[-1], network.linears[0], network.linears[len(network.linears) // 2]):
        weight = network.weight(name)
        expected = logits_rounded(network, name, FORMATS[0], TOKENS)
        assert not torch.equal(expected, replay.reference)
        replayed = replay.logits(name, FORMATS[0].fit(weight).snap(weight))
        torch.testing.assert_close(replayed, expected, atol=1e-6, rtol=0)


def test_only_blocks_from_the_changed_one_on_are_run(network: Network) -> None:
    runs = dict.fromkeys([block.name for block in network.blocks], 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            runs[name] += 1

        return hook

    replay = Replay(network, TOKENS)
    inside = [(b.name, network.linear(b.groups[0].name)) for b in network.blocks]
    with hooks([linear.register_forward_hook(count(name)) for name, linear in inside]):
        replay.logits(network.blocks[1].groups[-1].name, torch.tensor(0.0))
    assert list(runs.values()) == [0, 1, 1]
    assert replay.blocks_run == 3 + 2
    replay.logits(network.linears[0], network.weight(network.linears[0]))  # nothing changes
    assert replay.blocks_run == 3 + 2


def test_passes_are_counted_by_blocks(network: Network) -> None:
    cost = Measured(sequences=6, batch=4)(subject_of(network)).cost
    changed = [3 - index for index, block in enumerate(network.blocks) for g in block.groups for _ in g.linears]
    assert cost.passes == -(-2 * (3 + len(FORMATS) * sum(changed)) // 3)  # in each of two batches


def test_an_error_leaves_the_network_as_it_was(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    before, logits = parameters_of(network), network.logits(TOKENS)
    replay = Replay(network, TOKENS)
    last = network.module(network.blocks[-1].name)

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with hooks([last.register_forward_hook(fail)]), pytest.raises(RuntimeError, match="out of memory"):
        replay.logits(network.linears[-1], torch.tensor(0.0))
    name = network.linears[0]
    with pytest.raises(RuntimeError), substituted(network, name, torch.zeros(3, 5, 7)):
        pass
    assert all(map(torch.equal, network.model.parameters(), before))
    assert torch.equal(network.logits(TOKENS), logits)  # no block answers from memory any more


def test_a_block_whose_forward_was_replaced_keeps_the_replacement(network: Network) -> None:
    block = network.module(network.blocks[0].name)
    original = block.forward
    mine = lambda *args, **kwargs: original(*args, **kwargs)  # noqa: E731
    block.forward = mine
    Replay(network, TOKENS).logits(network.linears[-1], torch.tensor(0.0))
    assert block.forward is mine
    assert "forward" not in vars(network.module(network.blocks[1].name))


def test_the_network_is_left_as_it_was_and_needs_no_gradients(network: Network) -> None:
    before = parameters_of(network)
    Measured()(subject_of(network))
    assert all(map(torch.equal, network.model.parameters(), before))
    assert all(parameter.grad is None for parameter in network.model.parameters())


def test_only_the_chosen_tokens_count_and_batches_do_not(minute_llama: Network) -> None:
    changed = TOKENS.clone()
    changed[3:], changed[:, 5:] = 0, 0
    results = [
        Measured(sequences=3, context=5, batch=batch)(subject_of(minute_llama, tokens))
        for batch, tokens in ((2, TOKENS), (2, changed), (1, TOKENS))
    ]
    assert results[0].values == results[1].values
    assert results[0].values == pytest.approx(results[2].values, abs=1e-6)


def test_a_linear_of_zeros_rounds_to_itself(minute_llama: Network) -> None:
    name = minute_llama.linears[2]
    minute_llama.overwrite(name, torch.zeros(minute_llama.shape(name)))
    found = Measured()(subject_of(minute_llama))
    for fmt in FORMATS:
        assert found.values[entry(name, fmt)] == found.error[entry(name, fmt)] == 0


def test_senseless_requests_are_refused(minute_llama: Network) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Measured(sequences=1)
    with pytest.raises(ValueError, match="more scoring text"):
        Measured()(subject_of(minute_llama, TOKENS[:1]))
    with pytest.raises(ValueError, match="more scoring text"):
        Measured()(subject_of(minute_llama, TOKENS[:, :1]))
