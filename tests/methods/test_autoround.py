from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from kernels.packed import PackedInteger
from methods.autoround import AutoRound, SignSGD
from methods.base import Budget, Context, Quantized
from methods.formats.integer import Integer
from methods.gptq import GPTQ
from methods.learned_clipping import LearnedInteger, ranges
from methods.network import Block, Group, Network
from methods.reconstruction import straight_through
from methods.rounding.nearest import round_to_nearest
from methods.rtn import RTN
from methods.stream import BlockStream

BUDGETS = [
    Budget(bits=2, group_size=32),
    Budget(bits=3, group_size=40),  # the last group of a row is shorter
    Budget(bits=4, group_size=0),
    Budget(bits=3, group_size=32, symmetric=True),
]


def buffers(quantized: Quantized) -> dict[str, Tensor]:
    return {f"{n}.{key}": value for n, p in quantized.packed.items() for key, value in p.named_buffers()}


def codes(quantized: Quantized, name: str) -> Tensor:
    packed = quantized.packed[name]
    assert isinstance(packed, PackedInteger)
    return packed.unpacked_codes().int()


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_without_steps_it_rounds_to_nearest(
    small_llama: Callable[..., Network], context: Callable[..., Context], budget: Budget
) -> None:
    networks = small_llama(), small_llama()
    for network in networks:
        network.overwrite(network.linears[0], network.weight(network.linears[0]).index_fill(0, torch.arange(3), 0))
    ours = AutoRound(iters=0).quantize(context(networks[0], budget))
    nearest = RTN().quantize(context(networks[1], budget))
    expected = buffers(nearest)
    assert set(buffers(ours)) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in buffers(ours).items())


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_offsets_move_codes_by_one_at_most_and_nothing_else(
    small_llama: Callable[..., Network], context: Callable[..., Context], budget: Budget
) -> None:
    network = small_llama()
    weights = {name: network.weight(name) for name in network.linears}
    quantized = AutoRound(iters=30, lr=0.1, tune_ranges=False).quantize(context(network, budget))
    moved = 0
    for name, weight in weights.items():
        nearest, packed = round_to_nearest(weight, budget.format()).packed, quantized.packed[name]
        assert isinstance(nearest, PackedInteger)
        change = codes(quantized, name) - nearest.unpacked_codes().int()
        assert change.abs().max() <= 1
        moved += int(change.abs().sum())
        assert torch.equal(packed.scale, nearest.scale)
        assert torch.equal(packed.unpacked_zero(), nearest.unpacked_zero())
        assert torch.equal(packed.dequantize(), network.weight(name))
    assert moved > 100


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_what_is_learned_is_what_is_stored(budget: Budget) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 96, generator=generator) * torch.logspace(-4, 1, 20).unsqueeze(1)
    integers = LearnedInteger(budget.format(), 96)
    groups = integers.groups(weight)
    low, high = (end * torch.rand(end.shape, generator=generator) for end in ranges(groups))
    low[0], high[0] = 0, 0  # a range of which nothing is left
    offset = torch.rand(groups.shape, generator=generator) - 0.5
    packed = integers.pack(groups, low, high, offset)
    assert torch.equal(integers.rounded(groups, low, high, offset), packed.dequantize())
    assert packed.stored_bits() == budget.format().stored_bits((20, 96))


@pytest.mark.parametrize("symmetric", [False, True])
def test_derivatives_are_those_of_the_formula_with_straight_through_rounding(symmetric: bool) -> None:
    """The paper's equation, differentiated by autograd step by step."""
    fmt = Integer(3, 16, symmetric)
    generator = torch.Generator().manual_seed(1)
    integers = LearnedInteger(fmt, 40)
    groups = integers.groups(torch.randn(6, 40, generator=generator)).requires_grad_()
    low, high = ranges(groups.detach() * 0.7)  # something is clamped on either side
    offset = torch.rand(groups.shape, generator=generator) - 0.5
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (groups, low, high, offset)]
    upstream = torch.randn(6, 40, generator=generator)

    def nearest(x: Tensor) -> Tensor:
        return straight_through(x, torch.round(x))

    def formula(w: Tensor, low: Tensor, high: Tensor, v: Tensor) -> Tensor:
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = (high - low) / 7
        scale = straight_through(scale, scale.half().float()).unsqueeze(-1)
        zero = torch.tensor(4.0) if symmetric else nearest(-low.unsqueeze(-1) / scale)
        code = (nearest(w / scale + v) + zero).clamp(0, 7)
        return ((code - zero) * scale).flatten(1)[:, :40]

    expected = formula(*leaves)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    ours = integers.rounded(*leaves)
    assert torch.equal(ours, expected)
    for got, want in zip(torch.autograd.grad((ours * upstream).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert want.abs().sum() > 0


def test_signed_gradient_descent_moves_by_the_rate() -> None:
    x, idle = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = SignSGD([{"params": [x, idle]}], lr=0.25)
    (x * torch.tensor([-9.0, 0.0, 1e-6])).sum().backward()
    optimizer.step()
    assert x.tolist() == [1.25, 2.0, 2.75]
    assert idle.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("method", "bits", "rate"),
    [
        (AutoRound(iters=2), 4, 1 / 2),
        (AutoRound(iters=2), 2, 1 / 2),
        (AutoRound(iters=1000), 3, 2 / 1000),
        (AutoRound(iters=1000), 4, 1 / 1000),
        (AutoRound(iters=1000, lr=0.3), 3, 0.3),
    ],
)
def test_the_official_rates(
    small_llama: Callable[..., Network],
    context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    method: AutoRound,
    bits: int,
    rate: float,
) -> None:
    class EnoughError(Exception): ...

    def step(optimizer: SignSGD) -> None:
        assert optimizer.param_groups[0]["lr"] == rate
        raise EnoughError

    monkeypatch.setattr(SignSGD, "step", step)
    with pytest.raises(EnoughError):
        method.quantize(context(small_llama(), Budget(bits=bits, group_size=32)))


def block_errors(network: Network, original: Network, tokens: Tensor) -> list[float]:
    """Mean squared error of what each block makes of the quantized blocks' outputs, against full precision."""
    full, quantized, errors = BlockStream(original, tokens), BlockStream(network, tokens), []
    for index in range(len(network.blocks)):
        full.inputs, quantized.inputs = full.run(index), quantized.run(index)
        errors.append(float((torch.cat(full.inputs) - torch.cat(quantized.inputs)).square().mean()))
    return errors


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(96, (24, 16), generator=torch.Generator().manual_seed(5))


def test_outputs_come_closer_than_those_of_nearest_and_of_gptq(
    small_llama: Callable[..., Network], context: Callable[..., Context], tokens: Tensor
) -> None:
    errors = {}
    for method in (RTN(), GPTQ(), AutoRound(iters=40)):
        network = small_llama()
        method.quantize(context(network, Budget(bits=2, group_size=32), tokens, statistics=False))
        errors[method.name] = block_errors(network, small_llama(), tokens)
    for nearest, gptq, ours in zip(errors["rtn"], errors["gptq"], errors["autoround"], strict=True):
        assert ours < 0.5 * nearest
        assert ours < gptq


@pytest.mark.parametrize("rate", [0.0001, 1.0])
def test_the_first_block_never_ends_above_nearest(
    small_llama: Callable[..., Network], context: Callable[..., Context], tokens: Tensor, rate: float
) -> None:
    """Not even at a rate that throws offsets from end to end, on batches of one sequence."""
    networks = small_llama(), small_llama()
    budget = Budget(bits=4, group_size=32)
    AutoRound(iters=5, batch=1, lr=rate).quantize(context(networks[0], budget, tokens, statistics=False))
    RTN().quantize(context(networks[1], budget))
    ours, nearest = (block_errors(network, small_llama(), tokens)[0] for network in networks)
    assert ours <= nearest * (1 + 1e-5)


def test_the_generator_decides_alone(
    small_llama: Callable[..., Network], context: Callable[..., Context], tokens: Tensor
) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        ctx = context(small_llama(), Budget(bits=3, group_size=32), tokens, statistics=False)
        ctx.generator.manual_seed(seed)
        torch.manual_seed(torch.seed())
        return buffers(AutoRound(iters=10, batch=4).quantize(ctx))

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


class Single(nn.Module):
    """A block that is one linear."""

    def __init__(self, columns: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, out, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


class Chain(nn.Module):
    def __init__(self, table: Tensor, out: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList([Single(table.shape[1], out)])

    def forward(self, input_ids: Tensor, use_cache: bool) -> nn.Module:
        self.logits = self.layers[0](self.embedding(input_ids))
        return self


def test_it_finds_most_of_what_an_exhaustive_search_finds(context: Callable[..., Context]) -> None:
    """All 2⁸ ways to round a row up or down, for inputs so correlated that nearest is far from the best."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(96, 8, generator=generator) @ (torch.ones(8, 8) + 0.7 * torch.randn(8, 8, generator=generator))
    model = Chain(table, out=16)
    network = Network(model, (Block("layers.0", (Group(("layers.0.linear",), None, "layers.0.linear"),)),))
    weight = torch.randn(16, 8, generator=generator)
    network.overwrite("layers.0.linear", weight)
    ctx = context(network, Budget(bits=3, group_size=0), torch.arange(96).view(12, 8), statistics=False)
    AutoRound(iters=200, tune_ranges=False).quantize(ctx)

    def error(rounded: Tensor) -> Tensor:
        return ((rounded - weight) @ table.T).square().sum(-1)

    scale, zero = Integer(3).scale_and_zero(weight)
    floor = torch.floor(weight / scale.unsqueeze(1)) + zero.unsqueeze(1)
    choices = torch.tensor(list(product([0.0, 1.0], repeat=8)))
    every = ((floor + choices.unsqueeze(1)).clamp(0, 7) - zero.unsqueeze(1)) * scale.unsqueeze(1)  # [choices, out, in]
    best = error(every).amin(0).sum()
    nearest = error(round_to_nearest(weight, Integer(3)).weight).sum()
    ours = error(network.weight("layers.0.linear")).sum()
    assert best * (1 - 1e-4) <= ours
    assert ours - best < 0.35 * (nearest - best)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        AutoRound(lr=0.0)
    with pytest.raises(ValueError, match="steps"):
        AutoRound(iters=-1)
