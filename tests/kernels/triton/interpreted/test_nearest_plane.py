from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from kernels.triton.nearest_plane import nearest_plane, supports
from methods.rounding.gptq import nearest_plane as reference
from methods.rounding.sweep import by_blocks, damped_factor

Plane = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def problem(random: Generator, columns: int, rows: int, bits: int = 4) -> dict[str, Tensor]:
    mixed = torch.randn(4 * columns, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    weight = torch.randn(rows, columns, generator=random)
    step = ((weight.amax(1) - weight.amin(1)) / (2**bits - 1))[None].expand(columns, -1)
    zero = (-weight.amin(1) / step[0]).round()[None].expand(columns, -1)
    return {
        "target": weight.t().contiguous(),
        "factor": damped_factor(mixed.t() @ mixed / len(mixed), 0.01),
        "step": step.contiguous(),
        "low": -zero,
        "high": 2**bits - 1 - zero,
    }


@pytest.mark.parametrize(("columns", "rows"), [(128, 40), (32, 7), (2, 3), (100, 33)])
def test_codes_are_those_of_the_rounding(random: Generator, columns: int, rows: int) -> None:
    given = problem(random, columns, rows)
    ours, theirs = torch.empty(columns, rows), torch.empty(columns, rows)
    points = nearest_plane(**given, multiples=ours)
    expected = reference(**given, multiples=theirs)
    # A sum in another order may tip one column of a row over, and then the columns after it.
    same = (ours == theirs).all(0)
    assert same.float().mean() > 0.9
    assert torch.allclose(points[:, same], expected[:, same])
    assert (
        not torch.equal(ours, (given["target"] / given["step"]).round().clamp(given["low"], given["high"]))
        or columns < 3
    )


def test_blocks_of_a_larger_matrix(random: Generator) -> None:
    """As the sweep calls it, with parts of larger tensors; the loss is that of the reference."""
    given = problem(random, 96, 20)
    losses = []
    for plane in (nearest_plane, reference):
        multiples = torch.empty_like(given["target"])

        def take(part: Tensor, diagonal: Tensor, first: int, plane: Plane = plane, out: Tensor = multiples) -> Tensor:
            rows = slice(first, first + len(part))
            limits = (given[name][rows] for name in ("step", "low", "high"))
            return plane(part, diagonal, *limits, out[rows])

        points = by_blocks(given["target"], given["factor"], 32, take)
        losses.append(((points - given["target"]).t() @ given["factor"]).square().sum())
    assert losses[0] == pytest.approx(losses[1].item(), rel=0.02)


def test_half_way_cases_and_limits() -> None:
    target = torch.tensor([[0.5, 1.5, 2.5, -0.5, 99.0, -99.0]])
    one, bound = torch.ones_like(target), torch.full_like(target, 7.0)
    multiples = torch.empty_like(target)
    nearest_plane(target, torch.ones(1, 1), one, -bound, bound, multiples)
    assert multiples.tolist() == [[0, 2, 2, 0, 7, -7]]


def test_too_many_columns_are_refused() -> None:
    assert "more than" in str(supports(torch.zeros(129, 4)))
    assert supports(torch.zeros(128, 4)) is None
