"""Which channels are kept, what becomes of the others, and what is stored."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from harness.accounting import packed_copy
from kernels.packed_columns import PackedColumns
from methods.base import Budget, Context, Stat
from methods.formats.floats import MX
from methods.formats.integer import Integer
from methods.network import Network
from methods.rtn import RTN
from methods.salient import CRITERIA, Salient, largest, with_exact_columns

Build = Callable[..., Context]
BUDGET = Budget(bits=3, group_size=32)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def network(small_llama: Callable[..., Network]) -> Network:
    return small_llama()


def places(packed: object) -> list[int]:
    assert isinstance(packed, PackedColumns)
    return packed.index.tolist()


def with_magnitudes(ctx: Context, magnitudes: dict[int, Tensor]) -> Context:
    """Mean magnitudes of inputs by their number of channels, and no other statistics."""

    def statistics(stat: Stat, linear: str) -> Tensor:
        assert stat is Stat.MEAN_ABS
        return magnitudes[ctx.network.shape(linear)[1]]

    return replace(ctx, statistics=statistics)


@pytest.mark.parametrize("fmt", [Integer(3, 4), Integer(2), Integer(3, 5, symmetric=True)], ids=lambda f: f.name)
def test_kept_columns_are_exact_and_the_others_on_the_grid_of_the_whole(fmt: Integer) -> None:
    """The grid by hand: a range of all columns of the group, the kept ones included."""
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half().float()
    exact = torch.zeros(8, dtype=torch.bool)
    exact[[2, 5]] = True
    weight[:, 2] *= 8  # the widest of its group
    decoded = with_exact_columns(weight, exact, fmt).dequantize()
    assert torch.equal(decoded[:, exact], weight[:, exact])
    size = fmt.group_size or 8
    for row in range(3):
        for column in set(range(8)) - {2, 5}:
            start = column // size * size
            group = weight[row, start : start + size].tolist()
            low, high = min(*group, 0.0), max(*group, 0.0)
            if fmt.symmetric:
                low, high = -max(-low, high), max(-low, high)
            step = float(torch.tensor((high - low) / (2**fmt.width - 1)).half())
            zero = 2 ** (fmt.width - 1) if fmt.symmetric else round(-low / step)
            points = [(code - zero) * step for code in range(2**fmt.width)]
            nearest = min(points, key=lambda point: abs(point - float(weight[row, column])))
            assert float(decoded[row, column]) == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_is_not_kept_is_what_rounding_to_nearest_gives(
    network: Network, small_llama: Callable[..., Network], context: Build, criterion: str
) -> None:
    original = {name: network.weight(name) for name in network.linears}
    done = Salient(criterion, 0.1).quantize(context(network, BUDGET))
    nearest = RTN().quantize(context(small_llama(), BUDGET))
    for name, packed in done.packed.items():
        kept = places(packed)
        decoded, rounded = packed.dequantize(), nearest.packed[name].dequantize()
        assert len(kept) == round(0.1 * packed.shape[1])
        assert torch.equal(decoded[:, kept], original[name][:, kept].half().float())
        rounded[:, kept] = decoded[:, kept]
        assert torch.equal(decoded, rounded)
        assert torch.equal(network.weight(name), decoded)


def test_the_channels_of_the_largest_mean_input_are_kept(network: Network, context: Build) -> None:
    magnitudes = {width: torch.arange(width).remainder(7).float() for width in (64, 96)}
    magnitudes[64][[3, 40]] = torch.tensor([9.0, 8.0])
    magnitudes[96][[0, 95]] = torch.tensor([8.0, 9.0])
    ctx = with_magnitudes(context(network, BUDGET), magnitudes)
    for name, packed in Salient(fraction=0.02).quantize(ctx).packed.items():
        expected = [3] if network.shape(name)[1] == 64 else [0, 95]
        assert places(packed) == expected


def test_the_columns_of_the_largest_norm_are_kept(network: Network, context: Build) -> None:
    """A norm, which sees both signs, many small weights, and outputs of any number."""
    for name in network.linears:
        weight = network.weight(name) / 100
        weight[:, 11], weight[0, 17], weight[:, 30] = -0.5, 0.6, 0.4
        network.overwrite(name, weight)
    done = Salient("weight", 0.02).quantize(context(network, BUDGET, statistics=False))
    for packed in done.packed.values():
        assert places(packed) == ([11] if packed.shape[1] == 64 else [11, 30])


def test_random_channels_follow_the_generator_alone(small_llama: Callable[..., Network], context: Build) -> None:
    def drawn(seed: int) -> list[list[int]]:
        ctx = replace(context(small_llama(), BUDGET, statistics=False), generator=torch.Generator().manual_seed(seed))
        return [places(packed) for packed in Salient("random", 0.1).quantize(ctx).packed.values()]

    assert drawn(0) == drawn(0) != drawn(1)
    counts = torch.zeros(64)
    for seed in range(20):
        for kept in drawn(seed):
            counts[[place for place in kept if place < 64]] += 1
    assert counts.min() > 0  # every channel has its chance: 280 draws, each keeps about a tenth
    assert len({tuple(kept) for kept in drawn(0)}) == 14


def test_no_other_choice_of_channels_has_a_larger_score() -> None:
    score = torch.tensor([0.5, 3.0, 0.1, 2.0, 1.0])
    for fraction, count in ((0.01, 1), (0.3, 2), (0.5, 2), (0.6, 3), (1.0, 5)):
        chosen = largest(score, fraction)
        assert int(chosen.sum()) == count
        best = max(sum(subset) for subset in combinations(score.tolist(), count))
        assert float(score[chosen].sum()) == pytest.approx(best)
    assert int(largest(torch.zeros(9), 0.3).sum()) == 3


@pytest.mark.parametrize("fraction", [0.001, 0.03, 1.0])
def test_stored_are_the_codes_the_columns_and_their_places(network: Network, context: Build, fraction: float) -> None:
    for packed in Salient(fraction=fraction).quantize(context(network, BUDGET)).packed.values():
        out, columns = packed.shape
        count = max(1, round(fraction * columns))
        assert packed.stored_bits() == BUDGET.format().stored_bits((out, columns)) + count * (16 * out + 16)


def test_all_channels_kept_are_the_model_in_16_bits(
    network: Network, small_llama: Callable[..., Network], context: Build
) -> None:
    original = small_llama()
    done = Salient(fraction=1.0).quantize(context(network, BUDGET))
    tokens = context(original).scoring
    exact, quantized = original.logits(tokens), Network(packed_copy(original, done), ()).logits(tokens)
    assert (quantized - exact).norm() < 2e-3 * exact.norm()


def test_bf16_weights_are_kept_exactly(network: Network, context: Build) -> None:
    """Of magnitudes that fp16 does not have."""
    network.model.bfloat16()
    name = network.linears[0]
    network.overwrite(name, network.weight(name) * 1e-9)
    original = network.weight(name)
    packed = Salient("weight", 0.1).quantize(context(network, BUDGET, statistics=False)).packed[name]
    assert torch.equal(packed.dequantize()[:, places(packed)], original[:, places(packed)])


def test_other_formats_keep_channels_too(network: Network, context: Build) -> None:
    name = network.linears[0]
    original = network.weight(name)
    done = Salient(format="mxfp4").quantize(context(network, Budget(bits=4)))
    decoded, kept = done.packed[name].dequantize(), places(done.packed[name])
    expected = MX().fit(original).snap(original)
    expected[:, kept] = original[:, kept].half().float()
    assert torch.equal(decoded, expected)


def test_statistics_are_needed_for_activations_only() -> None:
    assert Salient().statistics == {Stat.MEAN_ABS}
    assert Salient(inputs="int8-static").statistics == {Stat.MEAN_ABS, Stat.MAX_ABS}
    assert Salient("weight").statistics == Salient("random").statistics == frozenset()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown criterion 'activations': did you mean activation"):
        Salient("activations")
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="no share of the channels"):
            Salient(fraction=fraction)
