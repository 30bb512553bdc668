from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.packed import PackedDense, PackedInteger
from methods.base import Budget, Context, Method
from methods.formats.base import Format
from methods.formats.floats import MX
from methods.formats.integer import Integer
from methods.network import Network
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest
from methods.rounding.sparsegpt import SparseGPTRounding, Unrounded
from methods.sparsegpt import SparseGPT

PATTERNS = ["", "2:4", "1:4", "5:8"]


def layer(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] that fp16 represents, and the Gram matrix of correlated inputs with uneven energies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    x = x * torch.exp(torch.randn(columns, generator=generator) / 2)
    return torch.randn(out, columns, generator=generator).half().float(), x.T @ x / len(x)


def loss(delta: Tensor, gram: Tensor) -> float:
    return float((delta.double() @ gram.double() * delta.double()).sum())


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def textbook(weight: Tensor, gram: Tensor, fmt: Integer | None, pattern: str, block: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgery in a fixed column order: exact compensation by all later columns, from the explicit
    inverse. Half of the weights go, or n of m. Returns weights and what was pruned, [out, in] each."""
    current, inverse = weight.double(), torch.linalg.inv(damped(gram, 0.01))
    diagonal = torch.linalg.cholesky(inverse, upper=True).diagonal()
    columns = weight.shape[1]
    size = fmt.columns_per_group(columns) if fmt else columns
    n, m = map(int, pattern.split(":")) if pattern else (0, block)
    gone, result = torch.zeros(weight.shape, dtype=torch.bool), torch.empty_like(current)
    for j in range(columns):
        stop = min(j + m, (j // size + 1) * size)  # nothing is compared beyond a group
        if j % size % m == 0:
            cost = (current / diagonal)[:, j:stop].square()
            if pattern:
                for row, costs in enumerate(cost):
                    gone[row, j + costs.argsort()[:n]] = True
            else:
                gone[:, j:stop] = cost <= cost.flatten().sort().values[cost.numel() // 2 - 1]
        if fmt and j % size == 0:
            scale, zero = fmt.scale_and_zero(current[:, j : j + size].float())
        rounded = current[:, j]
        if fmt:
            code = ((current[:, j] / scale).round() + zero).clamp(0, 2**fmt.width - 1)
            rounded = scale * (code - zero)
        result[:, j] = rounded.masked_fill(gone[:, j], 0)
        error = current[:, j] - result[:, j]
        current = current - torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result, gone


@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize(("group", "block"), [(0, 128), (0, 48), (32, 128), (32, 16), (96, 32), (96, 64), (256, 64)])
@pytest.mark.parametrize("quantized", [False, True])
def test_equals_the_textbook_elimination(pattern: str, group: int, block: int, quantized: bool) -> None:
    weight, gram = layer(32, 192)
    expected, gone = textbook(weight, gram, Integer(3, group) if quantized else None, pattern, block)
    fmt: Format = Integer(3, group) if quantized else Unrounded()
    actual = SparseGPTRounding(pattern=pattern, block=block)(weight, fmt, gram).weight
    if quantized:  # a kept weight may be rounded to zero
        assert not actual[gone].count_nonzero() > 0.001 * gone.sum()
    else:
        assert ((actual == 0) == gone).float().mean() >= 0.999
    close = torch.isclose(actual.double(), expected, rtol=1e-2, atol=1e-2)
    assert close.float().mean() >= 0.99


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("fmt", [Unrounded(), Integer(8), Integer(8, 64)])
def test_as_many_weights_are_zero_as_were_to_go(pattern: str, fmt: Format) -> None:
    weight, gram = layer(24, 192)
    packed = SparseGPTRounding(0.3, pattern)(weight, fmt, gram).packed
    gone = ~packed.kept()  # type: ignore[operator]
    assert not packed.dequantize()[gone].any()
    if pattern:
        n, m = map(int, pattern.split(":"))
        assert (gone.view(24, -1, m).sum(-1) == n).all()
    else:
        spans = [64] * 3 if fmt == Integer(8, 64) else [128, 64]
        assert [int(part.sum()) for part in gone.split(spans, dim=1)] == [round(0.3 * 24 * span) for span in spans]


def test_a_sparsity_of_zero_without_quantization_changes_nothing() -> None:
    weight, gram = layer(24, 160)
    rounded = SparseGPTRounding(0.0)(weight, Unrounded(), gram)
    assert torch.equal(rounded.weight, weight)
    assert isinstance(rounded.packed, PackedDense)


@pytest.mark.parametrize("group", [0, 32, 48, 128])
def test_a_sparsity_of_zero_with_quantization_is_gptq(group: int) -> None:
    weight, gram = layer(24, 160)
    fmt = Integer(3, group)
    ours, gptq = SparseGPTRounding(0.0)(weight, fmt, gram), GPTQRounding()(weight, fmt, gram)
    assert torch.equal(ours.weight, gptq.weight)
    assert isinstance(ours.packed, PackedInteger)


def test_uncorrelated_inputs_of_equal_energy_leave_magnitudes_to_decide() -> None:
    weight, _ = layer(16, 128)
    fmt = Integer(3, 128)
    rounded = SparseGPTRounding(0.5)(weight, fmt, 2.5 * torch.eye(128)).weight
    small = weight.abs() <= weight.abs().median()
    assert torch.equal(rounded, Nearest()(weight, fmt).weight.masked_fill(small, 0))


def best_on_support(weight: Tensor, gram: Tensor, gone: Tensor) -> Tensor:
    """One row with the weights that minimize the loss among those that are zero where `gone`: fp64 [in]."""
    kept, hessian = ~gone, gram.double()
    best = torch.zeros(len(weight), dtype=torch.float64)
    best[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.double())
    return best


def test_between_the_best_mask_and_magnitude_pruning() -> None:
    totals = torch.zeros(3, dtype=torch.float64)
    for seed in range(20):
        weight, gram = layer(1, 8, seed)
        gram = damped(gram, 0.0).float()
        losses = []
        for chosen in combinations(range(8), 4):
            gone = torch.zeros(8, dtype=torch.bool)
            gone[list(chosen)] = True
            losses.append(loss((best_on_support(weight[0], gram, gone) - weight[0])[None], gram))
        rounded = SparseGPTRounding(0.5, damping=0.0)(weight, Unrounded(), gram)
        ours = loss(rounded.weight - weight, gram)
        magnitude = loss(weight.masked_fill(weight.abs() <= weight.abs().sort().values[0, 3], 0) - weight, gram)
        assert ours >= min(losses) * (1 - 1e-3)
        totals += torch.tensor([min(losses), ours, magnitude])
    assert totals[0] < totals[1] < 0.8 * totals[2]


def test_loss_is_below_magnitude_pruning() -> None:
    ratios = []
    for seed in range(6):
        weight, gram = layer(32, 160, seed)
        small = weight.abs() <= weight.abs().median()
        ours = loss(SparseGPTRounding(0.5)(weight, Unrounded(), gram).weight - weight, gram)
        ratios.append(ours / loss(weight.masked_fill(small, 0) - weight, gram))
    assert sum(ratios) / len(ratios) < 0.7


def test_the_last_weights_are_optimal_given_the_first() -> None:
    """A weight that goes is paid for by all later ones that stay: with the last pruned weight at column c, what
    follows c is the least-squares optimum given all up to c."""
    weight, gram = layer(1, 12)
    gram[:6, :6] += 5 * torch.diag(torch.rand(6, generator=torch.Generator().manual_seed(0)))
    weight[0, 6:] *= 50  # so that the first half goes
    rounded = SparseGPTRounding(0.5, damping=0.0)(weight, Unrounded(), gram)
    assert torch.equal(rounded.weight[0] == 0, torch.arange(12) < 6)
    torch.testing.assert_close(
        rounded.weight[0].double(), best_on_support(weight[0], gram, torch.arange(12) < 6), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("fmt", [Unrounded(), Integer(3), Integer(4, 32, symmetric=True), Integer(3, 48)])
@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("columns", [160, 30])
def test_what_is_packed_is_what_was_rounded(fmt: Format, pattern: str, columns: int) -> None:
    weight, gram = layer(24, columns)
    rounded = SparseGPTRounding(0.6, pattern)(weight, fmt, gram)
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)


def test_bits_are_those_of_the_formula() -> None:
    weight, gram = layer(32, 256)
    joint = SparseGPTRounding(0.5)(weight, Integer(4, 128), gram).packed
    assert joint.stored_bits() / weight.numel() == 1 + 4 / 2 + (16 + 4) / 128
    alone = SparseGPTRounding(pattern="3:4")(weight, Unrounded(), gram).packed
    assert alone.stored_bits() / weight.numel() == 1 + 16 / 4
    assert Unrounded().stored_bits((32, 256)) == Nearest()(weight, Unrounded()).packed.stored_bits()


def test_inputs_that_are_always_zero_go_first_and_layers_without_data_keep_large_weights() -> None:
    weight, gram = layer(16, 64)
    dead = torch.arange(64) % 4 == 0
    gram[dead] = 0
    gram[:, dead] = 0
    packed = SparseGPTRounding(0.25)(weight, Integer(3, 32), gram).packed
    assert torch.equal(~packed.kept(), dead.expand(16, 64))  # type: ignore[operator]
    untouched = SparseGPTRounding(0.5)(weight, Unrounded(), torch.zeros(64, 64)).weight
    assert untouched[untouched != 0].abs().min() >= weight[untouched == 0].abs().max()


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"prune_only": True}])
@torch.no_grad()
def test_logits_stay_closer_than_with_magnitudes(
    small_llama: Callable[..., Network], context: Callable[..., Context], options: dict[str, Any]
) -> None:
    def error(prune: Callable[[Context], object]) -> float:
        network = small_llama()
        tokens = torch.randint(96, (40, 16), generator=torch.Generator().manual_seed(1))
        ctx = context(network, Budget(bits=4, group_size=32), tokens)
        expected = network.logits(ctx.scoring)
        prune(ctx)
        return float((network.logits(ctx.scoring) - expected).square().mean())

    def ours(ctx: Context) -> None:
        method: Method = SparseGPT(**options)
        assert method.supports(ctx.network, ctx.budget) is None
        packed = method.quantize(ctx).packed
        assert all(torch.equal(ctx.network.weight(n), p.dequantize()) for n, p in packed.items())

    def magnitudes(ctx: Context) -> None:
        rounding = SparseGPTRounding(pattern=options.get("pattern", ""))
        fmt = Unrounded() if options.get("prune_only") else ctx.budget.format()
        for name in ctx.network.linears:
            weight = ctx.network.weight(name)
            ctx.network.overwrite(name, rounding(weight, fmt, torch.eye(weight.shape[1])).weight)

    assert error(ours) < error(magnitudes)


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"damping": -1.0}, {"pattern": "4:2"}, {"pattern": "124"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sparsity|pattern"):
        SparseGPT(**options)


def test_what_cannot_be_pruned_says_so() -> None:
    weight, gram = layer(8, 64)
    with pytest.raises(ValueError, match="multiple of the pattern"):
        SparseGPTRounding(pattern="2:4")(weight, Integer(3, 30), gram)
    with pytest.raises(ValueError, match="PackedFloat cannot be stored pruned"):
        SparseGPTRounding()(weight, MX(), gram)
    with pytest.raises(ValueError, match="Gram"):
        SparseGPTRounding()(weight, Integer(3))
    assert Unrounded().name != "dense16"
