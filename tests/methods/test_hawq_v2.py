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

from methods.base import METHODS, Budget, Context, Method
from methods.hawq_v1 import HAWQV1
from methods.hawq_v2 import HAWQV2
from methods.mixed import MixedPrecision
from methods.network import Network, discover
from methods.sensitivity.base import Sensitivity, measure
from methods.sensitivity.hutchinson import Hutchinson

SHARED = Path(__file__).parents[2].parent / "shared"
CHECKPOINT = SHARED / "models/stories260K"
STORIES = SHARED / "data/tinystories/valid.jsonl"
QUICK: dict[str, Any] = {"max_probes": 2}


def stored(plan: Mapping[str, Any], network: Network) -> float:
    """Stored bits a weight of a plan."""
    bits = sum(fmt.stored_bits(network.shape(name)) for name, fmt in plan.items())
    return bits / sum(out * columns for out, columns in network.shapes)


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_minimizes_trace_times_squared_error(
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
    plan = HAWQV2(bits=widths, granularity="layer").plan(ctx, scores)
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
        bits = sum(p.stored_bits() for p in done.packed.values()) / sum(a * b for a, b in network.shapes)
        assert limit - 0.02 <= bits <= limit
        assert set(done.packed) == set(done.sensitivity) == set(network.linears)


def test_linears_with_the_same_input_share_a_width_unless_told_otherwise(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, Budget(effective_bits=4, group_size=32))
    scores = {name: 10.0 ** (i % 5) for i, name in enumerate(network.linears)}
    fused = HAWQV2().plan(ctx, scores)
    assert all(len({fused[name] for name in group.linears}) == 1 for group in network.groups)
    single = HAWQV2(granularity="layer").plan(ctx, scores)
    assert any(len({single[name] for name in group.linears}) > 1 for group in network.groups)


def test_a_larger_average_trace_never_gets_fewer_bits(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network, Budget(effective_bits=4, group_size=32))
    chosen = network.groups[1]
    widths = []
    for factor in (1e-3, 1.0, 1e3):
        scores = {name: factor if name in chosen.linears else 1.0 for name in network.linears}
        widths.append(HAWQV2().plan(ctx, scores)[chosen.name].bits)
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_scores_are_traces_a_weight(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    method = HAWQV2(**QUICK)
    scores = method.scores(context(network))
    metric = Hutchinson(method.tolerance, method.max_probes, method.context)
    traces = measure(metric, context(network)).values
    for name in network.linears:
        assert scores[name] == pytest.approx(traces[name] / network.weight(name).numel())


def test_equal_top_eigenvalues_can_hide_different_traces(
    quadratic: Callable[..., Network], context: Callable[..., Context]
) -> None:
    """HAWQ-V2's argument against HAWQ-V1: 100x² + y² and 100x² + 99y²."""
    network = quadratic({"a": [200.0, 2.0], "b": [200.0, 198.0]})
    ctx = context(network, statistics=False)
    first, second = HAWQV1(tolerance=1e-7, max_iterations=2000).scores(ctx), HAWQV2().scores(ctx)
    assert first["a"] == pytest.approx(first["b"], rel=1e-3)
    assert second == pytest.approx({"a": 202 / 2, "b": 398 / 2})


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

    drawn, plans = [], []
    for bits in (3.0, 5.0):
        ctx = replace(context(small_llama(), Budget(effective_bits=bits, group_size=32)), memo=memo)
        plans.append(HAWQV2(**QUICK).plan(ctx, HAWQV2(**QUICK).scores(ctx)))
        drawn.append(torch.rand(1, generator=ctx.generator))
    assert owners == ["methods.sensitivity.hutchinson"]
    assert torch.equal(*drawn)  # what is drawn later does not depend on what was remembered
    assert plans[0] != plans[1]


def test_sensitivities_survive_being_remembered() -> None:
    score = Sensitivity({"h.0.a": -1.25, "h.0.b": 1e-12}, {"h.0.a": 0.1, "h.0.b": 0.0}, 3.5, 42)
    assert Sensitivity.from_tensors(score.tensors()) == score


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
        ({"granularity": "block"}, "there are group and layer"),
        ({"bits": ()}, "give candidate widths"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HAWQV2(**options)


@pytest.mark.skipif(not (CHECKPOINT.exists() and STORIES.exists()), reason="needs ../shared")
def test_both_versions_allocate_on_a_real_checkpoint() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    stories = [json.loads(line)["text"] for line in STORIES.read_text().splitlines()[:2]]
    tokens = torch.tensor([tokenizer(story).input_ids[:24] for story in stories])
    network = discover(model, model.config.vocab_size)
    ctx = Context(
        network, tokens, tokens, _no_statistics, Budget(effective_bits=3.75, group_size=32), torch.Generator()
    )
    methods: list[Method] = [HAWQV1(max_iterations=2), HAWQV2(max_probes=2)]
    for method in methods:
        assert isinstance(method, MixedPrecision)
        scores = method.scores(ctx)
        assert len(set(scores.values())) == len(network.linears)
        assert 3.73 <= stored(method.plan(ctx, scores), network) <= 3.75


def _no_statistics(*_: Any) -> Tensor:
    raise AssertionError("HAWQ needs no statistics")
