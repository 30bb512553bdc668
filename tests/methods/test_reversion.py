from collections.abc import Callable
from typing import Any

import pytest

from methods.accuracy_aware import AccuracyAwareMethod
from methods.base import Budget, Context
from methods.inc_hawq_v2 import INCHAWQV2
from methods.network import Network
from methods.reversion import Reversion


@pytest.mark.parametrize(
    "method",
    [AccuracyAwareMethod(granularity="layer"), INCHAWQV2(max_probes=2), INCHAWQV2(max_probes=2, as_shipped=True)],
    ids=["accuracy_aware", "inc", "inc as shipped"],
)
def test_reversion_starts_from_the_widest_uniform_width_that_fits(
    method: Reversion, small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama(num_hidden_layers=4)
    budget = Budget(effective_bits=5.0, group_size=32)  # 4 bits store 4.625
    done = method.quantize(context(network, budget))
    widths = [packed.bits for packed in done.packed.values()]
    assert min(widths) == 4
    assert 16 in widths
    weights = sum(out * columns for out, columns in network.shapes)
    assert 4.9 < sum(packed.stored_bits() for packed in done.packed.values()) / weights <= 5.0


def test_as_shipped_reverts_the_least_sensitive_first(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama(num_hidden_layers=4)
    budget = Budget(effective_bits=5.2, group_size=32)
    options: dict[str, Any] = {"max_probes": 2, "bits": (4, 16)}
    meant = INCHAWQV2(**options).quantize(context(network, budget))
    shipped = INCHAWQV2(as_shipped=True, **options).quantize(context(small_llama(num_hidden_layers=4), budget))
    traces = meant.sensitivity
    most, least = max(traces, key=traces.__getitem__), min(traces, key=traces.__getitem__)
    assert (meant.packed[most].bits, meant.packed[least].bits) == (16, 4)
    assert (shipped.packed[most].bits, shipped.packed[least].bits) == (4, 16)
