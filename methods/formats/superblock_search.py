"""How llama.cpp finds the scales of its k-quants (`ggml-quants.c`), for all sub-blocks of a matrix at once.

A sub-block is fitted by weighted least squares over a range of step sizes that set the codes; then the scales of the
sub-blocks, and their minima, are fitted by integers under a unit of their super-block. What an error counts and how
hard the search is differs from width to width: `SEARCHES` lists it.

Throughout, numbers that are fitted together lie along the first dimension; all other dimensions are batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

NOTHING = 1e-15  # below this magnitude llama.cpp takes numbers for zero
ROUNDS = 5

Fit: TypeAlias = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
"""Of numbers x [n, ...], what their errors count [n, ...], and the largest magnitude of a code. Codes without sign are
0 … top, signed ones −top … top − 1."""


def ratio(x: Tensor, unit: Tensor) -> Tensor:
    """x / unit, and 0 where the unit is 0."""
    return x / torch.where(unit == 0, torch.inf, unit)


# What an error of each weight counts. `relevance` is its importance, or 1, and 0 where a column is missing.


def _energy(x: Tensor, relevance: Tensor) -> Tensor:
    return relevance * x.square()


def _magnitude(x: Tensor, relevance: Tensor) -> Tensor:
    return relevance * x.abs()


def _magnitude_and_rms(x: Tensor, relevance: Tensor) -> Tensor:
    return relevance * (x.square().mean(0).sqrt() + x.abs())


def _importance(x: Tensor, relevance: Tensor) -> Tensor:
    return relevance.expand_as(x)


def _importance_and_energy(x: Tensor, relevance: Tensor, share: float) -> Tensor:
    return relevance * (share * x.square().mean((0, 1)) + x.square()).sqrt()


# How numbers x are fitted by a factor times codes, and by the same less a minimum.


def _affine(
    x: Tensor, loss: Tensor, top: int, first: float, step: float, count: int, power: int = 2
) -> tuple[Tensor, Tensor]:
    """Scale and minimum, not negative, with little Σ loss · |scale · code − minimum − x|^power.

    Codes are set by steps of the range over top + first, top + first + step, … (`count` in all), and scale and
    minimum by least squares given these codes. The range starts at the best minimum so far.
    """
    low, high = x.amin(0).clamp(max=0), x.amax(0)
    total, sum_x = loss.sum(0), (loss * x).sum(0)

    def error(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        return (loss * (scale * codes + low - x).abs_().pow_(power)).sum(0)

    scale = (high - low) / top
    best = error(torch.round(ratio(x - low, scale)), scale, low)
    for i in range(count):
        codes = torch.round(ratio(x.new_tensor(top + first + step * i), high - low) * (x - low)).clamp_(0, top)
        weighted = loss * codes
        sum_codes, squares, products = weighted.sum(0), (weighted * codes).sum(0), (weighted * x).sum(0)
        determinant = total * squares - sum_codes * sum_codes
        free_low = (squares * sum_x - sum_codes * products) / determinant
        free = (total * products - sum_x * sum_codes) / determinant
        trial, trial_low = torch.where(free_low > 0, products / squares, free), free_low.clamp(max=0)
        found = error(codes, trial, trial_low)
        better = (determinant > 0) & (found < best)
        best, scale, low = (torch.where(better, *pair) for pair in ((found, best), (trial, scale), (trial_low, low)))
    return scale.clamp(min=0), -low


def _symmetric(x: Tensor, loss: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Factor and codes with little Σ loss · (factor · code − x)²: the best of 19 steps that set the codes."""
    peak = _peak(x)
    best, factor, chosen = torch.full_like(peak, -1), torch.zeros_like(peak), torch.zeros_like(x)
    for shift in sorted(range(-9, 10), key=bool):  # 0 first
        codes = torch.round(-(top + 0.1 * shift) / peak * x).clamp_(-top, top - 1)
        product, square = (loss * codes * x).sum(0), (loss * codes * codes).sum(0)
        gain = ratio(product * product, square)
        better = gain > best
        best, factor = torch.where(better, gain, best), torch.where(better, ratio(product, square), factor)
        chosen = torch.where(better, codes, chosen)
    return factor, chosen


def _signed_range(x: Tensor, loss: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude gets the code −top."""
    del loss
    per_code = -top / _peak(x)
    return ratio(torch.ones_like(per_code), per_code), torch.round(per_code * x).clamp_(-top, top - 1)


def _descended(x: Tensor, loss: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """From `_signed_range` downhill."""
    return _downhill(x, loss, _signed_range(x, loss, top)[1], -top, top - 1)


def _range(x: Tensor, loss: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Of numbers that are not negative: the largest gets the code top."""
    del loss
    unit = x.amax(0) / top
    return unit, torch.round(ratio(x, unit)).clamp_(max=top)


def _positive(x: Tensor, loss: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Of numbers that are not negative: from the best of 9 steps downhill."""
    peak = _peak(x)
    best, chosen = torch.full_like(peak, torch.inf), torch.zeros_like(x)
    for shift in sorted(range(-4, 5), key=bool):
        per_code = (top + 0.1 * shift) / peak
        codes = torch.round(per_code * x).clamp_(max=top)
        error = (loss * (x - ratio(codes, per_code)).square()).sum(0)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, codes, chosen)
    return _downhill(x, loss, chosen, 0, top)


def _downhill(x: Tensor, loss: Tensor, codes: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Change one code after the other to the nearest under the factor that fits the others best, where that lowers
    the error; at most five rounds. As in llama.cpp, nothing changes where that factor is negative."""
    codes = codes.clone()
    product, square = (loss * x * codes).sum(0), (loss * codes * codes).sum(0)
    for _ in range(ROUNDS):
        before = codes.clone()
        for value, weight, code in zip(x, loss, codes, strict=True):
            others, others_square = product - weight * value * code, square - weight * code * code
            trial = torch.round(value * others_square / others).clamp_(low, high)
            trial_product, trial_square = others + weight * value * trial, others_square + weight * trial * trial
            gains = trial_product.square() * square > product.square() * trial_square
            better = (others > 0) & (trial_square > 0) & (trial != code) & gains
            code.copy_(torch.where(better, trial, code))
            product = torch.where(better, trial_product, product)
            square = torch.where(better, trial_square, square)
        if torch.equal(codes, before):
            break
    return ratio(product, square), codes


def _peak(x: Tensor) -> Tensor:
    """The number of the largest magnitude; where there is nothing, infinity, over which all codes are 0."""
    peak = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    return torch.where(peak.abs() < NOTHING, torch.inf, peak)


def _factor(fit: Fit) -> Fit:
    """Without the codes."""
    return lambda x, loss, top: fit(x, loss, top)[:1]


class Search(NamedTuple):
    """How llama.cpp finds what a super-block stores."""

    loss: Callable[[Tensor, Tensor], Tensor]
    levels: Fit
    """Of the weights of a sub-block: scale, and minimum if there is one."""
    units: Fit
    """Of the levels of a super-block: unit and codes."""


_guided = partial(_affine, first=-0.9, step=0.05, count=37)
SEARCHES: dict[tuple[int, bool], Search] = {
    (2, False): Search(_magnitude, partial(_affine, first=-0.5, step=0.1, count=16, power=1), _range),
    (3, False): Search(_energy, _factor(_descended), _signed_range),
    (4, False): Search(_magnitude_and_rms, partial(_affine, first=-1, step=0.1, count=21), _range),
    (5, False): Search(_magnitude_and_rms, partial(_affine, first=-0.5, step=0.1, count=16), _range),
    (6, False): Search(_energy, _factor(_symmetric), _signed_range),
    (2, True): Search(partial(_importance_and_energy, share=1), _guided, _positive),
    (3, True): Search(partial(_importance_and_energy, share=2), _factor(_symmetric), _symmetric),
    (4, True): Search(partial(_importance_and_energy, share=2), _guided, _positive),
    (5, True): Search(partial(_importance_and_energy, share=2), _guided, _positive),
    (6, True): Search(_importance, _factor(_symmetric), _signed_range),
}
"""By width, and whether importances are given."""
