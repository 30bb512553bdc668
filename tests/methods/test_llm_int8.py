"""Thresholds at both ends, outlier columns, 16-bit weight columns and their size, planted outliers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from harness.accounting import packed_copy
from harness.outliers import Outliers, plant
from kernels.activations import ExceptOutliers, TokenScale, integers
from kernels.packed import PackedInteger
from kernels.packed_sum import PackedSum
from methods.base import Budget, Context, Method, Quantized, Stat
from methods.formats.integer import Integer
from methods.llm_int8 import LLMInt8
from methods.network import Network
from methods.rtn import RTN

EIGHT = Budget(bits=8, group_size=0)
FORMAT = Integer(8, symmetric=True, restricted=True)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def planted(small_llama: Callable[..., Network]) -> Callable[[], Network]:
    def build() -> Network:
        network = small_llama()
        plant(network, Outliers(channels=4))
        return network

    return build


def run(build: Callable[[], Network], context: Callable[..., Context], method: Method) -> tuple[Tensor, Tensor]:
    """Logits of the quantized model, as the evaluation runs it, and of the original."""
    network, original = build(), build()
    ctx = context(network, EIGHT)
    done = method.quantize(ctx)
    quantized = Network(packed_copy(original, done), ())
    return quantized.logits(ctx.scoring), original.logits(ctx.scoring)


def error(build: Callable[[], Network], context: Callable[..., Context], method: Method) -> float:
    logits, exact = run(build, context, method)
    return float((logits - exact).norm() / exact.norm())


def test_weights_are_restricted_integers_per_channel_under_any_group_size(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    for budget in (EIGHT, Budget(bits=8, group_size=32)):
        network = small_llama()
        original = {name: network.weight(name) for name in network.linears}
        done = LLMInt8().quantize(context(network, budget))
        assert list(done.packed) == list(done.inputs) == list(network.linears)
        for name, packed in done.packed.items():
            assert isinstance(packed, PackedInteger)
            assert packed.stored_bits() == FORMAT.stored_bits(packed.shape)
            assert torch.equal(packed.dequantize(), FORMAT.fit(original[name]).snap(original[name]))
            assert torch.equal(network.weight(name), packed.dequantize())


def test_the_threshold_goes_from_untouched_inputs_to_vector_wise_rounding(
    planted: Callable[[], Network], context: Callable[..., Context]
) -> None:
    untouched, usual, vector_wise = (run(planted, context, LLMInt8(threshold=t))[0] for t in (0.0, 6.0, 1e9))
    assert 0 < float((usual - untouched).norm()) < float((vector_wise - untouched).norm()) / 10
    network = planted()
    done = LLMInt8(threshold=1e9).quantize(context(network, EIGHT))
    plain = Quantized(done.packed, inputs=dict.fromkeys(network.linears, TokenScale(integers(8))))
    rounded = Network(packed_copy(planted(), plain), ()).logits(context(network).scoring)
    assert float((rounded - vector_wise).norm()) < 1e-3 * float(vector_wise.norm())  # by different kernels
    assert torch.equal(Network(network.model, ()).logits(context(network).scoring), untouched)


def test_the_planted_columns_are_found_at_run_time(
    planted: Callable[[], Network], context: Callable[..., Context]
) -> None:
    network = planted()
    ctx = context(network, EIGHT)
    name = network.linears[0]
    largest = ctx.statistics(Stat.MAX_ABS, name)
    columns = largest >= 6
    assert 4 <= columns.sum() < 20
    rounding = LLMInt8().quantize(ctx).inputs[name]
    assert isinstance(rounding, ExceptOutliers) and rounding.threshold == 6.0 and rounding.bits == 8
    x = largest.expand(1, 3, -1) * torch.tensor([0.5, 1.0, 0.1]).view(1, 3, 1)
    assert torch.equal((rounding(x) == x).all(1).squeeze(0) | ~columns, torch.ones(64, dtype=torch.bool))
    assert not torch.equal(rounding(x), x)


def test_exact_columns_are_16_bit_weights_that_the_scales_of_the_rest_do_not_see(
    planted: Callable[[], Network], context: Callable[..., Context]
) -> None:
    network = planted()
    original = {name: network.weight(name) for name in network.linears}
    ctx = context(network, EIGHT)
    exact = {name: ctx.statistics(Stat.MAX_ABS, name) >= 6 for name in network.linears}
    done = LLMInt8(exact_columns=True).quantize(ctx)
    for name, packed in done.packed.items():
        weight, columns = original[name], exact[name]
        (out, width), count = weight.shape, int(columns.sum())
        decoded = packed.dequantize()
        assert torch.equal(decoded[:, columns], weight[:, columns].half().float())
        rest = weight[:, ~columns]
        if rest.numel():
            assert torch.equal(decoded[:, ~columns], FORMAT.fit(rest).snap(rest))
        assert isinstance(packed, PackedSum) == (count > 0)
        # the columns; for each an fp16 one, an int16 place and an int32 row start
        extra = 16 * out * count + 64 * count + 32 if count else 0
        assert packed.stored_bits() == FORMAT.stored_bits((out, width)) + extra
    assert any(columns.any() for columns in exact.values())


def test_exact_columns_keep_the_small_weights_that_planted_outliers_meet(
    planted: Callable[[], Network], context: Callable[..., Context]
) -> None:
    methods = (RTN(inputs="int8-token"), LLMInt8(), LLMInt8(exact_columns=True))
    plain, decoded, exact = (error(planted, context, method) for method in methods)
    assert decoded < plain
    assert exact < decoded / 5


def test_statistics_are_needed_for_exact_columns_only() -> None:
    assert LLMInt8().statistics == frozenset()
    assert LLMInt8(exact_columns=True).statistics == {Stat.MAX_ABS}


def test_other_widths_and_negative_thresholds_are_refused(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    assert LLMInt8().supports(network, EIGHT) is None
    assert LLMInt8().supports(network, Budget(bits=4)) == "LLM.int8() has 8-bit weights, and the budget names 4"
    reason = LLMInt8().supports(network, Budget(effective_bits=8.0))
    assert reason is not None and "effective bits" in reason
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="not a magnitude; the paper has 6"):
            LLMInt8(threshold=threshold)
