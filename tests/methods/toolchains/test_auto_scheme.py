"""The budget in the tool's own terms, by brute force over plans; and plans that the tool may answer with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from methods.base import Budget, Context
from methods.network import Network
from methods.toolchains.auto_scheme import ToolAutoScheme, average_bits
from methods.toolchains.process import Answer

Build = Callable[..., Network]
Given = Callable[..., Context]

WIDTHS = (2, 3, 4, 8)


def counted(budget: Budget, shape: tuple[int, int], width: int) -> int:
    """`compute_layer_bits` of the tool; without scales and zero points where it is told to ignore them."""
    out, columns = shape
    groups = out * -(-columns // budget.group_size) if budget.group_size else out
    return width * out * columns + (0 if budget.symmetric else groups * (16 + width))


@pytest.mark.parametrize("shapes", [[(8, 64), (4, 128), (16, 64)], [(5, 67), (3, 33), (7, 100)]])
@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_the_tool_may_choose_is_what_the_budget_allows(
    shapes: list[tuple[int, int]], group_size: int, symmetric: bool
) -> None:
    weights = sum(out * columns for out, columns in shapes)
    whole = all(columns % 32 == 0 for _, columns in shapes)
    for limit in (3.0, 3.5, 4.5, 6.0):
        budget = Budget(effective_bits=limit, group_size=group_size, symmetric=symmetric)
        most = int(weights * average_bits(budget, shapes, limit, WIDTHS))  # as the tool rounds it
        missed = 0
        for plan in product(WIDTHS, repeat=len(shapes)):
            stored = sum(budget.format(w).stored_bits(s) for w, s in zip(plan, shapes, strict=True))
            chosen = sum(counted(budget, s, w) for w, s in zip(plan, shapes, strict=True)) <= most
            assert not chosen or stored <= limit * weights
            missed += not chosen and stored <= limit * weights
        assert missed <= (0 if whole else 6)


def test_a_limit_beyond_the_widest_format_becomes_that_of_the_widest_format() -> None:
    budget = Budget(effective_bits=7.0, group_size=32)
    assert average_bits(budget, [(8, 64)], 7.0, (2, 4)) == 4 + 20 / 32


def answer(network: Network, budget: Budget, width: Callable[[str], int], symmetric: bool) -> Answer:
    tensors = {}
    for name in network.linears:
        fmt = replace(budget.format(width(name)), symmetric=symmetric)
        grid = fmt.fit(network.weight(name))
        tensors[f"{name}/weight"] = grid.snap(network.weight(name))
        tensors[f"{name}/scale"] = grid.scale
        tensors[f"{name}/width"] = torch.tensor(fmt.width)
        if not symmetric:
            tensors[f"{name}/zero"] = grid.zero
    return Answer(tensors, {}, 1.0, 1)


def test_each_linear_is_packed_in_its_width(small_llama: Build, context: Given) -> None:
    network, budget = small_llama(), Budget(effective_bits=4.0, group_size=32)

    def width(name: str) -> int:
        return 4 if "v_proj" in name else 3

    ctx = replace(context(network, budget), tools=lambda *_: answer(network, budget, width, symmetric=False))
    done = ToolAutoScheme().quantize(ctx)
    for name, packed in done.packed.items():
        fmt = budget.format(width(name))
        assert packed.stored_bits() == fmt.stored_bits(network.shape(name))
        assert torch.equal(packed.dequantize(), fmt.fit(network.weight(name)).snap(network.weight(name)))


def test_a_plan_over_the_budget_is_refused_and_grids_without_zero_points_are_counted_so(
    small_llama: Build, context: Given
) -> None:
    network, budget = small_llama(), Budget(effective_bits=3.5, group_size=32)
    ctx = context(network, budget)
    three = {s: answer(network, budget, lambda _: 3, symmetric=s) for s in (False, True)}
    stored = [
        sum(packed.stored_bits() for packed in ToolAutoScheme().quantize(replace(ctx, tools=given)).packed.values())
        for given in (lambda *_: three[True],)
    ]
    assert stored == [sum(budget.format(3).stored_bits(s) - s[0] * s[1] // 32 * 3 for s in network.shapes)]
    with pytest.raises(ValueError, match=r"stored 3.59\d\d bits a weight, over the 3.5000"):
        ToolAutoScheme().quantize(replace(ctx, tools=lambda *_: three[False]))


def test_a_width_that_the_tool_does_not_have_is_refused(small_llama: Build, context: Given) -> None:
    network, budget = small_llama(), Budget(effective_bits=4.0, group_size=32)
    given = answer(network, budget, lambda _: 3, symmetric=False)
    given.tensors[f"{network.linears[0]}/width"] = torch.tensor(2)  # says less than it stores
    with pytest.raises(ValueError, match="2-bit grid"):
        ToolAutoScheme().quantize(replace(context(network, budget), tools=lambda *_: given))


def test_what_the_tool_is_told_says_the_budget(small_llama: Build, context: Given) -> None:
    network, budget = small_llama(), Budget(effective_bits=4.0, group_size=32)
    told: dict[str, Any] = {}

    def tools(module: str, requirements: Any, settings: Mapping[str, Any]) -> Answer:
        del module, requirements
        told.update(settings)
        return answer(network, budget, lambda _: 3, symmetric=False)

    ToolAutoScheme(iters=0).quantize(replace(context(network, budget), tools=tools))
    assert Budget(**told["budget"]) == budget
    assert told["iters"] == 0


def test_what_it_cannot_do_is_refused_in_words(small_llama: Build) -> None:
    network = small_llama()
    assert ToolAutoScheme().supports(network, Budget(effective_bits=4.0, group_size=32)) is None
    assert ToolAutoScheme().supports(network, Budget(bits=4, group_size=32)) is None
    assert "the limit is 2.25" in str(ToolAutoScheme().supports(network, Budget(effective_bits=2.25, group_size=32)))
    assert "0.5 gigabops" in str(ToolAutoScheme().supports(network, Budget(gigabops=0.5)))
    with pytest.raises(ValueError, match=r"method.bits is empty"):
        ToolAutoScheme(bits=())
