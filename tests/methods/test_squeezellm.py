from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.packed_codebook import PackedCodebook
from kernels.packed_sum import PackedSparse, PackedSum
from methods.base import Budget, Context
from methods.formats.codebook import Codebook
from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.base import Subject
from methods.sensitivity.fisher import fisher_diagonals
from methods.squeezellm import SqueezeLLM, dense_and_sparse, most_sensitive, outlier_bound, outlyingness

TOKENS = torch.randint(96, (4, 9), generator=torch.Generator().manual_seed(1))

Build = Callable[..., Network]
Given = Callable[..., Context]


def heavy(out: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with heavy tails, off center."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator) / torch.rand(out, columns, generator=generator).sqrt()
    return 0.1 * weight + 0.02


def importances(out: int, columns: int, seed: int = 1) -> Tensor:
    return torch.exp(2 * torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)))


def fisher_of(network: Network, tokens: Tensor) -> dict[str, Tensor]:
    """The diagonals that the method should use."""
    return fisher_diagonals(Subject(network, tokens, tokens, (), lambda stat, linear: torch.empty(0)))[0]


def loss(weight: Tensor, rounded: Tensor, importance: Tensor) -> float:
    return float((importance * (rounded - weight).square()).sum())


def parts(packed: Any) -> tuple[PackedCodebook, PackedSparse]:
    assert isinstance(packed, PackedSum)
    assert isinstance(packed.base, PackedCodebook) and isinstance(packed.correction, PackedSparse)
    return packed.base, packed.correction


@pytest.mark.parametrize("width", [2, 4])
def test_without_a_sparse_part_it_is_k_means_weighted_with_the_fisher_information(
    small_llama: Build, context: Given, width: int
) -> None:
    network = small_llama()
    ctx = context(network, Budget(bits=width), TOKENS, statistics=False)
    original = {name: network.weight(name) for name in network.linears}
    fisher = fisher_of(network, ctx.tokens)
    quantized = SqueezeLLM(outliers=0, sensitive=0).quantize(ctx)
    assert list(quantized.packed) == list(network.linears)
    for name, weight in original.items():
        packed = quantized.packed[name]
        found = packed.dequantize()
        assert torch.equal(found, Codebook(width).fit(weight, fisher[name]).snap(weight))
        assert packed.stored_bits() == Codebook(width).stored_bits(packed.shape)
        assert max(len(row.unique()) for row in found) <= 2**width
        assert loss(weight, found, fisher[name]) < loss(weight, Codebook(width).fit(weight).snap(weight), fisher[name])
        assert loss(weight, found, fisher[name]) < loss(weight, Integer(width).fit(weight).snap(weight), fisher[name])


def test_with_equal_importances_it_is_plain_k_means() -> None:
    weight, none = heavy(8, 200), torch.zeros(8, 200, dtype=torch.bool)
    for level in (1.0, 1e-6, 0.0):  # a linear that no gradient reached has no information at all
        packed = dense_and_sparse(weight, torch.full_like(weight, level), none, Codebook(3))
        torch.testing.assert_close(packed.dequantize(), Codebook(3).fit(weight).snap(weight))


def test_kept_weights_are_exact_to_fp16_and_the_others_on_the_codebook() -> None:
    weight, importance = heavy(8, 200), importances(8, 200)
    kept = outlyingness(weight) >= 1200
    kept[3] = False
    packed = dense_and_sparse(weight, importance, kept, Codebook(3))
    base, sparse = parts(packed)
    assert torch.equal(sparse.dequantize() != 0, kept)
    error = (packed.dequantize() - weight).abs()
    assert (error[kept] <= 2.0**-11 * sparse.dequantize().abs()[kept] + 1e-7).all()
    alone = base.codebook.float().unsqueeze(1)
    torch.testing.assert_close(error[~kept], (weight.unsqueeze(2) - alone).abs().amin(2)[~kept])


def test_kept_weights_have_no_say_in_the_codebook() -> None:
    weight, importance = heavy(8, 200), importances(8, 200)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[:, ::50] = True
    disturbed = torch.where(kept, 30.0, weight)
    codebooks = [parts(dense_and_sparse(w, importance, kept, Codebook(3)))[0].codebook for w in (weight, disturbed)]
    torch.testing.assert_close(codebooks[0], codebooks[1], rtol=2e-3, atol=0)
    shorter = torch.ones(200, dtype=torch.bool)
    shorter[::50] = False
    alone = Codebook(3).fit(weight[:, shorter], importance[:, shorter]).codebook
    fitted = loss(
        weight, parts(dense_and_sparse(weight, importance, kept, Codebook(3)))[0].dequantize(), importance * ~kept
    )
    expected = loss(
        weight, alone.gather(1, (weight.unsqueeze(2) - alone.unsqueeze(1)).abs().argmin(2)), importance * ~kept
    )
    assert fitted == pytest.approx(expected, rel=0.02)


def test_a_row_whose_weights_are_all_kept_is_exact() -> None:
    weight, kept = heavy(4, 50), torch.zeros(4, 50, dtype=torch.bool)
    kept[1] = True
    packed = dense_and_sparse(weight, importances(4, 50), kept, Codebook(2))
    torch.testing.assert_close(packed.dequantize()[1], weight[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("r", [0.3, 1.0, 1.8, 4.0])
def test_outlyingness_reaches_a_bound_where_the_official_rule_says_so(r: float) -> None:
    weight = heavy(101, 101)
    lower, upper = np.quantile(weight.numpy(), [0.25, 0.75], method="inverted_cdf")
    bound = max(abs(lower - r * (upper - lower)), abs(upper + r * (upper - lower)))
    assert bound > 0.02
    expected = weight.abs() >= bound
    found = outlyingness(weight) >= int(1024 * np.log2(1 + r))
    assert (found != expected).sum() <= 10  # of 10201: steps of 1/1024
    assert 0 < expected.sum() < expected.numel() / 3


def test_matrices_of_mostly_equal_weights_have_no_outliers() -> None:
    weight = torch.zeros(10, 10)
    assert not outlyingness(weight).any()
    weight[0] = 100
    assert not outlyingness(weight).any()
    weight = heavy(10, 10)
    weight[0, 0] = 3e38  # does not overflow
    assert outlyingness(weight).argmax() == 0


@pytest.mark.parametrize("share", [0.0, 0.001, 0.004, 0.1, 1.0])
def test_one_bound_gives_the_share_of_the_whole_network(small_llama: Build, share: float) -> None:
    network = small_llama()
    name = network.linears[0]
    network.overwrite(name, heavy(*network.shape(name)))  # most outliers lie where the tails are heavy
    bound = outlier_bound(network, share)
    total = sum(out * columns for out, columns in network.shapes)
    reaching = {n: int((outlyingness(network.weight(n)) >= bound).sum()) for n in network.linears}
    assert sum(reaching.values()) <= share * total
    assert (
        bound == 0 or sum(int((outlyingness(network.weight(n)) >= bound - 1).sum()) for n in reaching) > share * total
    )
    assert sum(reaching.values()) >= share * total - 0.002 * total
    assert share not in {0.001, 0.004} or reaching[name] > sum(reaching.values()) / 2


def test_the_most_sensitive_are_the_largest_importances() -> None:
    importance = importances(10, 30)
    chosen = most_sensitive(importance, 0.05)
    assert int(chosen.sum()) == 15
    assert importance[chosen].min() > importance[~chosen].max()
    assert not most_sensitive(importance, 0.003).any() and most_sensitive(importance, 1.0).all()
    assert not most_sensitive(torch.zeros(10, 30), 0.05).any()


def test_the_sparse_part_holds_outliers_and_sensitive_weights(small_llama: Build, context: Given) -> None:
    network = small_llama()
    ctx = context(network, Budget(bits=3), TOKENS, statistics=False)
    original = {name: network.weight(name) for name in network.linears}
    fisher, bound = fisher_of(network, ctx.tokens), outlier_bound(network, 0.01)
    quantized = SqueezeLLM(outliers=0.01, sensitive=0.002).quantize(ctx)
    for name, weight in original.items():
        kept = (outlyingness(weight) >= bound) | most_sensitive(fisher[name], 0.002)
        base, sparse = parts(quantized.packed[name])
        assert torch.equal(sparse.dequantize() != 0, kept)
        counted = Codebook(3).stored_bits(base.shape) + 32 * int(kept.sum()) + 32 * (len(weight) + 1)
        assert quantized.packed[name].stored_bits() == counted
        assert torch.equal(network.weight(name), quantized.packed[name].dequantize())
        dense = Codebook(3).fit(weight, fisher[name]).snap(weight)
        assert loss(weight, quantized.packed[name].dequantize(), fisher[name]) < loss(weight, dense, fisher[name])


def test_the_fisher_information_is_that_of_calibration_text(small_llama: Build, context: Given) -> None:
    network = small_llama()
    ctx = context(network, Budget(bits=3), TOKENS, statistics=False)
    asked: list[tuple[str, dict[str, Any]]] = []

    def memo(name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        asked.append((name, dict(options)))
        assert compute.__module__ == "methods.sensitivity.fisher"
        return compute()

    expected = fisher_of(network, ctx.tokens[:3, :8])
    weight = network.weight(network.linears[0])
    method = SqueezeLLM(outliers=0, sensitive=0, sequences=3, context=8)
    found = method.quantize(replace(ctx, memo=memo, scoring=ctx.scoring[:0])).packed[network.linears[0]]
    assert torch.equal(found.dequantize(), Codebook(3).fit(weight, expected[network.linears[0]]).snap(weight))
    options = {"sequences": 3, "context": 8, "seed": 0, "text": "calibration"}
    assert asked == [("fisher_diagonals", options)]


def test_it_wants_a_width(small_llama: Build) -> None:
    assert SqueezeLLM().supports(small_llama(), Budget(effective_bits=3.5)) is not None
    assert SqueezeLLM().supports(small_llama(), Budget(bits=3)) is None


@pytest.mark.parametrize("options", [{"outliers": -0.1}, {"outliers": 0.45, "sensitive": 1.2}])
def test_shares_are_shares(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        SqueezeLLM(**options)


def test_rows_too_short_for_their_tables_are_refused(small_llama: Build) -> None:
    network = small_llama()
    assert SqueezeLLM().supports(network, Budget(bits=4, group_size=32)) is None
    # 256 entries of 16 bits for rows of 64 and 96 weights.
    assert "rows are too short" in str(SqueezeLLM().supports(network, Budget(bits=8, group_size=32)))
