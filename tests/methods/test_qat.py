"""Straight-through gradients, what is trained is what is stored, plans, order and rate of the steps."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from harness.accounting import packed_copy
from methods.base import Budget, Context, Quantized
from methods.formats.base import Format
from methods.formats.dense import Dense
from methods.formats.floats import MX
from methods.formats.integer import Integer
from methods.formats.registry import named_format
from methods.mixed import Mixed
from methods.network import Network
from methods.qat import QAT
from methods.rtn import RTN
from methods.transforms import qat
from methods.transforms.base import TRANSFORMS
from methods.transforms.qat import FakeQuantized, FineTuned

Build = Callable[..., Context]
BUDGET = Budget(bits=2, group_size=32)
FORMATS: list[Format] = [Integer(2, 32), Integer(3, 20, symmetric=True), MX(), Dense()]


@pytest.fixture
def network(small_llama: Callable[..., Network]) -> Network:
    return small_llama()


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> list[FakeQuantized]:
    """Those that training makes."""
    made: list[FakeQuantized] = []

    class Seen(FakeQuantized):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(qat, "FakeQuantized", Seen)
    return made


@pytest.fixture
def brief() -> Iterator[None]:
    """`transform=qat` takes five steps."""

    @dataclass(frozen=True)
    class Brief(FineTuned):
        steps: int = 5

    TRANSFORMS["qat"] = Brief
    yield
    TRANSFORMS["qat"] = FineTuned


def rounded_copy(network: Network, plan: dict[str, Format]) -> Network:
    """A network that holds the grid points nearest to the weights of another."""
    model = copy.deepcopy(network.model).requires_grad_(True)
    other = Network(model, network.blocks)
    for name, fmt in plan.items():
        other.overwrite(name, fmt.fit(network.weight(name)).snap(network.weight(name)))
    return other


def divergence(network: Network, teacher: Network, tokens: Tensor) -> Tensor:
    """KL(teacher ‖ network) in nats a token, term by term."""
    p, q = (n.logits(tokens).double().softmax(-1) for n in (teacher, network))
    return (p.detach() * (p.detach().log() - q.log())).sum(-1).mean()


def likelihood(network: Network, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, one by one."""
    q = network.logits(tokens).double().softmax(-1)
    said = [q[row, i, tokens[row, i + 1]] for row in range(len(tokens)) for i in range(tokens.shape[1] - 1)]
    return -torch.stack(said).log().mean()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_loss_and_gradients_are_those_of_a_network_that_holds_the_grid_points(
    network: Network, context: Build, fmt: Format, share: float
) -> None:
    tokens, plan = context(network, statistics=False).tokens[:3], dict.fromkeys(network.linears, fmt)
    student, rounded = FakeQuantized(network, plan), rounded_copy(network, plan)
    loss = student.loss(tokens, share)
    expected = share * divergence(rounded, network, tokens) + (1 - share) * likelihood(rounded, tokens)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    loss.backward()
    expected.backward()
    for name, weight in student.latent.items():
        gradient = rounded.linear(name).weight.grad
        assert gradient is not None
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["", "mxfp4", "nf4"])
def test_what_is_stored_is_what_was_trained(
    network: Network, context: Build, students: list[FakeQuantized], dtype: torch.dtype, fmt: str
) -> None:
    original = Network(copy.deepcopy(network.model.to(dtype)), network.blocks)
    ctx = context(network, Budget(bits=4, group_size=20), statistics=False)
    chosen = named_format(fmt) if fmt else Integer(4, 20)
    with torch.no_grad():
        done = QAT(steps=4, format=fmt).quantize(ctx)
        (student,) = students
        trained = student.weights()
        for name, packed in done.packed.items():
            assert torch.equal(packed.dequantize().to(dtype), trained[f"{name}.weight"])
            assert torch.equal(network.weight(name), trained[f"{name}.weight"].float())
            assert packed.stored_bits() == chosen.stored_bits(packed.shape)
            assert not torch.equal(packed.dequantize(), chosen.fit(original.weight(name)).snap(original.weight(name)))
        logits = functional_call(original.model, trained, kwargs={"input_ids": ctx.scoring}).logits
        assert logits.dtype == dtype
        assert torch.equal(Network(packed_copy(original, done), ()).logits(ctx.scoring), logits)


def test_stored_are_points_of_a_grid_fitted_as_ever(network: Network, context: Build) -> None:
    done = QAT(steps=3).quantize(context(network, BUDGET, statistics=False))
    for packed in done.packed.values():
        assert packed.stored_bits() == BUDGET.format().stored_bits(packed.shape)
        for row in packed.dequantize():
            assert all(len(group.unique()) <= 4 for group in row.split(32))
    assert not done.parameters and not done.inputs and not done.input_scale


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_loss_on_the_calibration_text_falls(
    small_llama: Callable[..., Network], context: Build, share: float
) -> None:
    original = small_llama()
    tokens = context(original, statistics=False).tokens

    def after(method: QAT | RTN) -> float:
        done = method.quantize(context(small_llama(), BUDGET, statistics=False))
        student = Network(packed_copy(original, done), ())
        with torch.no_grad():
            return float(divergence(student, original, tokens) if share else likelihood(student, tokens))

    assert after(QAT(steps=40, lr=3e-3, batch=5, distillation=share)) < 0.9 * after(RTN())


def test_no_steps_are_rounding_to_nearest_and_draw_nothing(small_llama: Callable[..., Network], context: Build) -> None:
    ctx = context(small_llama(), BUDGET, statistics=False)
    before = ctx.generator.get_state()
    trained, nearest = QAT(steps=0).quantize(ctx), RTN().quantize(context(small_llama(), BUDGET, statistics=False))
    assert torch.equal(ctx.generator.get_state(), before)
    for name, packed in nearest.packed.items():
        assert torch.equal(trained.packed[name].dequantize(), packed.dequantize())


def mixed(ctx: Context, transform: str) -> Quantized:
    with torch.no_grad():
        return Mixed(bits=(2, 3, 16), metric="output_mse", transform=transform).quantize(ctx)


@pytest.mark.usefixtures("brief")
def test_a_mixed_plan_stays_and_all_its_weights_are_trained(
    small_llama: Callable[..., Network], context: Build
) -> None:
    budget = Budget(effective_bits=6.0, group_size=32)
    plain, trained = (mixed(context(small_llama(), budget), transform) for transform in ("none", "qat"))
    widths = {name: packed.bits for name, packed in plain.packed.items()}
    assert len(set(widths.values())) > 1
    for name, packed in trained.packed.items():
        assert (packed.bits, packed.stored_bits()) == (widths[name], plain.packed[name].stored_bits())
        assert not torch.equal(packed.dequantize(), plain.packed[name].dequantize())


def test_only_the_generator_decides(small_llama: Callable[..., Network], context: Build) -> None:
    def trained(seed: int) -> Tensor:
        ctx = replace(context(small_llama(), BUDGET, statistics=False), generator=torch.Generator().manual_seed(seed))
        done = QAT(steps=7, batch=3).quantize(ctx)
        return torch.cat([packed.dequantize().flatten() for packed in done.packed.values()])

    state = torch.get_rng_state()
    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_sequence_comes_before_any_comes_again(
    network: Network, context: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, seen = context(network, BUDGET, statistics=False), []
    places = {tuple(tokens.tolist()): index for index, tokens in enumerate(ctx.tokens)}
    loss = FakeQuantized.loss

    def watched(student: FakeQuantized, tokens: Tensor, share: float) -> Tensor:
        seen.append([places[tuple(sequence.tolist())] for sequence in tokens])
        return loss(student, tokens, share)

    monkeypatch.setattr(FakeQuantized, "loss", watched)
    QAT(steps=9, batch=3).quantize(ctx)
    assert [len(batch) for batch in seen] == [3] * 9
    order = [place for batch in seen for place in batch]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert len(set(order[20:])) == 7
    assert order[:10] != order[10:20]


def test_the_rate_falls_with_the_cosine(network: Network, context: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    class Watched(torch.optim.Adam):
        def step(self, *args: Any, **options: Any) -> Any:
            rates.extend(group["lr"] for group in self.param_groups)
            assert all(group["weight_decay"] == 0 for group in self.param_groups)
            return super().step(*args, **options)

    monkeypatch.setattr(qat, "Adam", Watched)
    QAT(steps=8, lr=0.02).quantize(context(network, BUDGET, statistics=False))
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_everything_else_is_left_as_it_was(network: Network, context: Build) -> None:
    network.model.train()
    others = {f"{name}.weight" for name in network.linears}
    before = {key: value.clone() for key, value in network.model.state_dict().items() if key not in others}
    with torch.no_grad():  # as the harness calls methods
        QAT(steps=2).quantize(context(network, BUDGET, statistics=False))
    assert network.model.training
    assert all(p.requires_grad and p.grad is None for p in network.model.parameters())
    after = network.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_bad_numbers_are_refused(network: Network, context: Build) -> None:
    for options in ({"steps": -1}, {"lr": 0.0}, {"lr": math.nan}, {"batch": 0}, {"distillation": 1.1}):
        with pytest.raises(ValueError, match="QAT cannot train"):
            QAT(**options)  # type: ignore[arg-type]
    with torch.no_grad():
        network.model.get_parameter("model.embed_tokens.weight").fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="in step 0"):
        QAT().quantize(context(network, BUDGET, statistics=False))
