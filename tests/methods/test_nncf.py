from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from methods.base import Context, Stat
from methods.formats.integer import Integer
from methods.network import Block, Group, Network
from methods.sensitivity.base import METRICS, Subject
from methods.sensitivity.nncf import EPSILON

NAMES = ("nncf_weight_error", "nncf_hessian", "nncf_mean_variance", "nncf_max_variance", "nncf_mean_magnitude")
FORMATS = (Integer(2, 32), Integer(4, 32), Integer(4), Integer(8))

# Rows from 0 to 255 steps of a power of two, so that the INT8 grid is exactly the multiples of the step: what lies
# in between is off by a known share of it.
STEP = torch.tensor([[0.5], [2.0]])
OFFSETS = torch.tensor([[0.0, 0.25, -0.25, 0.125, 0.0], [0.0, 0.25, 0.25, 0.25, 0.0]])
GRID = torch.tensor([[0.0, 7.0, 100.0, 31.0, 255.0], [0.0, 1.0, 2.0, 3.0, 255.0]])
WEIGHT = (GRID + OFFSETS) * STEP
ERRORS = OFFSETS * STEP

INPUTS = torch.tensor([[1.0, 0.0, -2.0, 5.0, 3.0], [3.0, 0.0, 2.0, 5.0, -1.0], [2.0, 0.0, 0.0, 5.0, 1.0]])  # 3 tokens


def network_of(weights: Mapping[str, Tensor]) -> Network:
    layers = {name: nn.Linear(weight.shape[1], weight.shape[0], bias=False) for name, weight in weights.items()}
    network = Network(nn.ModuleDict(layers), (Block("block", tuple(Group((n,), None, n) for n in weights)),))
    for name, weight in weights.items():
        network.overwrite(name, weight)
    return network


def subject_of(network: Network, inputs: Mapping[str, Tensor]) -> Subject:
    """`inputs`: linear name to [tokens, in]."""
    reductions: dict[Stat, Callable[[Tensor], Tensor]] = {
        Stat.MEAN: lambda x: x.mean(0),
        Stat.MEAN_SQUARE: lambda x: x.square().mean(0),
        Stat.MAX_ABS: lambda x: x.abs().amax(0),
    }
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    return Subject(network, tokens, tokens, (), lambda stat, name: reductions[stat](inputs[name]))


def scores(weight: Tensor, inputs: Tensor) -> dict[str, float]:
    subject = subject_of(network_of({"a": weight}), {"a": inputs})
    return {name: METRICS[name]()(subject).values["a"] for name in NAMES}


def test_scores_of_a_layer_made_by_hand() -> None:
    worst = 3 * 0.5**2 / 5  # row 2: three errors of 0.5; its mean square is the larger one
    squares = 0.125**2 + 0.125**2 + 0.0625**2 + 3 * 0.5**2
    variances = [2 / 3, 0.0, 8 / 3, 0.0, 8 / 3]
    assert scores(WEIGHT, INPUTS) == pytest.approx(
        {
            "nncf_weight_error": 1 / (worst + EPSILON),
            "nncf_hessian": 2 * (14 + 0 + 8 + 75 + 11) / 15 * squares**0.5,
            "nncf_mean_variance": sum(variances) / 5 / (worst + EPSILON),
            "nncf_max_variance": 8 / 3 / (worst + EPSILON),
            "nncf_mean_magnitude": (3 + 0 + 2 + 5 + 3) / 5 / (worst + EPSILON),
        },
        rel=1e-5,
    )


def test_the_layer_made_by_hand_has_the_errors_it_claims() -> None:
    fmt = Integer(8)
    torch.testing.assert_close(WEIGHT - fmt.fit(WEIGHT).snap(WEIGHT), ERRORS, atol=0, rtol=0)


def test_inverse_errors_prefer_int8_where_int8_is_good_and_the_hessian_where_it_is_bad() -> None:
    noisy = scores((GRID + 1.5 * OFFSETS) * STEP, INPUTS)
    calm = scores(WEIGHT, INPUTS)
    assert noisy["nncf_hessian"] == pytest.approx(1.5 * calm["nncf_hessian"])
    for name in set(NAMES) - {"nncf_hessian"}:
        assert noisy[name] == pytest.approx(calm[name] / 1.5**2, rel=1e-5)


def test_powers_of_the_input_scale() -> None:
    calm, loud = scores(WEIGHT, INPUTS), scores(WEIGHT, 2 * INPUTS)
    powers = dict(zip(NAMES, (0, 2, 2, 2, 1), strict=True))
    assert loud == pytest.approx({name: calm[name] * 2 ** powers[name] for name in NAMES}, rel=1e-5)


def test_a_weight_that_int8_represents_leaves_epsilon() -> None:
    for weight in (torch.zeros(3, 5), GRID * STEP):
        found = scores(weight, INPUTS)
        assert found["nncf_weight_error"] == pytest.approx(1 / EPSILON)
        assert found["nncf_hessian"] == 0


def test_dead_and_constant_inputs() -> None:
    dead = scores(WEIGHT, torch.zeros(3, 5))
    assert {name for name, score in dead.items() if score} == {"nncf_weight_error"}
    for value in (0.1, 0.3, 0.7, 1.1):  # some squares are rounded up, some down
        constant = scores(WEIGHT, torch.full((3, 5), value))
        assert 0 <= constant["nncf_mean_variance"] <= constant["nncf_max_variance"] < 1e-5
        assert constant["nncf_mean_magnitude"] == pytest.approx(value * constant["nncf_weight_error"])


@pytest.mark.parametrize("name", NAMES)
def test_losses_order_linears_as_the_scores_do(name: str) -> None:
    """At every format, and in what a wider format saves; the weights' own errors must not reorder them."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"l{i}": torch.randn(6, 5, generator=generator) * 4.0 ** (i % 4 - 2) for i in range(9)}
    inputs = {n: torch.randn(4, 5, generator=generator) for n in weights}
    network = network_of(weights)
    metric = METRICS[name]()
    found = metric(subject_of(network, inputs))
    losses = metric.losses(found, network, FORMATS)
    order = sorted(found.values, key=found.values.__getitem__)
    assert order != list(found.values)
    for fmt in FORMATS:
        assert sorted(losses, key=lambda n, f=fmt: losses[n][f]) == order  # type: ignore[misc]
    assert sorted(losses, key=lambda n: losses[n][FORMATS[1]] - losses[n][FORMATS[3]]) == order
    for row in losses.values():
        assert row[FORMATS[0]] > row[FORMATS[1]] == row[FORMATS[2]] > row[FORMATS[3]]


@pytest.mark.parametrize("name", NAMES)
def test_they_declare_what_they_read(name: str, small_llama: Callable[..., Network]) -> None:
    network = small_llama(num_hidden_layers=1)
    asked: set[Stat] = set()

    def statistics(stat: Stat, linear: str) -> Tensor:
        asked.add(stat)
        return torch.ones(network.shape(linear)[1])

    metric = METRICS[name]()
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    found = metric(Subject(network, tokens, tokens, (), statistics))
    assert asked == metric.needs
    assert set(found.values) == set(network.linears)


def test_it_measures_a_real_network(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    ctx = context(small_llama(num_hidden_layers=1))
    subject = Subject(ctx.network, ctx.scoring, ctx.tokens, FORMATS, ctx.statistics)
    found = METRICS["nncf_mean_magnitude"]()(subject)
    for name in ctx.network.linears:
        weight = ctx.network.weight(name)
        error = (Integer(8).fit(weight).snap(weight) - weight).square().mean(1).max()
        expected = float(ctx.statistics(Stat.MAX_ABS, name).mean() / (error + EPSILON))
        assert found.values[name] == pytest.approx(expected, rel=1e-5)
