"""PyHessian (Yao et al., 2020, arXiv 1912.07145) on a language model, one linear at a time.

Its `hessian(...).trace()` gives one trace, of all parameters that require a gradient; the traces of single layers,
which HAWQ needs, are obtained by letting one weight at a time require one. Every product is over all the data. It
stops when the running mean changes by less than a tolerance, which bounds no error: the running mean moves little when
a probe happens to fall near it. What a given error takes is therefore computed from the spread of its probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import inf
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from methods.network import Network
from methods.sensitivity.hvp import differentiable

MISSING = "PyHessian is not installed, so nothing was compared with it; install the extra: pip install -e '.[bench]'"
TOLERANCE, MOST = 1e-3, 100
"""PyHessian's defaults: relative change of the running mean at which it stops, and most probes."""
RESAMPLES = 2000


def available() -> bool:
    """Whether PyHessian can be imported."""
    return find_spec("pyhessian") is not None


@dataclass(frozen=True)
class Probes:
    """What PyHessian drew for one linear.

    Attributes:
        samples: zᵀHz of each probe, fp64 [probes].
        setup: seconds of the differentiable gradient, once.
        seconds: of each probe, on average.
    """

    samples: NDArray[np.float64]
    setup: float
    seconds: float


class _NextToken(nn.Module):
    """The model as PyHessian calls it: tokens [sequences, length] to logits of all that have a next token."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.inner, self._network = network.model, network

    def forward(self, tokens: Tensor) -> Tensor:
        return self._network.logits(tokens)[:, :-1]


def _criterion(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def draw(network: Network, tokens: Tensor, linear: str, probes: int, seed: int, batch: int = 0) -> Probes:
    """Let PyHessian draw this many probes for one linear, over all of `tokens`, int64 [sequences, length].

    Data in one batch is its fastest way: the differentiable gradient is kept for all probes. More than `batch`
    sequences (0 is no bound), whose graph would not fit into memory, go through its data loader, for which it
    computes the gradient anew in every product.

    Raises:
        ValueError: PyHessian is not installed.
    """
    if not available():
        raise ValueError(MISSING)
    tool: Any = import_module("pyhessian").hessian
    with differentiable(network, tokens, [linear]), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a reference cycle, which `trace` breaks by clearing gradients
        torch.manual_seed(seed)  # PyHessian draws from the global generator
        began = perf_counter()
        data: dict[str, Any] = {"data": (tokens, tokens)}
        if 0 < batch < len(tokens):
            data = {"dataloader": [(part, part) for part in tokens.split(batch)]}
        opened = tool(_NextToken(network), _criterion, **data, cuda=tokens.is_cuda)
        middle = perf_counter()
        samples = opened.trace(maxIter=probes, tol=-inf)
        done = perf_counter()
    return Probes(np.array(samples), middle - began, (done - middle) / probes)


def stops_after(samples: NDArray[np.float64]) -> NDArray[np.int64]:
    """Probes that PyHessian's own rule takes of each row of samples [rows, probes]: int64 [rows].

    The change is divided by the mean with its sign, so that a negative one ends it at the second probe.
    """
    means = samples.cumsum(1) / np.arange(1, samples.shape[1] + 1)
    before = np.concatenate([np.zeros((len(samples), 1)), means[:, :-1]], axis=1)
    stopped = np.abs(means - before) / (before + 1e-6) < TOLERANCE
    return np.where(stopped.any(1), stopped.argmax(1) + 1, samples.shape[1]).astype(np.int64)


@dataclass(frozen=True)
class Charge:
    """What PyHessian takes for one linear.

    Attributes:
        trace, error: mean of the probes drawn and its standard error.
        probes: so many reach the standard error asked for.
        seconds: of these, with the setup.
        own_probes: mean number after which its own rule stops.
        own_seconds: of these, with the setup.
        own_error: standard error then left.
    """

    trace: float
    error: float
    probes: float
    seconds: float
    own_probes: float
    own_seconds: float
    own_error: float


def charge(drawn: Probes, target: float, generator: np.random.Generator) -> Charge:
    """The cost of a standard error of `target`, and that of PyHessian's own rule, by resampling the probes drawn."""
    count = len(drawn.samples)
    deviation = float(drawn.samples.std(ddof=1))
    resampled = drawn.samples[generator.integers(count, size=(RESAMPLES, MOST))]
    own = float(stops_after(resampled).mean())
    probes = needed(deviation**2, target)
    return Charge(
        trace=float(drawn.samples.mean()),
        error=deviation / count**0.5,
        probes=float(probes),
        seconds=float(drawn.setup + probes * drawn.seconds),
        own_probes=own,
        own_seconds=drawn.setup + own * drawn.seconds,
        own_error=deviation / own**0.5,
    )


def needed(variance: Any, target: float) -> Any:
    """Probes until the standard error is `target`, at least 1; elementwise."""
    return np.maximum(np.ceil(variance / target**2), 1)


def total_seconds(
    drawn: Mapping[str, Probes], targets: Mapping[str, float], linears: int, generator: np.random.Generator
) -> tuple[float, NDArray[np.float64]]:
    """Seconds for all linears, extrapolated from the sampled ones, and RESAMPLES bootstrap replicates of them.

    A replicate draws linears, and probes of each, with replacement.
    """

    def seconds(name: str, samples: NDArray[np.float64]) -> NDArray[np.float64]:
        one = drawn[name]
        return one.setup + one.seconds * needed(samples.var(-1, ddof=1), targets[name])

    names = list(drawn)
    point = sum(float(seconds(name, drawn[name].samples)) for name in names) * linears / len(names)
    table = np.stack(
        [
            seconds(name, samples[generator.integers(len(samples), size=(RESAMPLES, len(samples)))])
            for name in names
            for samples in [drawn[name].samples]
        ],
        axis=1,
    )
    chosen = generator.integers(len(names), size=table.shape)
    return point, np.take_along_axis(table, chosen, axis=1).mean(1) * linears


def ratio(
    theirs: float, replicates: NDArray[np.float64], ours: Sequence[float], generator: np.random.Generator
) -> tuple[float, float, float]:
    """Their seconds over the median of ours, and the 95 % interval over replicates and runs."""
    drawn = replicates / generator.choice(np.array(ours), size=len(replicates))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return theirs / float(np.median(ours)), float(low), float(high)
