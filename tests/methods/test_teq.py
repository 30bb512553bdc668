import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import get_scheduler

from methods.base import Budget, Method
from methods.formats.base import Format
from methods.formats.dense import Dense
from methods.formats.floats import MX
from methods.formats.integer import Integer
from methods.network import Block, Group, Network
from methods.rtn import RTN
from methods.sensitivity.hvp import mean_loss
from methods.teq import TEQ
from methods.transforms.base import TRANSFORMS
from methods.transforms.teq import SMALLEST, ScaledNetwork, TEQScales, initial_scale

FORMATS: list[Format] = [Integer(3, 32), Integer(4, 20, symmetric=True), MX()]
BRIEF: dict[str, Any] = {"steps": 20, "lr": 0.02}

Build = Callable[..., Any]


@pytest.fixture
def network(small_llama: Callable[..., Network]) -> Network:
    """One head per value head, so that the output projection has a producer that is a linear."""
    return small_llama(num_key_value_heads=4)


def plan_of(network: Network, fmt: Format) -> dict[str, Format]:
    return dict.fromkeys(network.linears, fmt)


def random_scales(network: Network) -> dict[Group, Tensor]:
    generator = torch.Generator().manual_seed(3)
    widths = {g: network.linear(g.name).in_features for g in network.groups if g.producer}
    return {g: torch.exp(0.3 * torch.randn(width, generator=generator)) for g, width in widths.items()}


def test_folding_leaves_the_function_unchanged(network: Network, context: Build) -> None:
    ctx = context(network)
    original = {name: network.weight(name) for name in network.linears}
    with torch.no_grad():
        before = network.logits(ctx.scoring)
        folds = TRANSFORMS["teq"](**BRIEF)(ctx, plan_of(network, FORMATS[0]))
        after = network.logits(ctx.scoring)
    assert (after - before).norm() < 1e-5 * before.norm()
    assert set(folds.input_scale) == set(network.linears)
    assert all((scale - 1).abs().max() > 0.02 for scale in folds.input_scale.values())
    one = torch.ones(1)
    for name, weight in original.items():
        s, t = folds.input_scale[name], folds.output_scale.get(name, one)
        torch.testing.assert_close(t.unsqueeze(1) * network.weight(name) / s, weight)
    for name, value in folds.parameters.items():
        assert torch.equal(value, network.model.get_parameter(name))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_what_is_trained_is_what_folding_and_rounding_gives(network: Network, context: Build, fmt: Format) -> None:
    """Also where a linear is scaled as a producer by another scale than its own input (MX grids do not scale)."""
    ctx, scales = context(network), random_scales(network)
    student = ScaledNetwork(network, plan_of(network, fmt), scales)
    with torch.no_grad():
        trained = functional_call(network.model, student.weights(), kwargs={"input_ids": ctx.tokens}).logits
        for group, scale in scales.items():
            network.fold(group, scale)
        for name in network.linears:
            network.overwrite(name, fmt.fit(network.weight(name)).snap(network.weight(name)))
        torch.testing.assert_close(network.logits(ctx.tokens), trained, atol=2e-4, rtol=1e-4)
        assert float(student.loss(ctx.tokens[:2])) > 0


def test_no_steps_are_rounding_to_nearest(small_llama: Callable[..., Network], context: Build) -> None:
    network, other = small_llama(), small_llama()
    teq, rtn = TEQ(steps=0).quantize(context(network)), RTN().quantize(context(other))
    for name in network.linears:
        assert torch.equal(teq.packed[name].dequantize(), rtn.packed[name].dequantize())
        assert teq.packed[name].stored_bits() == rtn.packed[name].stored_bits()
    for name, value in teq.parameters.items():
        assert torch.equal(value, other.model.get_parameter(name))


def badly_scaled(network: Network, tokens: Tensor) -> None:
    """Teach a network its text, so that rounding errors cost something, and then scale some inputs of every norm's
    linears down by 8. The function is the same, and there are scales that repair the rounding."""
    optimizer = torch.optim.Adam(network.model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        mean_loss(network, tokens).backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(5)
    for group in network.groups:
        if str(group.producer).endswith("layernorm"):
            scale = torch.ones(64)
            scale[torch.randperm(64, generator=generator)[:8]] = 1 / 8
            network.fold(group, scale)


def test_the_loss_of_the_rounded_network_falls(small_llama: Callable[..., Network], context: Build) -> None:
    network = small_llama()
    tokens = context(network).tokens
    badly_scaled(network, tokens)
    original = copy.deepcopy(network.model.state_dict())

    def loss_after(method: Method | None) -> float:
        network.model.load_state_dict(original)
        with torch.no_grad():
            if method:
                quantized = method.quantize(context(network, Budget(bits=4, group_size=0), tokens))
                network.model.load_state_dict(original)  # what counts is what the result says
                for name, value in quantized.parameters.items():
                    network.model.get_parameter(name).copy_(value)
                for name, packed in quantized.packed.items():
                    network.overwrite(name, packed.dequantize())
            return float(mean_loss(network, tokens))

    exact, nearest, trained = map(loss_after, (None, RTN(), TEQ(steps=100, lr=3e-2)))
    assert trained - exact < 0.75 * (nearest - exact)


def test_linears_without_a_producer_keep_their_weights(small_llama: Callable[..., Network], context: Build) -> None:
    network = small_llama()  # with grouped-query attention, no scale folds into the values
    alone = {name for group in network.groups if group.producer is None for name in group.linears}
    before = {name: network.weight(name) for name in alone}
    folds = TEQScales(**BRIEF)(context(network), plan_of(network, FORMATS[0]))
    assert len(alone) == 2
    assert alone.isdisjoint(folds.input_scale)
    assert all(torch.equal(network.weight(name), weight) for name, weight in before.items())


def test_without_any_producer_nothing_is_trained(small_llama: Callable[..., Network], context: Build) -> None:
    found = small_llama()
    blocks = [Block(b.name, tuple(Group(g.linears, None, g.scope) for g in b.groups)) for b in found.blocks]
    network = Network(found.model, tuple(blocks))
    assert TEQScales()(context(network), plan_of(network, FORMATS[0])).input_scale == {}


def surrogate(
    network: Network, fmt: Format, scales: dict[Group, Tensor]
) -> Callable[[dict[Group, Tensor], Tensor], float]:
    """The loss in fp64 with rounding errors, and what scales rows, fixed at what they are under `scales`."""
    model = copy.deepcopy(network.model).double()
    rows = {str(group.producer): scale for group, scale in scales.items()}
    errors = {}
    for group, scale in scales.items():
        for name in group.linears:
            t = rows.get(name, torch.ones(1)).unsqueeze(1)
            scaled = network.weight(name) * scale / t
            errors[name] = (t * (fmt.fit(scaled).snap(scaled) - scaled)).double()

    def loss(moved: dict[Group, Tensor], tokens: Tensor) -> float:
        weights = {
            f"{name}.weight": (network.weight(name).double() * scale + errors[name]) / scale
            for group, scale in moved.items()
            for name in group.linears
        }
        logits = functional_call(model, weights, kwargs={"input_ids": tokens}).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    return loss


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_gradients_are_those_of_fixed_rounding_errors(network: Network, context: Build, fmt: Format) -> None:
    tokens, scales = context(network).tokens[:2], random_scales(network)
    student = ScaledNetwork(network, plan_of(network, fmt), {g: s.requires_grad_() for g, s in scales.items()})
    gradients = dict(zip(scales, torch.autograd.grad(student.loss(tokens), list(scales.values())), strict=True))
    start = {group: scale.detach().double() for group, scale in scales.items()}
    with torch.no_grad():
        loss = surrogate(network, fmt, scales)
        for group, gradient in gradients.items():
            direction = gradient.double() / gradient.norm()
            ahead, behind = (loss(start | {group: start[group] + h * direction}, tokens) for h in (1e-3, -1e-3))
            assert (ahead - behind) / 2e-3 == pytest.approx(float(gradient.norm()), rel=5e-3)


def test_nothing_to_round_gives_no_gradient(network: Network, context: Build) -> None:
    for name in network.linears:
        network.overwrite(name, network.weight(name).half().float())
    scales = {g: torch.where(s > 1, 2.0, 0.5).requires_grad_() for g, s in random_scales(network).items()}
    student = ScaledNetwork(network, plan_of(network, Dense()), scales)
    gradients = torch.autograd.grad(student.loss(context(network).tokens), list(scales.values()))
    coarse = ScaledNetwork(network, plan_of(network, FORMATS[0]), scales)
    others = torch.autograd.grad(coarse.loss(context(network).tokens), list(scales.values()))
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient.norm() < 1e-4 * other.norm()


def test_scales_start_from_the_root_of_the_largest_weights(network: Network) -> None:
    group = network.blocks[0].groups[0]
    for name in group.linears:
        weight = network.weight(name)
        weight[:, 5] = 0
        network.overwrite(name, weight)
    stacked = torch.cat([network.weight(name) for name in group.linears])
    expected = [1 / max(column) ** 0.5 if max(column) else 1.0 for column in stacked.abs().T.tolist()]
    torch.testing.assert_close(initial_scale(network, group, sqrt_w_init=True), torch.tensor(expected))
    assert len(group.linears) == 3
    assert expected[5] == 1
    assert torch.equal(initial_scale(network, group), torch.ones(64))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (40, 0.05), (40, 0.25), (7, 0.0)])
def test_the_learning_rate_is_that_of_the_official_schedule(steps: int, warmup: float) -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=int(steps * warmup), num_training_steps=steps)
    for step in range(steps):
        assert TEQScales(steps=steps, warmup=warmup)._rate(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_scales_stay_positive(network: Network, context: Build) -> None:
    folds = TEQScales(steps=4, lr=3.0, warmup=0.0)(context(network), plan_of(network, FORMATS[0]))
    assert min(float(scale.min()) for scale in folds.input_scale.values()) == pytest.approx(SMALLEST)


def test_the_model_is_left_trainable(network: Network, context: Build) -> None:
    network.model.train()
    with torch.no_grad():  # as the harness calls methods
        TEQScales(steps=2)(context(network), plan_of(network, FORMATS[0]))
    assert network.model.training
    assert all(p.requires_grad and p.grad is None for p in network.model.parameters())


def test_bad_numbers_are_refused(network: Network, context: Build) -> None:
    for options in ({"steps": -1}, {"lr": 0.0}, {"warmup": 1.0}):
        with pytest.raises(ValueError, match="TEQ cannot train"):
            TEQ(**options)
    with torch.no_grad():
        network.model.get_parameter("model.embed_tokens.weight").fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="in step 0"):
        TEQScales()(context(network), plan_of(network, FORMATS[0]))
