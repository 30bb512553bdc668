from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.orthogonal import random_orthogonal
from kernels.packed_rotated import PackedMidRise, PackedRotated
from methods.base import Budget, Context, Method, Stat
from methods.formats.integer import Integer
from methods.incoherence import Incoherence, MidRise, damped, rescaling
from methods.network import Network
from methods.quip import QuIP
from methods.rounding.base import Rounded, Rounder, Rounding
from methods.rounding.ldlq import LDLQ
from methods.rounding.nearest import Nearest
from methods.rtn import RTN

KINDS = ("kronecker", "hadamard")


def layer(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] with outliers in rows, columns and alone, and the Gram matrix of inputs with outliers."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    x = x * torch.exp(torch.randn(columns, generator=generator))
    weight = torch.randn(out, columns, generator=generator)
    weight[3] *= 8
    weight[:, 5] *= 8
    weight[1, 2] = 40
    return weight, x.T @ x / len(x)


def loss(delta: Tensor, gram: Tensor) -> float:
    return float((delta.double() @ gram.double() * delta.double()).sum())


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding errors, which may turn a few codes; other seeds give a distance of about 0.3."""
    return float((a - b).norm() / b.norm()) < 0.05


def quip(seed: int = 0, rounding: Rounding | None = None, **options: Any) -> Incoherence:
    return Incoherence(rounding or LDLQ(0), torch.Generator().manual_seed(seed), **options)


class Spy(Rounding):
    """Rounds to nearest, and remembers what it was given."""

    def given(self, gram: Tensor | None) -> Rounder:
        assert gram is not None
        self.gram = gram

        def rounder(weight: Tensor, fmt: Any) -> Rounded:
            self.weight, self.rounded = weight, Nearest()(weight, fmt)
            return self.rounded

        return rounder


@pytest.mark.parametrize("kind", [*KINDS, "identity"])
def test_the_loss_is_the_same_in_both_coordinates(kind: str) -> None:
    weight, gram = layer(24, 40)
    spy = Spy()
    ours = quip(0, spy, transform=kind)(weight, MidRise(3), gram)
    inner = loss(spy.rounded.weight - spy.weight, spy.gram)
    assert loss(ours.weight - weight, damped(gram, 0.01)) == pytest.approx(inner, rel=1e-4)
    assert loss(weight, damped(gram, 0.01)) == pytest.approx(loss(spy.weight, spy.gram), rel=1e-5)
    torch.testing.assert_close(spy.gram, spy.gram.t())


@pytest.mark.parametrize("kind", KINDS)
def test_incoherence_drops(kind: str) -> None:
    """Definition 1: μ of a matrix is its largest entry relative to the root mean square."""
    weight, gram = layer(64, 96)
    spy = Spy()
    for seed in range(5):
        quip(seed, spy, transform=kind)(weight, MidRise(3), gram)
        before, after = (float(w.abs().max() / w.square().mean().sqrt()) for w in (weight, spy.weight))
        assert after < 0.5 * before
        # Eigenvectors, the incoherence of a Hessian
        before, after = (float(torch.linalg.eigh(h.double())[1].abs().max()) for h in (gram, spy.gram))
        assert after < 0.8 * before


def test_rescaling_minimizes_the_product_of_both_energies() -> None:
    weight, gram = layer(24, 40)
    hessian = damped(gram, 0.01)

    def energies(inverse: Tensor) -> float:
        return float((hessian.diagonal() * inverse**2).sum() * (weight.double() / inverse).square().sum())

    found = rescaling(weight, hessian).double()
    best = energies(found)
    assert best < 0.5 * energies(torch.ones(40).double())
    for column in range(40):
        for factor in (0.8, 1.25):
            other = found.clone()
            other[column] *= factor
            assert energies(other) > best
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-3)


def test_units_of_inputs_do_not_matter() -> None:
    weight, gram = layer(16, 40)
    reference = quip()(weight, MidRise(3), gram).weight
    assert alike(quip()(weight, MidRise(3), 2.0**-40 * gram).weight, reference)
    assert alike(quip()(weight, MidRise(3), 2.0**40 * gram).weight, reference)


def test_without_rotation_and_with_balanced_energies_it_is_plain_ldlq() -> None:
    weight, gram = layer(24, 40)
    weight = weight / weight.square().sum(0).sqrt()
    gram = gram / torch.outer(gram.diagonal().sqrt(), gram.diagonal().sqrt())
    ours = quip(transform="identity")(weight, MidRise(3), gram)
    assert alike(ours.weight, LDLQ(0.01)(weight, MidRise(3), gram).weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 40), (43, 86), (7, 13), (64, 1)])
def test_packed_holds_the_weight_in_original_coordinates(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(60, shape[1], generator=generator)
    rounded = quip(transform=kind)(weight, MidRise(4), x.t() @ x)
    torch.testing.assert_close(rounded.packed.dequantize(), rounded.weight)
    torch.testing.assert_close(rounded.packed(x), x @ rounded.weight.t(), atol=1e-4, rtol=1e-4)
    assert float((rounded.weight - weight).norm() / weight.norm()) < 0.35
    fmt = MidRise(4)
    assert rounded.packed.stored_bits() == fmt.stored_bits(shape) + 2 * 64 + 16 * shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_at_two_bits_it_loses_much_less_than_rounding_to_nearest(kind: str) -> None:
    for seed in range(4):
        weight, gram = layer(48, 96, seed)
        ours = loss(quip(seed, transform=kind)(weight, MidRise(2), gram).weight - weight, gram)
        plain = loss(LDLQ()(weight, MidRise(2), gram).weight - weight, gram)
        rows = loss(Nearest()(weight, Integer(2)).weight - weight, gram)
        assert ours < 0.5 * min(plain, rows)


def test_every_weight_has_seeds_of_its_own() -> None:
    weight, gram = layer(16, 40)
    rounder = quip().given(gram)
    first, second = rounder(weight, MidRise(3)), rounder(weight, MidRise(3))
    assert isinstance(first.packed, PackedRotated)
    assert not torch.equal(first.packed.seeds, second.packed.seeds)
    assert not alike(first.weight, second.weight)
    assert alike(quip()(weight, MidRise(3), gram).weight, first.weight)


def test_dead_inputs_zero_columns_and_zero_weights() -> None:
    weight, gram = layer(16, 40)
    gram[7] = gram[:, 7] = 0
    weight[:, 9] = 0
    rounded = quip()(weight, MidRise(4), gram).weight
    typical = weight.square().mean(0).sqrt().median()
    assert float(rounded[:, 9].abs().max()) < 0.1 * float(typical)
    assert float((rounded - weight)[:, :7].norm() / weight[:, :7].norm()) < 0.2
    weight[:, 7] *= 100  # of an input that is always zero: no other weight may notice
    assert alike(quip()(weight, MidRise(4), gram).weight, rounded)
    assert float(quip()(torch.zeros(16, 40), MidRise(4), gram).weight.abs().max()) < 1e-4
    weight, _ = layer(16, 40)
    nothing = quip()(weight, MidRise(4), torch.zeros(40, 40)).weight  # an expert without tokens
    assert float((nothing - weight).norm() / weight.norm()) < 0.3


def test_grid_ends_at_rho_times_the_root_mean_square() -> None:
    weight, _ = layer(16, 40)
    grid = MidRise(3, rho=2.0).fit(weight)
    levels = grid.decode(torch.arange(8).view(1, 8))
    rms = float(weight.square().mean().sqrt())
    torch.testing.assert_close(levels[0], 2 * rms * torch.linspace(-1, 1, 8), rtol=1e-3, atol=1e-6)
    distances = (grid.snap(weight)[..., None] - levels[0]).abs().amin(-1)
    assert not distances.any()
    nearest = (weight[..., None] - levels[0]).abs().amin(-1)
    torch.testing.assert_close((grid.snap(weight) - weight).abs(), nearest)
    packed = Nearest()(weight, MidRise(3)).packed
    assert isinstance(packed, PackedMidRise)


@pytest.mark.parametrize("options", [{}, {"transform": "hadamard"}, {"greedy_passes": 2}])
@torch.no_grad()
def test_logits_stay_closer_than_with_rounding_to_nearest(
    small_llama: Callable[..., Network], context: Callable[..., Context], options: dict[str, Any]
) -> None:
    def error(method: Method) -> float:
        network = small_llama()
        tokens = torch.randint(96, (40, 16), generator=torch.Generator().manual_seed(1))
        ctx = context(network, Budget(bits=3, group_size=32), tokens)
        expected = network.logits(ctx.scoring)
        quantized = method.quantize(ctx)
        for name, packed in quantized.packed.items():
            torch.testing.assert_close(network.weight(name), packed.dequantize())
        assert set(quantized.packed) == set(network.linears)
        return float((network.logits(ctx.scoring) - expected).square().mean())

    assert error(QuIP(**options)) < error(RTN())


def test_seeds_come_from_the_generator_of_the_context(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    def seeds(skip: int) -> Tensor:
        ctx = context(small_llama(num_hidden_layers=1), Budget(bits=3))
        torch.rand(skip, generator=ctx.generator)
        packed = QuIP().quantize(ctx).packed.values()
        return torch.cat([p.seeds for p in packed])  # type: ignore[arg-type]

    first = seeds(0)
    assert torch.equal(seeds(0), first)
    assert not torch.equal(seeds(1), first)
    assert len(first.unique()) == len(first) == 14


@pytest.mark.parametrize(
    "options", [{"transform": "hadamard"}, {"rho": 2.0}, {"damping": 1.0}, {"greedy_passes": 1}], ids=str
)
def test_options_are_those_of_the_parts(
    small_llama: Callable[..., Network], context: Callable[..., Context], options: dict[str, Any]
) -> None:
    name = small_llama(num_hidden_layers=1).linears[0]
    tokens = torch.randint(96, (40, 16), generator=torch.Generator().manual_seed(1))

    def first(method: Method) -> Tensor:
        ctx = context(small_llama(num_hidden_layers=1), Budget(bits=3), tokens)
        return method.quantize(ctx).packed[name].dequantize()

    network = small_llama(num_hidden_layers=1)
    ctx = context(network, Budget(bits=3), tokens)
    values = {"transform": "kronecker", "rho": 2.4, "damping": 0.01, "greedy_passes": 0} | options
    rounding = quip(0, LDLQ(0, values["greedy_passes"]), transform=values["transform"], damping=values["damping"])
    rounding.generator.set_state(ctx.generator.get_state())
    gram = context(network, Budget(bits=3), tokens).statistics(Stat.GRAM, name)
    expected = rounding(network.weight(name), MidRise(3, values["rho"]), gram).weight
    assert alike(first(QuIP(**options)), expected)
    assert not alike(first(QuIP()), expected)


@pytest.mark.parametrize(
    "options", [{"transform": "fourier"}, {"rho": 0.0}, {"damping": -1.0}, {"greedy_passes": -1}], ids=str
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        QuIP(**options)


def test_needs_a_width_and_the_gram_matrix(small_llama: Callable[..., Network]) -> None:
    assert "uniform" in (QuIP().supports(small_llama(), Budget(effective_bits=3.0)) or "")
    with pytest.raises(ValueError, match="Gram"):
        quip()(torch.zeros(2, 4), MidRise(2))
    assert random_orthogonal("identity", 4, 0)(torch.ones(4)).sum() == 4
