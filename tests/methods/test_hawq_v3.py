from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from harness.accounting import packed_copy, storage
from kernels.dyadic import PackedDyadic
from methods.base import Budget, Context
from methods.hawq_v3 import HAWQV3
from methods.network import Network
from methods.sensitivity.base import Subject

QUICK: dict[str, Any] = {"max_probes": 2}


@pytest.mark.parametrize("budget", [Budget(effective_bits=6.5), Budget(gigabops=6.5e-9 * 16 * 54272, group_size=32)])
def test_linears_are_integer_only_and_stay_within_the_bound(
    budget: Budget, small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    done = HAWQV3(granularity="layer", **QUICK).quantize(context(network, budget))
    assert all(isinstance(packed, PackedDyadic) for packed in done.packed.values())
    assert {packed.bits for packed in done.packed.values()} == {4, 8}
    weights = sum(out * columns for out, columns in network.shapes)
    if budget.effective_bits:
        assert storage(packed_copy(network, done))["effective_bits"] <= 6.5
    bops = sum(16 * packed.bits * packed.shape[0] * packed.shape[1] for packed in done.packed.values())
    assert bops <= 16 * 6.5 * weights


def test_widths_minimize_omega_over_all_plans(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama(num_hidden_layers=1)
    method = HAWQV3(granularity="layer", **QUICK)
    formats = method.candidates(Budget(bits=4))
    weights = sum(out * columns for out, columns in network.shapes)

    def cost(choice: Any) -> float:
        bits = sum(f.stored_bits(network.shape(n)) for n, f in zip(network.linears, choice, strict=True))
        return bits / weights

    limit = cost([formats[i % 2] for i in range(len(network.linears))])
    budget = Budget(effective_bits=limit)
    ctx = context(network, budget)
    subject = Subject(network, ctx.scoring, ctx.tokens, formats, ctx.statistics, seed=_seed())
    metric = method.sensitivity()
    losses = metric.losses(subject.measure(metric), network, formats)
    plans = [
        choice for choice in product(formats, repeat=len(network.linears)) if limit - 0.02 <= cost(choice) <= limit
    ]
    assert len(plans) > 3
    best = min(plans, key=lambda choice: sum(losses[n][f] for n, f in zip(network.linears, choice, strict=True)))
    done = method.quantize(ctx)
    assert [done.packed[name].bits for name in network.linears] == [fmt.bits for fmt in best]


def _seed() -> int:
    """The first seed that a method draws from the context of these tests, which itself has drawn its texts."""
    generator = torch.Generator().manual_seed(0)
    torch.randint(96, (10, 16), generator=generator)
    torch.randint(96, (4, 16), generator=generator)
    return int(torch.randint(2**31, (), generator=generator))


def test_the_allocation_alone_leaves_inputs_in_floating_point(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    done = HAWQV3(integer_only=False, **QUICK).quantize(context(small_llama(), Budget(effective_bits=6.5)))
    assert not any(isinstance(packed, PackedDyadic) for packed in done.packed.values())


def test_what_cannot_be_integer_only_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set method\.integer_only=false"):
        HAWQV3(transform="awq")
    assert HAWQV3(transform="awq", integer_only=False).transform == "awq"
