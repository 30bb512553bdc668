import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.packed_group_widths import PackedGroupWidths
from methods.base import Budget, Context, Method
from methods.formats.group_widths import GroupWidths, extremes
from methods.formats.integer import Integer
from methods.gptq import GPTQ
from methods.network import Network
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest
from methods.rounding.sweep import damped_factor
from methods.rtn import RTN
from methods.slim_llm import (
    CRITERIA,
    SalienceWeighted,
    SliMLLM,
    allocate,
    group_salience,
    kl_divergence,
    round_groups,
)

SIZE = 16


def layer(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in], and correlated inputs [rows, in] whose energy differs from group to group."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    energy = torch.exp(2 * torch.randn(-(-columns // SIZE), generator=generator)).repeat_interleave(SIZE)[:columns]
    x = torch.randn(4 * columns, columns, generator=generator) @ mix * energy.sqrt()
    return torch.randn(out, columns, generator=generator), x / 10


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def salience(weight: Tensor, x: Tensor) -> Tensor:
    return group_salience(weight, damped_factor(x.t() @ x, 0.01).diagonal().square(), SIZE)


def test_salience_equals_the_formula_with_the_dense_inverse() -> None:
    weight, x = layer(6, 40)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(x.t() @ x)), upper=True)
    elements = weight.double().square() / upper.diagonal().square()
    expected = torch.stack([part.sum() for part in elements.split(SIZE, dim=1)])
    torch.testing.assert_close(salience(weight, x).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("width", [2, 3, 7])
@pytest.mark.parametrize("columns", [96, 88, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_the_allocation_is_the_best_of_all_pairings(criterion: str, width: int, columns: int, biased: bool) -> None:
    weight, x = layer(12, columns)
    bias = torch.randn(12, generator=torch.Generator().manual_seed(4)) if biased else None
    loss, importance = CRITERIA[criterion], salience(weight, x)
    whole, count = columns // SIZE, len(importance)
    order = importance[:whole].argsort().tolist()
    original = nn.functional.linear(x, weight, bias)
    candidates: dict[tuple[int, ...], float] = {}
    for n in range(whole // 2 + 1):
        widths = [width] * count
        for group in order[:n]:
            widths[group] -= 1
        for group in order[::-1][:n]:
            widths[group] += 1
        rounded = Nearest()(weight, GroupWidths(tuple(widths), SIZE)).weight
        candidates[tuple(widths)] = float(loss(nn.functional.linear(x, rounded, bias), original))
    found = allocate(weight, bias, x, importance, width, SIZE, loss)
    assert candidates[found] == pytest.approx(min(candidates.values()), rel=1e-4)
    assert sum(found) == width * count
    assert found[whole:] == (width,) * (count - whole)


@pytest.mark.parametrize("uneven", [False, True])
def test_bits_move_where_energies_differ_and_stay_where_they_do_not(uneven: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 8 * SIZE, generator=generator)
    energy = torch.tensor([30.0, 1, 1, 0.01, 1, 0.01, 30, 1]) if uneven else torch.ones(8)
    x = torch.randn(400, 8 * SIZE, generator=generator) * energy.repeat_interleave(SIZE).sqrt()
    widths = allocate(weight, None, x, salience(weight, x), 3, SIZE, CRITERIA["error"])
    if uneven:
        assert [widths[g] for g in (0, 6)] == [4, 4]
        assert [widths[g] for g in (3, 5)] == [2, 2]
    else:
        assert set(widths) == {3}


def test_one_group_or_no_tokens_move_nothing() -> None:
    weight, x = layer(4, SIZE)
    assert allocate(weight, None, x, salience(weight, x), 2, SIZE, kl_divergence) == (2,)
    weight, x = layer(4, 4 * SIZE)
    assert allocate(weight, None, x[:0], salience(weight, x), 2, SIZE, kl_divergence) == (2, 2, 2, 2)


def test_kl_divergence_equals_the_definition() -> None:
    outputs, original = layer(5, 7)[0], layer(5, 7, seed=1)[0]
    q, p = outputs.double().softmax(1), original.double().softmax(1)
    expected = sum(float(a * (a / b).log()) for a, b in zip(q.flatten(), p.flatten(), strict=True))
    assert float(kl_divergence(outputs, original)) == pytest.approx(expected, rel=1e-5)
    far = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert float(kl_divergence(*far)) == pytest.approx(math.log(1e6), rel=1e-4)


def test_squared_error_of_the_factor_is_that_of_all_tokens() -> None:
    """What `criterion=error` relies on: E‖Δx‖² = ‖Rᵀ Δᵀ‖²."""
    weight, x = layer(6, 40)
    factor = damped_factor(x.t() @ x, 0.0)
    delta = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    loss = CRITERIA["error"]
    actual = loss((weight + delta) @ factor, weight @ factor)
    assert float(actual) == pytest.approx(float((x @ delta.t()).square().sum()), rel=1e-4)


@pytest.mark.parametrize("columns", [64, 88])
def test_without_moves_and_search_it_is_grouped_gptq(columns: int) -> None:
    weight, x = layer(12, columns)
    gram = x.t() @ x
    ours = round_groups(weight, damped_factor(gram, 0.01), GroupWidths((3,) * -(-columns // SIZE), SIZE), extremes)
    theirs = GPTQRounding()(weight, Integer(3, SIZE), gram)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.packed.dequantize(), theirs.weight)


def search_by_hand(weight: Tensor, importance: Tensor, width: int, factors: list[float]) -> Tensor:
    """The least weighted error of each row of weights [out, n], over all factors: [out]."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    errors = []
    for factor in factors:
        scale = ((high - low) * factor / (2**width - 1)).half().float().unsqueeze(1)
        zero = torch.round(-low.unsqueeze(1) * factor / scale)
        rounded = scale * ((torch.round(weight / scale) + zero).clamp(0, 2**width - 1) - zero)
        errors.append((importance * (rounded - weight).abs() ** 2.4).sum(1))
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize("salient_weight", [1.0, 30.0])
def test_ranges_are_the_best_of_all_factors(salient_weight: float) -> None:
    weight, x = layer(20, 64)
    gain = damped_factor(x.t() @ x, 0.01).diagonal().square()
    part, start = weight[:, 24:56], 24
    delta = part.square() * gain[24:56]
    salient = (delta - delta.mean()) / delta.std() > 2
    assert 0 < int(salient.sum()) < 0.2 * delta.numel()
    importance = 1 + (salient_weight - 1) * salient.float()
    factors = [1 + i / 500 for i in range(-50, 51)]
    expected = search_by_hand(part, importance, 3, factors)
    scale, zero = SalienceWeighted(gain, salient_weight, 0.1, 50)(part, 3, start)
    codes = (torch.round(part / scale.unsqueeze(1)) + zero.unsqueeze(1)).clamp(0, 7)
    error = (importance * ((codes - zero.unsqueeze(1)) * scale.unsqueeze(1) - part).abs() ** 2.4).sum(1)
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)
    assert error.sum() < 0.97 * search_by_hand(part, importance, 3, [1.0]).sum()


def test_salient_weights_are_served_better_if_they_weigh_more() -> None:
    weight, gain = layer(20, 64)[0], torch.ones(64)
    salient = weight.square() - weight.square().mean() > 2 * weight.square().std()
    errors = []
    for salient_weight in (1.0, 100.0):
        scale, zero = SalienceWeighted(gain, salient_weight, 0.1, 50)(weight, 3, 0)
        codes = (torch.round(weight / scale.unsqueeze(1)) + zero.unsqueeze(1)).clamp(0, 7)
        delta = (codes - zero.unsqueeze(1)) * scale.unsqueeze(1) - weight
        errors.append(float((delta.abs() ** 2.4)[salient].sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (3, 16), (7, 32), (2, 0), (3, 40)])
def test_mean_width_and_storage(
    small_llama: Callable[..., Network], context: Callable[..., Context], bits: int, group: int
) -> None:
    network = small_llama()
    for block in network.model.model.layers:  # type: ignore[union-attr]
        for norm in (block.input_layernorm, block.post_attention_layernorm):  # type: ignore[union-attr]
            norm.weight.data[:32] *= 20  # type: ignore[operator]
    quantized = SliMLLM(tau_steps=2).quantize(context(network, Budget(bits=bits, group_size=group)))
    assert set(quantized.packed) == set(network.linears)
    moved = 0
    for name, packed in quantized.packed.items():
        assert isinstance(packed, PackedGroupWidths)
        assert packed.bits == bits
        widths = packed.widths().tolist()
        size, (out, columns) = group or network.shape(name)[1], network.shape(name)
        assert sum(w * min(size, columns - g * size) for g, w in enumerate(widths)) == bits * columns
        assert set(widths) <= {bits - 1, bits, bits + 1}
        fmt = GroupWidths(tuple(widths), size)
        assert packed.stored_bits() == fmt.stored_bits((out, columns))
        assert torch.equal(packed.dequantize(), network.weight(name))
        moved += len(set(widths)) > 1
    assert bool(moved) == (group in (16, 32))


@pytest.mark.parametrize("options", [{}, {"criterion": "error"}, {"tau": 0.0}, {"salient_weight": 2.0}], ids=str)
@torch.no_grad()
def test_logits_stay_closer_than_with_rounding_to_nearest(
    small_llama: Callable[..., Network], context: Callable[..., Context], options: dict[str, Any]
) -> None:
    def error(method: Method) -> float:
        network = small_llama()
        tokens = torch.randint(96, (40, 16), generator=torch.Generator().manual_seed(1))
        ctx = context(network, Budget(bits=3, group_size=16), tokens)
        expected = network.logits(ctx.scoring)
        method.quantize(ctx)
        return float((network.logits(ctx.scoring) - expected).square().mean())

    assert error(SliMLLM(tau_steps=5) if not options else SliMLLM(tau_steps=5, **options)) < error(RTN())


@torch.no_grad()
def test_one_group_a_row_and_no_search_is_gptq(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    networks = [small_llama(attention_bias=True) for _ in range(2)]
    for network, method in zip(networks, (SliMLLM(tau=0), GPTQ()), strict=True):
        method.quantize(context(network, Budget(bits=3, group_size=0)))
    for name in networks[0].linears:
        assert torch.equal(networks[0].weight(name), networks[1].weight(name))


def test_dead_inputs_and_zero_weights(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    blocks = network.model.model.layers  # type: ignore[union-attr]
    blocks[0].input_layernorm.weight.data[5] = 0  # type: ignore[index, union-attr]
    blocks[1].input_layernorm.weight.data.zero_()  # type: ignore[index, union-attr]
    dead, unknown, zero = (block.groups[i].name for block, i in zip(network.blocks * 2, (0, 0, 2), strict=False))
    network.linear(zero).weight.data.zero_()
    weight = network.weight(unknown)
    packed = SliMLLM(tau_steps=1).quantize(context(network, Budget(bits=3, group_size=32))).packed
    assert all(p.dequantize().isfinite().all() for p in packed.values())
    assert not packed[dead].dequantize()[:, 5].any()
    assert float((packed[unknown].dequantize() - weight).norm() / weight.norm()) < 0.3  # without data: to nearest
    assert float(packed[zero].dequantize().abs().max()) < 1e-6


def test_more_tokens_than_asked_for_are_not_compared(
    small_llama: Callable[..., Network], context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def spy(outputs: Tensor, original: Tensor) -> Tensor:
        rows.append(len(outputs))
        return kl_divergence(outputs, original)

    monkeypatch.setitem(CRITERIA, "kl", spy)
    for asked in (10**6, 160, 50):
        SliMLLM(search_tokens=asked, tau=0).quantize(context(small_llama(), Budget(bits=3, group_size=32)))
    counts = list(dict.fromkeys(rows))
    assert counts[0] == 160  # ten sequences of 16
    assert all(a > b for a, b in pairwise(counts))
    assert 30 <= counts[-1] <= 50


def test_unusable_budgets_and_options_are_named(small_llama: Callable[..., Network]) -> None:
    network, method = small_llama(), SliMLLM()
    assert "9 bits" in (method.supports(network, Budget(bits=8)) or "")
    assert "asymmetric" in (method.supports(network, Budget(bits=3, symmetric=True)) or "")
    assert "uniform" in (method.supports(network, Budget(effective_bits=3.0)) or "")
    assert method.supports(network, Budget(bits=2)) is None
    with pytest.raises(ValueError, match="kl and error"):
        SliMLLM(criterion="mse")
    for options in ({"tau": 1.0}, {"tau": -0.1}, {"search_tokens": 0}, {"tau_steps": 0}, {"damping": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SliMLLM(**options)
