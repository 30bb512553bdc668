"""Traces of the Hessian's diagonal blocks, one a linear, after Hutchinson (1990) and HAWQ-V2 (Dong et al.,
NeurIPS 2020, arXiv 1911.03852).

For Rademacher z, E[zᵀHz] = tr H. Each linear has probes of its own, though a single product could serve them
all: then zᵢᵀHᵢₖzₖ of the other linears vanishes in expectation only, and adds to the variance. A probe for each
linear costs more but is far less noisy, and lets easy linears stop early.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import ClassVar, TypeAlias

import torch

from methods.sensitivity.base import METRICS, Cost, Metric, Sensitivity, Subject
from methods.sensitivity.blockwise import open_hessian
from methods.sensitivity.hvp import probe

log = logging.getLogger(__name__)

ROUND = 8  # probes a name between two looks at the standard errors

Draw: TypeAlias = Callable[[int, Sequence[str]], Iterable[tuple[str, float]]]
"""The number of a probe and names in; each name with one unbiased sample of its trace out."""


@METRICS.register("hutchinson")
@dataclass(frozen=True)
class Hutchinson(Metric):
    """tr ∂²loss/∂W² of every linear by Hutchinson's estimator (1990), with its sign: away from a minimum, traces may
    be negative.

    Each probe is drawn together with the next sequence of the text. The standard error over probes therefore
    covers the choice of text as well as the random vectors. A linear is done when its error is at most
    `tolerance` times its |trace|, or times the median |trace| of all linears where that is larger.

    Args:
        tolerance: relative standard error to reach.
        max_probes: probes after which a linear is left as it is.
        context: tokens used of each sequence, from its beginning.
        blockwise: hold one block's graph at a time, for models that do not fit otherwise; each product then runs
            the blocks again.
    """

    derivatives: ClassVar[int] = 2
    is_trace: ClassVar[bool] = True

    tolerance: float = 0.15
    max_probes: int = 32
    context: int = 128
    blockwise: bool = False

    def __post_init__(self) -> None:
        check_probes(self.tolerance, self.max_probes)

    def __call__(self, subject: Subject) -> Sensitivity:
        network, generator = subject.network, subject.generator()
        texts = subject.tokens[:, : self.context].to(next(network.model.parameters()).device)

        def draw(index: int, names: Sequence[str]) -> Iterable[tuple[str, float]]:
            text = texts[index % len(texts)].unsqueeze(0)
            with open_hessian(network, text, names, self.blockwise) as product:
                for name in names:
                    z = probe(network.linear(name).weight, generator)
                    yield name, float(torch.sum(z * product({name: z})[name]))

        with subject.cost() as cost:
            values, error = estimate(network.linears, draw, self.tolerance, self.max_probes, cost)
        return Sensitivity(values, error, cost)


def check_probes(tolerance: float, max_probes: int) -> None:
    """ValueError unless `estimate` can work with these."""
    if tolerance < 0 or max_probes < 2:
        raise ValueError(
            f"a standard error needs at least 2 probes and a tolerance of 0 or more, not "
            f"max_probes={max_probes} with tolerance={tolerance}"
        )


def estimate(
    names: Sequence[str], draw: Draw, tolerance: float, max_probes: int, cost: Cost
) -> tuple[dict[str, float], dict[str, float]]:
    """Traces and their standard errors by name; the rule for stopping is that of `Hutchinson`."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    unfinished = list(names)
    for index in range(max_probes):
        for name, sample in draw(index, unfinished):
            samples[name].append(sample)
        cost.passes += 2 + len(unfinished)
        if index % ROUND == ROUND - 1:
            unfinished = _unfinished(samples, tolerance)
        if not unfinished:
            break
    values = {name: fmean(drawn) for name, drawn in samples.items()}
    report_negative(values)
    log.info("Hessian traces: %d, of which %d ran out of probes", len(values), len(unfinished))
    return values, {name: standard_error(drawn) for name, drawn in samples.items()}


def standard_error(samples: Sequence[float]) -> float:
    """Of the mean of at least 2 samples."""
    return stdev(samples) / len(samples) ** 0.5


def report_negative(traces: Mapping[str, float]) -> None:
    """Say which traces are negative. They are kept: to second order, rounding there lowers the loss."""
    negative = [name for name, trace in traces.items() if trace < 0]
    if negative:
        log.warning("%d of %d Hessian traces are negative: %s", len(negative), len(traces), ", ".join(negative))


def _unfinished(samples: Mapping[str, Sequence[float]], tolerance: float) -> list[str]:
    sizes = {name: abs(fmean(drawn)) for name, drawn in samples.items()}
    floor = median(sizes.values())
    return [name for name, drawn in samples.items() if standard_error(drawn) > tolerance * max(sizes[name], floor)]
