import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.packed import PackedDense
from kernels.packed_float import PackedFloat
from methods.base import METHODS, Budget, Context, Stat
from methods.formats.dense import Dense
from methods.hawq_v1 import HAWQV1
from methods.hawq_v2 import HAWQV2
from methods.mixed import Mixed
from methods.mixed_precision import MixedPrecision, Plan
from methods.network import Network, discover
from methods.recipe import Recipe
from methods.sensitivity.hvp import mean_loss

SHARED = Path(__file__).parents[2].parent / "shared"
CHECKPOINT = SHARED / "models/stories260K"
STORIES = SHARED / "data/tinystories/valid.jsonl"
QUICK: dict[str, Any] = {"max_probes": 2}


def stored(plan: Plan, network: Network) -> float:
    """Stored bits a weight of a plan."""
    bits = sum(recipe.weight.stored_bits(network.shape(name)) for name, recipe in plan.items())
    return bits / sum(out * columns for out, columns in network.shapes)


def planned(method: MixedPrecision, ctx: Context, scores: Mapping[str, float]) -> Plan:
    """The plan for losses that are scores times squared rounding errors, computed here."""

    def loss(name: str, fmt: Any) -> float:
        weight = ctx.network.weight(name)
        return scores[name] * float((fmt.fit(weight).snap(weight) - weight).norm() ** 2)

    formats = method.candidates(ctx.budget)
    return method.plan(ctx, {n: {Recipe(f): loss(n, f) for f in formats} for n in ctx.network.linears})


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_minimizes_score_times_squared_error(
    seed: int, small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network, widths = small_llama(num_hidden_layers=1), (2, 3, 4, 8)
    ctx = context(network, Budget(effective_bits=4.22, group_size=32))
    rng = random.Random(seed)
    scores = {name: rng.lognormvariate(-12, 2) * rng.choice([1, 1, -1]) for name in network.linears}

    def charge(name: str, width: int) -> tuple[float, int]:
        weight, fmt = network.weight(name), ctx.budget.format(width)
        error = float((fmt.fit(weight).snap(weight) - weight).norm() ** 2)
        return scores[name] * error, fmt.stored_bits(network.shape(name))

    charges = [{width: charge(name, width) for width in widths} for name in network.linears]
    weights = sum(out * columns for out, columns in network.shapes)
    allowed = {}
    for choice in product(widths, repeat=len(charges)):
        omegas, bits = zip(*(c[width] for c, width in zip(charges, choice, strict=True)), strict=True)
        if 4.2 * weights <= sum(bits) <= 4.22 * weights:
            allowed[choice] = sum(omegas)
    assert len(allowed) > 10
    plan = planned(HAWQV2(bits=widths, granularity="layer"), ctx, scores)
    assert tuple(plan[name].bits for name in network.linears) == min(allowed, key=allowed.__getitem__)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("method", [HAWQV1, HAWQV2])
def test_budgets_are_met_and_never_exceeded(
    method: type[MixedPrecision],
    rounding: str,
    small_llama: Callable[..., Network],
    context: Callable[..., Context],
) -> None:
    network = small_llama()
    quick = {"max_iterations": 2} if method is HAWQV1 else QUICK
    for budget in (Budget(effective_bits=3.75, group_size=32), Budget(bits=4, group_size=32)):
        ctx = context(network, budget)
        assert method().supports(network, budget) is None
        done = method(granularity="layer", rounding=rounding, **quick).quantize(ctx)
        limit = budget.limit(network.shapes)
        assert limit is not None
        bits = sum(p.stored_bits() for p in done.packed.values()) / sum(a * b for a, b in network.shapes)
        assert limit - 0.02 <= bits <= limit
        assert set(done.packed) == set(done.sensitivity) == set(network.linears)


def test_granularity_says_what_shares_a_recipe(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, Budget(effective_bits=4, group_size=32))
    scores = {name: 10.0 ** (i % 5) for i, name in enumerate(network.linears)}
    fused = planned(HAWQV2(), ctx, scores)
    assert all(len({fused[name] for name in group.linears}) == 1 for group in network.groups)
    single = planned(HAWQV2(granularity="layer"), ctx, scores)
    assert any(len({single[name] for name in group.linears}) > 1 for group in network.groups)
    blocks = planned(HAWQV2(granularity="block", bits=(2, 3, 4, 5)), ctx, scores)
    assert all(len({blocks[n] for g in block.groups for n in g.linears}) == 1 for block in network.blocks)
    assert any(len({fused[n] for g in block.groups for n in g.linears}) > 1 for block in network.blocks)


def test_a_larger_score_never_gets_fewer_bits(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, Budget(effective_bits=4, group_size=32))
    chosen = network.groups[1]
    widths = []
    for factor in (1e-3, 1.0, 1e3):
        scores = {name: factor if name in chosen.linears else 1.0 for name in network.linears}
        widths.append(planned(HAWQV2(), ctx, scores)[chosen.name].bits)
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_sensitivities_are_measured_once_for_all_budgets(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    owners = []

    def memo(name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        key = json.dumps([name, options], sort_keys=True)
        if key not in kept:
            owners.append(compute.__module__)
            kept[key] = compute()
        return kept[key]

    passes, drawn, widths = [], [], []
    for bits in (3.0, 5.0):
        network = small_llama()
        calls: list[int] = []
        ctx = replace(context(network, Budget(effective_bits=bits, group_size=32)), memo=memo)
        network.model.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        done = HAWQV2(**QUICK).quantize(ctx)
        passes.append(len(calls))
        drawn.append(torch.rand(1, generator=ctx.generator))
        widths.append([packed.bits for packed in done.packed.values()])
    assert passes[0] > 0
    assert passes[1] == 0  # another budget is another plan, and no pass through the model
    assert owners == ["methods.sensitivity.omega", "methods.sensitivity.hutchinson"]
    assert torch.equal(*drawn)  # what is drawn later does not depend on what was remembered
    assert widths[0] != widths[1]


def test_named_formats_and_16_bits_are_candidates(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, Budget(effective_bits=7.0, group_size=32))
    method = Mixed(bits=(16,), formats=("nvfp4", "fp8"), metric="output_mse", granularity="layer")
    assert [fmt.name for fmt in method.candidates(ctx.budget)] == ["nvfp4", "fp8", "dense16"]
    scores = {name: 1e6 if name == network.linears[2] else 1.0 + i % 2 for i, name in enumerate(network.linears)}
    plan = planned(method, ctx, scores)
    assert plan[network.linears[2]].weight == Dense()
    done = method.quantize(ctx)
    assert {type(packed) for packed in done.packed.values()} <= {PackedFloat, PackedDense}
    assert len({packed.bits for packed in done.packed.values()}) > 1


def test_inputs_get_widths_of_their_own(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    # 4-bit weights with 8-bit inputs, or the other way round, take as many BOPs: the metric decides.
    macs = sum(out * columns for out, columns in network.shapes)
    budget = Budget(gigabops=40 * macs / 1e9, group_size=32)
    ctx = context(network, budget)
    done = HAWQV2(bits=(4, 8), input_bits=(4, 8), **QUICK).quantize(ctx)
    assert set(done.inputs) == set(network.linears)
    assert {rounding.bits for rounding in done.inputs.values()} == {4, 8}
    spent = sum(network.linear(n).weight.numel() * done.packed[n].bits * done.inputs[n].bits for n in network.linears)
    assert 40 * macs * 0.9 < spent <= 40 * macs
    for group in network.groups:
        assert len({done.inputs[name].bits for name in group.linears}) == 1


def test_a_bound_on_time_is_met_by_the_latency_table(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()

    def latency(shape: tuple[int, int], fmt: Any) -> float:
        return shape[0] * shape[1] * fmt.bits * 1e-3

    everything = sum(latency(shape, ctx_format) for shape in network.shapes for ctx_format in [Budget(bits=8).format()])
    ctx = replace(context(network, Budget(microseconds=0.6 * everything, group_size=32)), latency=latency)
    done = HAWQV2(granularity="layer", **QUICK).quantize(ctx)
    spent = sum(latency(network.shape(n), done.packed[n]) for n in network.linears)
    assert 0.59 * everything < spent <= 0.6 * everything
    with pytest.raises(ValueError, match="needs a latency table"):
        HAWQV2(**QUICK).quantize(context(small_llama(), ctx.budget))


def test_megabytes_count_the_whole_model(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    budget = Budget(megabytes=0.06, group_size=32)
    done = HAWQV2(**QUICK).quantize(context(network, budget))
    others = sum(p.numel() for n, p in network.model.named_parameters() if "proj" not in n)
    size = 2 * others + sum(packed.stored_bits() for packed in done.packed.values()) / 8
    assert 0.0597e6 < size <= 0.06e6


def test_solvers_may_try_plans_out(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    ctx = context(network, Budget(effective_bits=4, group_size=32))
    before = {name: network.weight(name) for name in network.linears}
    judge = Mixed(judge_sequences=3)._judge(ctx, {group.name: group.linears for group in network.groups})
    assert judge is not None
    fmt = ctx.budget.format(3)
    judged = judge({group.name: Recipe(fmt) for group in network.groups})
    assert all(torch.equal(network.weight(name), before[name]) for name in network.linears)
    for name, weight in before.items():
        network.overwrite(name, fmt.fit(weight).snap(weight))
    with torch.no_grad():
        assert judged == pytest.approx(float(mean_loss(network, ctx.scoring[:3])), rel=1e-5)
    assert Mixed()._judge(ctx, {}) is None


def test_a_transform_precedes_the_rounding(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    method = Mixed(metric="output_mse", transform="awq", rounding="gptq")
    assert method.statistics == {Stat.GRAM, Stat.MEAN_ABS}
    done = method.quantize(context(network, Budget(effective_bits=4, group_size=32)))
    assert done.input_scale
    assert done.parameters


def test_unreachable_budgets_are_not_supported(small_llama: Callable[..., Network]) -> None:
    network, method = small_llama(), METHODS["hawq_v2"](bits=(3, 4))
    reason = method.supports(network, Budget(effective_bits=2.5, group_size=32))
    assert reason is not None
    assert reason.startswith("int3-g32 stores 3.594 bits a weight")
    assert method.supports(network, Budget(bits=2, group_size=32)) is not None
    assert method.supports(network, Budget(bits=3, group_size=32)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "paretto"}, "did you mean pareto"),
        ({"rounding": "gtpq"}, "did you mean gptq"),
        ({"transform": "akw"}, "did you mean awq"),
        ({"formats": ("nvpf4",)}, "did you mean nvfp4"),
        ({"granularity": "blok"}, "did you mean block"),
        ({"bits": ()}, "give candidates"),
        ({"metric": "hutchinsen"}, "did you mean hutchinson"),
        ({"metric_options": {"tolerence": 1}}, "did you mean tolerance"),
        ({"solver_options": {"resolutio": 1}}, "did you mean resolution"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixed(**options)


def test_options_reach_the_parts_and_the_label() -> None:
    method = Mixed(metric="hutchinson", metric_options={"tolerance": 0.5}, solver_options={"resolution": 7})
    assert method.sensitivity().tolerance == 0.5  # type: ignore[attr-defined]
    assert method.allocation().resolution == 7  # type: ignore[attr-defined]
    assert method.label == "mixed metric=hutchinson metric_options=tolerance:0.5 solver_options=resolution:7"
    assert "methods.sensitivity.hutchinson" in method.modules


@pytest.mark.skipif(not (CHECKPOINT.exists() and STORIES.exists()), reason="needs ../shared")
@pytest.mark.parametrize("method", [HAWQV1(max_iterations=2), HAWQV2(max_probes=2)])
def test_both_versions_allocate_on_a_real_checkpoint(method: MixedPrecision) -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    stories = [json.loads(line)["text"] for line in STORIES.read_text().splitlines()[:2]]
    tokens = torch.tensor([tokenizer(story).input_ids[:24] for story in stories])
    network = discover(model, model.config.vocab_size)
    weights = sum(out * columns for out, columns in network.shapes)
    ctx = Context(
        network, tokens, tokens, _no_statistics, Budget(effective_bits=3.75, group_size=32), torch.Generator()
    )
    done = method.quantize(ctx)
    assert len(set(done.sensitivity.values())) == len(network.linears)
    assert 3.73 <= sum(packed.stored_bits() for packed in done.packed.values()) / weights <= 3.75


def _no_statistics(*_: Any) -> Tensor:
    raise AssertionError("HAWQ needs no statistics")
