from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.packed import PackedInteger
from kernels.packed_sum import PackedSum
from methods.base import Budget, Context, Quantized, Stat
from methods.lora_correction import corrected
from methods.network import Network
from methods.nncf import NNCF
from methods.rounding.nearest import round_to_nearest
from methods.rtn import RTN
from methods.sensitivity.base import METRICS, Subject
from methods.sensitivity.nncf import BACKUP

CRITERIA = ("nncf_max_variance", "nncf_mean_variance", "nncf_mean_magnitude", "nncf_hessian", "nncf_weight_error")
PLAIN = {"transform": "none", "rounding": "nearest"}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def run(small_llama: Callable[..., Network], context: Callable[..., Context]) -> Callable[..., Quantized]:
    def quantize(method: NNCF, budget: Budget) -> Quantized:
        network = small_llama(num_key_value_heads=4)
        assert method.supports(network, budget) is None
        return method.quantize(context(network, budget))

    return quantize


def same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(a.packed[name].dequantize(), b.packed[name].dequantize()) for name in a.packed)


def effective_bits(quantized: Quantized) -> float:
    packed = quantized.packed.values()
    return sum(p.stored_bits() for p in packed) / sum(p.shape[0] * p.shape[1] for p in packed)


def test_with_everything_off_it_is_rounding_to_nearest(
    run: Callable[..., Quantized], small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    budget = Budget(bits=4, group_size=32)
    nearest = RTN().quantize(context(small_llama(num_key_value_heads=4), budget))
    assert same(run(NNCF(**PLAIN), budget), nearest)
    assert not same(run(NNCF(), budget), nearest)


@pytest.mark.parametrize("metric", CRITERIA)
def test_where_all_are_in_four_bits_criteria_agree(run: Callable[..., Quantized], metric: str) -> None:
    budget = Budget(bits=4, group_size=32)
    quantized = run(NNCF(metric=metric, **PLAIN), budget)
    assert {packed.bits for packed in quantized.packed.values()} == {4}
    assert same(quantized, run(NNCF(**PLAIN), budget))


@pytest.mark.parametrize("metric", CRITERIA)
def test_the_most_sensitive_get_eight_bits_per_channel(
    run: Callable[..., Quantized], small_llama: Callable[..., Network], context: Callable[..., Context], metric: str
) -> None:
    budget = Budget(effective_bits=5.6, group_size=32)
    quantized = run(NNCF(metric=metric, **PLAIN), budget)
    network = small_llama(num_key_value_heads=4)
    ctx = context(network, budget)
    scores = METRICS[metric]()(Subject(network, ctx.scoring, ctx.tokens, (), ctx.statistics)).values
    wide = {name for name, packed in quantized.packed.items() if packed.bits == 8}
    order = sorted(scores, key=lambda name: scores[name], reverse=True)
    assert set(order[: len(wide)]) == wide
    assert 0 < len(wide) < len(order)
    for name in wide:
        packed = quantized.packed[name]
        assert isinstance(packed, PackedInteger)
        assert packed.scale.shape == (packed.shape[0], 1)
        assert torch.equal(packed.dequantize(), round_to_nearest(network.weight(name), BACKUP).weight)
    assert effective_bits(quantized) <= 5.6
    following = network.shape(order[len(wide)])  # would not have fitted
    step = BACKUP.stored_bits(following) - budget.format(4).stored_bits(following)
    stored = sum(packed.stored_bits() for packed in quantized.packed.values())
    assert stored + step > 5.6 * sum(a * b for a, b in network.shapes)


def test_four_bits_in_groups_do_not_fit_into_three(small_llama: Callable[..., Network]) -> None:
    reason = NNCF().supports(small_llama(), Budget(bits=3, group_size=32))
    assert reason is not None
    assert "int4-g32" in reason
    assert NNCF(bits=(3,)).supports(small_llama(), Budget(bits=3, group_size=32)) is None


@pytest.mark.parametrize("options", [{}, PLAIN, {"rounding": "scale_estimation_gptq"}], ids=str)
def test_the_result_describes_the_quantized_model(
    small_llama: Callable[..., Network], context: Callable[..., Context], options: dict[str, str]
) -> None:
    network = small_llama(num_key_value_heads=4)
    original = {name: network.weight(name) for name in network.linears}
    quantized = NNCF(**options).quantize(context(network, Budget(effective_bits=6, group_size=32)))
    one = torch.ones(1)
    for name, weight in original.items():
        assert torch.equal(network.weight(name), quantized.packed[name].dequantize())
        s, t = quantized.input_scale.get(name, one), quantized.output_scale.get(name, one)
        error = t.unsqueeze(1) * quantized.packed[name].dequantize() / s - weight
        assert error.square().mean() < 0.02 * weight.square().mean()


def test_corrections_help_every_linear_the_more_the_higher_their_rank(
    run: Callable[..., Quantized], small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama(num_key_value_heads=4)
    ctx, budget = context(network), Budget(effective_bits=30, group_size=32)

    class Narrow(NNCF):
        """Without the backup format, so that a generous budget changes nothing."""

        def candidates(self, budget: Budget) -> tuple:
            return super().candidates(budget)[:1]

    def errors(rank: int) -> dict[str, float]:
        quantized = run(Narrow(lora_rank=rank), budget)
        assert all(isinstance(packed, PackedSum) == (rank > 0) for packed in quantized.packed.values())
        return _errors(quantized, network, ctx)

    none, small, large, full = (errors(rank) for rank in (0, 4, 16, 64))
    for name in none:
        assert none[name] > small[name] > large[name] > full[name]
        assert full[name] < 0.05 * none[name]


def _errors(quantized: Quantized, network: Network, ctx: Context) -> dict[str, float]:
    one, errors = torch.ones(1), {}
    for name in network.linears:
        s, t = quantized.input_scale.get(name, one), quantized.output_scale.get(name, one)
        delta: Tensor = quantized.packed[name].dequantize() - network.weight(name) * s / t.unsqueeze(1)
        gram = ctx.statistics(Stat.GRAM, name) / (s.unsqueeze(0) * s.unsqueeze(1))
        metric = torch.eye(len(gram)) + len(ctx.tokens) * gram
        errors[name] = float((delta @ metric * delta).sum())
    return errors


def test_corrections_are_of_the_rewritten_weights_and_inputs(
    run: Callable[..., Quantized], small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama(num_key_value_heads=4)
    ctx, quantized = context(network), run(NNCF(lora_rank=4), Budget(effective_bits=7.2, group_size=32))
    one, seen = torch.ones(1), set()
    for name, packed in quantized.packed.items():
        if isinstance(packed, PackedSum):
            s, t = quantized.input_scale.get(name, one), quantized.output_scale.get(name, one)
            gram = ctx.statistics(Stat.GRAM, name) / (s.unsqueeze(0) * s.unsqueeze(1))
            expected = corrected(packed.base, network.weight(name) * s / t.unsqueeze(1), gram, len(ctx.tokens), 4)
            torch.testing.assert_close(packed.dequantize(), expected.dequantize(), atol=1e-5, rtol=1e-4)
            seen.add((name in quantized.input_scale, name in quantized.output_scale))
    assert seen == {(False, False), (True, False), (False, True)}


def test_the_budget_pays_for_corrections(run: Callable[..., Quantized], small_llama: Callable[..., Network]) -> None:
    assert NNCF(lora_rank=8).supports(small_llama(), Budget(bits=4, group_size=32)) is not None
    budget = Budget(effective_bits=7.2, group_size=32)
    quantized = run(NNCF(lora_rank=4), budget)
    assert effective_bits(quantized) <= 7.2
    kinds = {type(packed) for packed in quantized.packed.values()}
    assert kinds == {PackedSum, PackedInteger}


def test_statistics_are_those_of_the_parts() -> None:
    assert NNCF(metric="nncf_weight_error").statistics == frozenset()
    assert NNCF(metric="nncf_weight_error", lora_rank=8).statistics == {Stat.GRAM}
    assert NNCF().statistics == {Stat.MEAN, Stat.MEAN_SQUARE}


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="lora_rank=-1"):
        NNCF(lora_rank=-1)
    with pytest.raises(ValueError, match="nncf_hesian"):
        NNCF(metric="nncf_hesian")
