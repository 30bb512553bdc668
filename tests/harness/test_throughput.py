"""What is timed computes what it should; times themselves are not tested."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from harness import throughput as module
from harness.accounting import packed_copy
from harness.kv_cache import pack_cache, row_format
from harness.throughput import decode, prefill, throughput
from kernels.bench.rounds import Times
from methods.base import Budget, Context
from methods.network import Network
from methods.rtn import RTN

PROMPT = torch.arange(3, 23)


@pytest.fixture
def network(small_llama: Callable[..., Network]) -> Network:
    return small_llama()


@pytest.mark.parametrize("keys_and_values", ["", "int8"])
@torch.no_grad()
def test_a_decoded_token_sees_the_prompt_and_nothing_else(network: Network, keys_and_values: str) -> None:
    model = network.model
    pack_cache(model, row_format(keys_and_values))
    step = decode(model, PROMPT[None])
    whole = network.logits(torch.cat([PROMPT, PROMPT[:1]])[None])[:, -1:]
    for _ in range(3):
        torch.testing.assert_close(step(0), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prefill(model, PROMPT[None])(0), network.logits(PROMPT[None]))


def test_rates_and_ratios_follow_from_the_times(
    network: Network, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {"model": Times(torch.tensor([1.0, 2.0, 4.0]).numpy()), "reference": Times(torch.full((3,), 6.0).numpy())}
    monkeypatch.setattr(module, "in_turns", lambda operations, rounds: {name: taken[name] for name in operations})
    packed = packed_copy(network, RTN().quantize(context(network, Budget(bits=4, group_size=32))))
    found = throughput(network.model, packed, PROMPT)
    assert found["decode"] == {"value": 1 / 2, "low": 1 / 3, "high": 1 / 1.5}
    assert found["prefill"] == pytest.approx({name: 20 * rate for name, rate in found["decode"].items()})
    assert found["decode_speedup"]["value"] == 3
    assert found["decode_speedup"]["low"] == 1.5
    assert found["decode_speedup"]["high"] == 6
    assert set(found["layers"]) == set(network.linears)
    assert min(found["layers"].values()) > 0
    assert found["prompt"] == 20
