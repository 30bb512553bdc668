import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Rprop

from kernels.activations import ExceptOutliers, TokenScale, integers
from kernels.linear import Inputs
from kernels.packed import Packed, PackedDense
from methods.base import Context
from methods.network import Block, Group, Network
from methods.reconstruction import Loop, Parameters, Student, learn_blocks, rounded_inputs, straight_through

WIDTH, SEQUENCES, LENGTH = 6, 12, 5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


class Toy(nn.Module):
    """Two linears in a row: what a block should learn has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def logits(self) -> Tensor:
        raise AssertionError("no head")


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.fixture
def toy() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Toy()
    forward = model.forward
    model.forward = lambda **inputs: Answer(forward(**inputs))  # type: ignore[method-assign]
    names = [f"layers.{i}" for i in range(2)]
    return Network(model, tuple(Block(n, (Group((f"{n}.linear",), None, f"{n}.linear"),)) for n in names))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(96, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


class Rows(Student):
    """Learns a factor for every row of a coarse weight."""

    def __init__(
        self,
        network: Network,
        block: Block,
        coarse: Callable[[Tensor], Tensor] = torch.sign,
        inputs: dict[str, Inputs] | None = None,
        start: float = 1.0,
    ) -> None:
        self.network, self.name = network, block.groups[0].name
        self.coarse = coarse(network.weight(self.name))
        self.factor = torch.full((WIDTH, 1), start, requires_grad=True)
        self.inputs = inputs or {}
        self.steps = 0

    def parameters(self) -> Parameters:
        return [{"params": [self.factor]}]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{self.name}.weight": self.factor * self.coarse}

    def project(self) -> None:
        self.steps += 1

    def finish(self) -> dict[str, Packed]:
        rounded = self.factor * self.coarse
        self.network.overwrite(self.name, rounded)
        return {self.name: PackedDense(rounded.half())}


def best_rows(coarse: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Least squares, row by row: what factor times (coarse x) is nearest to the target."""
    y = x @ coarse.T
    return ((y * target).sum(0) / y.square().sum(0)).unsqueeze(1) * coarse


ROUND = {
    "none": lambda x: x,
    "token": TokenScale(integers(3)),
    "outliers": ExceptOutliers(TokenScale(integers(3)), 2.0),
}


@pytest.mark.parametrize("rounding", ROUND)
@pytest.mark.parametrize("teacher", ["full", "same", "both"])
def test_every_block_finds_the_least_squares_solution_for_its_own_inputs(
    toy: Network, context: Callable[..., Context], tokens: Tensor, teacher: str, rounding: str
) -> None:
    first, second = (toy.weight(name) for name in toy.linears)
    ctx = context(toy, tokens=tokens, statistics=False)
    round_input = ROUND[rounding]

    def student(block: Block) -> Student:
        inputs = {} if rounding == "none" else {block.groups[0].name: round_input}
        assert torch.equal(toy.weight(toy.linears[1]), second)  # nobody touches a block before its turn
        assert torch.equal(toy.weight(toy.linears[0]), first) == (block.name == "layers.0")
        return Rows(toy, block, inputs=inputs)

    options = {"full": {}, "same": {"full_inputs": True}, "both": {"both_inputs": True}}[teacher]
    packed = learn_blocks(ctx, student, Rprop, Loop(200, SEQUENCES), **options)

    full = toy.model.embedding(tokens).flatten(0, 1).detach()
    quantized = round_input(full)
    expected_first = best_rows(first.sign(), quantized, full @ first.T)
    torch.testing.assert_close(toy.weight(toy.linears[0]), expected_first, atol=1e-4, rtol=1e-4)

    student_input = full @ first.T if teacher == "same" else quantized @ toy.weight(toy.linears[0]).T
    said = dict.fromkeys(("full", "same"), full @ first.T @ second.T)
    said["both"] = (said["full"] + student_input @ second.T) / 2
    expected = best_rows(second.sign(), round_input(student_input), said[teacher])
    torch.testing.assert_close(toy.weight(toy.linears[1]), expected, atol=1e-4, rtol=1e-3)
    assert list(packed) == list(toy.linears)


class Faithful(Student):
    """Learns a factor of every weight of a block; at 1 nothing differs from the teacher."""

    def __init__(self, network: Network, block: Block) -> None:
        self.network, self.names = network, [n for g in block.groups for n in g.linears]
        self.factor = torch.ones(len(self.names), requires_grad=True)

    def parameters(self) -> Parameters:
        return [{"params": [self.factor]}]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{n}.weight": f * self.network.weight(n) for n, f in zip(self.names, self.factor, strict=True)}

    def finish(self) -> dict[str, Packed]:
        assert torch.equal(self.factor, torch.ones_like(self.factor))
        return {name: PackedDense(self.network.weight(name).half()) for name in self.names}


def test_a_student_that_rounds_nothing_has_nothing_to_learn(
    small_llama: Callable[..., Network], context: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    network = small_llama()
    required = [p.requires_grad for p in network.model.parameters()]
    with caplog.at_level(logging.INFO, "methods.reconstruction"):
        packed = learn_blocks(context(network), partial(Faithful, network), partial(SGD, lr=1.0), Loop(3, 4))
    assert [record.args[1:] for record in caplog.records] == [(0.0, 0.0)] * len(network.blocks)  # type: ignore[index]
    assert set(packed) == set(network.linears)
    assert [p.requires_grad for p in network.model.parameters()] == required


def learned(toy: Network, ctx: Context, loop: Loop, lr: float, **options: Any) -> Rows:
    """The student of the first block after gradient descent. The network's weight is put back."""
    students: list[Rows] = []

    def student(block: Block) -> Student:
        students.append(Rows(toy, block, **options))
        return students[-1]

    weight = toy.weight(toy.linears[0])
    ctx.network = Network(toy.model, toy.blocks[:1])
    learn_blocks(ctx, student, partial(SGD, lr=lr), loop)
    toy.overwrite(toy.linears[0], weight)
    return students[0]


def test_keep_best_never_ends_above_where_it_began(
    toy: Network, context: Callable[..., Context], tokens: Tensor
) -> None:
    ctx = context(toy, tokens=tokens, statistics=False)
    distance = {}
    for best in (True, False):
        student = learned(toy, ctx, Loop(5, 1, keep_best=best), lr=60.0, coarse=torch.clone, start=1.1)
        distance[best] = (student.factor - 1).abs().max().item()
    assert distance[True] <= 0.1 + 1e-6  # where it began
    assert distance[False] > 1  # the rate is far too high


def test_keep_best_takes_the_end_where_that_is_best(
    toy: Network, context: Callable[..., Context], tokens: Tensor
) -> None:
    """The least minibatch loss that the loop sees is that before the last step."""
    ctx = context(toy, tokens=tokens, statistics=False)
    best, last = (
        learned(toy, ctx, Loop(3, SEQUENCES, keep_best=best), lr=1.0, coarse=torch.clone, start=2.0).factor
        for best in (True, False)
    )
    assert torch.equal(best, last)
    assert (best < 2).all()


def test_a_lucky_batch_does_not_decide(context: Callable[..., Context], toy: Network) -> None:
    """One sequence is of zeros, on which any factor has the least loss there is, at a time left to chance."""
    with torch.no_grad():
        toy.model.embedding.weight[0] = 0
    tokens = torch.randint(1, 96, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    tokens[0] = 0
    ctx = context(toy, tokens=tokens, statistics=False)
    student = learned(toy, ctx, Loop(60, 1, keep_best=True), lr=3.0, coarse=torch.clone, start=2.0)
    assert (student.factor - 1).abs().max() < 0.2  # the sequence came up among the first four


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_counts_steps_without_improvement(
    toy: Network, context: Callable[..., Context], tokens: Tensor, patience: int
) -> None:
    ctx = context(toy, tokens=tokens[:1].repeat(SEQUENCES, 1), statistics=False)  # every batch is the same
    still = learned(toy, ctx, Loop(50, 4, patience=patience), lr=0.0)
    assert still.steps == patience
    moving = learned(toy, ctx, Loop(10, SEQUENCES, patience=patience), lr=0.1, coarse=torch.clone, start=1.5)
    assert moving.steps == 10


def test_the_schedule_multiplies_the_learning_rates(
    toy: Network, context: Callable[..., Context], tokens: Tensor
) -> None:
    rates: list[float] = []

    class Recorder(SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])

    ctx = context(toy, tokens=tokens, statistics=False)
    learn_blocks(ctx, partial(Rows, toy), partial(Recorder, lr=0.5), Loop(4), schedule=lambda done: 1 - done)
    assert rates == [0.5, 0.375, 0.25, 0.125] * 2


def test_all_sequences_are_seen_before_one_is_seen_again(
    toy: Network, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    tokens = torch.arange(7).unsqueeze(1).expand(7, LENGTH).contiguous()  # a sequence is one token, repeated
    lookup = toy.model.embedding.weight.detach()

    def spy(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.extend(int((lookup - x[0]).abs().sum(1).argmin()) for x in args[0])

    toy.module("layers.0").register_forward_pre_hook(spy)
    learned(toy, context(toy, tokens=tokens, statistics=False), Loop(6, 3), lr=0.0)
    epochs = [seen[i : i + 6] for i in range(0, 18, 6)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)  # 7 sequences: the seventh is left out
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_where_gradients_would_underflow(
    toy: Network, context: Callable[..., Context], tokens: Tensor, dtype: torch.dtype
) -> None:
    with torch.no_grad():
        toy.model.embedding.weight.mul_(1e-3)
    toy.model.to(dtype)
    ctx = context(toy, tokens=tokens, statistics=False)
    students: list[Rows] = []

    def student(block: Block) -> Student:
        students.append(Rows(toy, block, coarse=torch.clone, start=1.5))
        return students[-1]

    learn_blocks(ctx, student, partial(Adam, lr=0.02, eps=1e-20), Loop(80, SEQUENCES))
    assert (students[0].factor - 1).abs().max() < 0.05


def test_autocast_learns_in_bfloat16(toy: Network, context: Callable[..., Context], tokens: Tensor) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()
    toy.linear(toy.linears[0]).register_forward_hook(lambda m, a, y: seen.add((torch.is_grad_enabled(), y.dtype)))
    ctx = context(toy, tokens=tokens, statistics=False)
    student = learned(toy, ctx, Loop(40, SEQUENCES, bf16=True), lr=1.0, coarse=torch.clone, start=1.5)
    assert (True, torch.bfloat16) in seen
    assert (True, torch.float32) not in seen
    assert student.factor.dtype == torch.float32
    assert (student.factor - 1).abs().max() < 0.05


def test_what_is_not_finite_is_refused(toy: Network, context: Callable[..., Context], tokens: Tensor) -> None:
    ctx = context(toy, tokens=tokens, statistics=False)
    with pytest.raises(FloatingPointError, match=r"layers\.0 .*learning rate"):
        learned(toy, ctx, Loop(30, 4), lr=1e30, start=2.0)
    with pytest.raises(FloatingPointError, match=r"layers\.0 .*learning rate"):  # though the start would do
        learned(toy, ctx, Loop(30, 4, keep_best=True), lr=1e30, start=2.0)
    with pytest.raises(FloatingPointError, match=r"layers\.0 .*learning rate"):  # found after the last step
        learned(toy, ctx, Loop(1, 4), lr=1e38, start=2.0)
    with pytest.raises(ValueError, match="patience"):
        Loop(1, 1, -1)


@pytest.mark.parametrize("rounding", ["token", "outliers"])
def test_rounded_inputs_round_as_the_evaluation_does(toy: Network, rounding: str) -> None:
    x = 2 * torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(3))
    linear = toy.linear(toy.linears[0])
    with rounded_inputs(toy, {toy.linears[0]: ROUND[rounding]}):
        inside = linear(x)
    assert torch.equal(inside, linear(ROUND[rounding](x)))
    assert torch.equal(linear(x), x @ linear.weight.T)


def test_gradients_pass_through_the_rounding_and_its_scale(toy: Network) -> None:
    """With r the whole number that x / Δ becomes, held still as a difference to x / Δ: d(Δ r) = dx + (r − x/Δ) dΔ."""
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
    upstream = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(5))
    with rounded_inputs(toy, {toy.linears[0]: TokenScale(integers(3))}):
        ((toy.linear(toy.linears[0])(x)) * upstream).sum().backward()
    by_input = upstream @ toy.weight(toy.linears[0])
    largest, at = x.detach().abs().max(1, keepdim=True)
    step = largest / 3
    residual = torch.round(x.detach() / step) - x.detach() / step
    expected = by_input.clone()
    expected.scatter_add_(1, at, (by_input * residual).sum(1, keepdim=True) * x.detach().gather(1, at).sign() / 3)
    torch.testing.assert_close(x.grad, expected)


def test_whole_numbers_forward_and_the_identity_backward() -> None:
    x = torch.tensor([-1.5, -0.4, 0.5, 2.6], requires_grad=True)
    y = straight_through(x, torch.round(x))
    assert y.tolist() == [-2, 0, 0, 3]
    y.backward(torch.arange(4.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 2, 3]
