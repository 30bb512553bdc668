from itertools import product

import pytest
import torch
from torch import Tensor

from methods.formats.base import Format
from methods.formats.floats import NVFP4
from methods.formats.integer import Integer
from methods.incoherence import MidRise
from methods.rounding.base import ROUNDINGS
from methods.rounding.gptq import GPTQRounding
from methods.rounding.ldlq import LDLQ
from methods.rounding.nearest import Nearest


def layer(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and the Gram matrix of correlated inputs with uneven energies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    energies = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(4 * columns, columns, generator=generator) @ mix * energies.sqrt()
    return torch.randn(out, columns, generator=generator), x.T @ x / len(x)


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def loss(delta: Tensor, hessian: Tensor) -> float:
    return float((delta.double() @ hessian.double() * delta.double()).sum())


def textbook(weight: Tensor, hessian: Tensor, fmt: Format) -> Tensor:
    """Codes of linear feedback with the unit lower factor of the LDL decomposition, in fp64, column by column."""
    count = weight.shape[1]
    lower = torch.linalg.cholesky(hessian)
    unit = lower / lower.diagonal()  # H = unit · D · unitᵀ
    grid, rounded = fmt.fit(weight), torch.zeros_like(weight).double()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for j in reversed(range(count)):
        feedback = (weight.double() - rounded)[:, j + 1 :] @ unit[j + 1 :, j]
        code = grid.encode((weight[:, j].double() + feedback).unsqueeze(1), j)
        codes[:, j], rounded[:, j] = code.squeeze(1), grid.decode(code, j).squeeze(1).double()
    return codes


@pytest.mark.parametrize("fmt", [Integer(3), Integer(4, 32), Integer(2, 48, symmetric=True), MidRise(3)], ids=str)
@pytest.mark.parametrize("block", [1, 40, 128])
def test_codes_equal_those_of_the_ldl_decomposition(fmt: Format, block: int) -> None:
    weight, gram = layer(48, 112)
    packed = LDLQ(block=block)(weight, fmt, gram).packed
    actual = packed.unpacked_codes()  # type: ignore[operator]
    assert (actual == textbook(weight, damped(gram), fmt)).float().mean() >= 0.999


def test_it_is_gptq_on_reversed_columns() -> None:
    weight, gram = layer(24, 96)
    ours = LDLQ()(weight, MidRise(3), gram).weight
    reverse = GPTQRounding()(weight.flip(1), MidRise(3), gram.flip(0, 1)).weight
    assert torch.equal(ours, reverse.flip(1))
    assert not torch.equal(ours, GPTQRounding()(weight, MidRise(3), gram).weight)


@pytest.mark.parametrize("fmt", [Integer(3, 40), Integer(4), MidRise(2), NVFP4()], ids=str)
@pytest.mark.parametrize("passes", [0, 2])
def test_what_is_packed_is_what_is_returned(fmt: Format, passes: int) -> None:
    weight, gram = layer(16, 112)
    rounded = LDLQ(greedy_passes=passes)(weight, fmt, gram)
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)
    assert rounded.packed.stored_bits() == fmt.stored_bits((16, 112))


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_loss_is_the_trace_of_the_pivots_for_fine_grids(damping: float) -> None:
    """Theorem 1: with rounding errors uniform in ±step/2, the loss is step²/12 · tr(D) a row on average."""
    weight, gram = layer(64, 64)
    fmt = MidRise(8, rho=6.0)
    hessian = damped(gram, damping)
    step = float(fmt.fit(weight).step)
    pivots = torch.linalg.cholesky(hessian).diagonal().square().sum()
    actual = loss(LDLQ(damping)(weight, fmt, gram).weight - weight, hessian)
    assert actual == pytest.approx(64 * step**2 / 12 * float(pivots), rel=0.1)


def test_greedy_passes_never_lose_and_end_where_no_column_can_improve() -> None:
    weight, gram = layer(8, 48)
    fmt, hessian = Integer(2, 16), damped(gram)
    losses = [loss(LDLQ(greedy_passes=n)(weight, fmt, gram).weight - weight, hessian) for n in (0, 1, 2, 50)]
    assert losses[0] > losses[1] >= losses[2] >= losses[3]
    final, grid = LDLQ(greedy_passes=50, block=20)(weight, fmt, gram).weight, fmt.fit(weight)
    for column, code in product(range(48), range(4)):
        other = final.clone()
        other[:, column] = grid.decode(torch.full((8, 1), code), column).squeeze(1)
        change = ((other - weight).double() @ hessian * (other - weight)).sum(1)
        change -= ((final - weight).double() @ hessian * (final - weight)).sum(1)
        assert float(change.min()) > -1e-5


def test_block_size_does_not_matter_to_greedy_passes() -> None:
    weight, gram = layer(16, 96)
    reference = LDLQ(greedy_passes=3, block=96)(weight, Integer(3, 32), gram).weight
    for block in (1, 40):
        other = LDLQ(greedy_passes=3, block=block)(weight, Integer(3, 32), gram).weight
        assert (other == reference).float().mean() >= 0.999


def test_uncorrelated_inputs_of_equal_energy_leave_nothing_to_gain() -> None:
    weight, _ = layer(16, 96)
    for fmt in (Integer(3, 32), MidRise(3)):
        expected = Nearest()(weight, fmt).weight
        assert torch.equal(LDLQ(greedy_passes=1)(weight, fmt, 2.5 * torch.eye(96)).weight, expected)
        assert torch.equal(LDLQ()(weight, fmt, torch.zeros(96, 96)).weight, expected)  # no data at all


def test_weights_of_inputs_that_are_always_zero_become_zero() -> None:
    weight, gram = layer(8, 64)
    dead = torch.arange(64) % 5 == 0
    gram[dead] = 0
    gram[:, dead] = 0
    rounded = LDLQ(greedy_passes=1)(weight, Integer(3, 32), gram).weight
    assert not rounded[:, dead].any()
    assert rounded[:, ~dead].any(0).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="Gram"):
        ROUNDINGS["ldlq"]()(torch.zeros(2, 4), Integer(4))
    for options in ({"damping": -1.0}, {"greedy_passes": -1}, {"block": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LDLQ(**options)
