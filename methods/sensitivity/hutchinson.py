"""Traces of the Hessian's diagonal blocks, one a linear, after Hutchinson (1990) and HAWQ-V2 (Dong et al.,
NeurIPS 2020, arXiv 1911.03852).

For Rademacher z, E[zᵀHz] = tr H. Each linear has probes of its own, though a single product could serve them
all: then zᵢᵀHᵢₖzₖ of the other linears vanishes in expectation only, and adds to the variance. A probe for each
linear costs more but is far less noisy, and lets easy linears stop early.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median, stdev
from time import perf_counter

import torch
from torch import Tensor

from methods.network import Network
from methods.sensitivity.base import METRICS, Metric, Sensitivity
from methods.sensitivity.hvp import hessian, probe

log = logging.getLogger(__name__)

ROUND = 8  # probes a linear between two looks at the standard errors


@METRICS.register("hutchinson")
@dataclass(frozen=True)
class Hutchinson(Metric):
    """tr ∂²loss/∂W² of every linear, with its sign: away from a minimum, traces may be negative.

    Each probe is drawn together with the next sequence of the text. The standard error over probes therefore
    covers the choice of text as well as the random vectors. A linear is done when its error is at most
    `tolerance` times its |trace|, or times the median |trace| of all linears where that is larger.

    Args:
        tolerance: relative standard error to reach.
        max_probes: probes after which a linear is left as it is.
        context: tokens used of each sequence, from its beginning.
    """

    tolerance: float = 0.15
    max_probes: int = 32
    context: int = 128

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.max_probes < 2:
            raise ValueError(
                f"a standard error needs at least 2 probes and a tolerance of 0 or more, not "
                f"max_probes={self.max_probes} with tolerance={self.tolerance}"
            )

    def __call__(self, network: Network, tokens: Tensor, generator: torch.Generator) -> Sensitivity:
        started, passes = perf_counter(), 0
        texts = tokens[:, : self.context].to(next(network.model.parameters()).device)
        samples: dict[str, list[float]] = {name: [] for name in network.linears}
        unfinished = list(network.linears)
        for index in range(self.max_probes):
            text = texts[index % len(texts)].unsqueeze(0)
            for name, sample in _samples(network, text, unfinished, generator):
                samples[name].append(sample)
            passes += 2 + len(unfinished)
            if index % ROUND == ROUND - 1:
                unfinished = self._unfinished(samples)
            if not unfinished:
                break
        values = {name: fmean(drawn) for name, drawn in samples.items()}
        error = {name: _standard_error(drawn) for name, drawn in samples.items()}
        _report(values, unfinished)
        return Sensitivity(values, error, perf_counter() - started, passes)

    def _unfinished(self, samples: Mapping[str, list[float]]) -> list[str]:
        sizes = {name: abs(fmean(drawn)) for name, drawn in samples.items()}
        floor = median(sizes.values())
        return [
            name for name, drawn in samples.items() if _standard_error(drawn) > self.tolerance * max(sizes[name], floor)
        ]


def _samples(
    network: Network, text: Tensor, linears: list[str], generator: torch.Generator
) -> Iterable[tuple[str, float]]:
    """zᵀHz of each linear's diagonal block, each with a new z."""
    with hessian(network, text, linears) as product:
        for name in linears:
            z = probe(network.linear(name).weight, generator)
            yield name, float(torch.sum(z * product({name: z})[name]))


def _standard_error(samples: list[float]) -> float:
    return stdev(samples) / len(samples) ** 0.5


def _report(traces: Mapping[str, float], unfinished: list[str]) -> None:
    negative = [name for name, trace in traces.items() if trace < 0]
    if negative:
        log.warning("%d of %d Hessian traces are negative: %s", len(negative), len(traces), ", ".join(negative))
    log.info("Hessian traces: %d linears, %d out of probes", len(traces), len(unfinished))
