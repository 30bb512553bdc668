"""Models that accelerate has dispatched: every module's inputs pass through hooks that move them to its device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import dispatch_model

from methods.base import Context
from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.base import METRICS, Subject

OPTIONS = {
    "hutchinson": {"max_probes": 2},
    "hawq_v2": {"max_probes": 2},
    "hutchpp": {"products": 6},
}


def measured(name: str, ctx: Context) -> dict[str, float]:
    subject = Subject(ctx.network, ctx.tokens, ctx.tokens, (Integer(3, 32),), ctx.statistics, 0)
    return METRICS[name](**OPTIONS.get(name, {}))(subject).values


@pytest.mark.parametrize("name", sorted(METRICS.complete()))
def test_every_metric_is_the_same_on_a_dispatched_model(
    name: str, small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    plain, sharded = (small_llama(attn_implementation="eager") for _ in range(2))
    blocks = {block.name: "cpu" for block in sharded.blocks}
    others = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(sharded.model, others | blocks, main_device="cpu", force_hooks=True)
    assert hasattr(sharded.module(sharded.blocks[0].name), "_hf_hook")
    torch.manual_seed(0)
    expected, found = measured(name, context(plain)), measured(name, context(sharded))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-9)
