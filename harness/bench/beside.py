"""Traces of all linears beside PyHessian, at equal standard error; and what the cheaper Gauss-Newton trace ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from harness.bench.measure import SIZES, Point, random_network
from harness.bench.peer import Charge, charge, draw, ratio, total_seconds
from harness.bench.plans import Plans, Text, plans
from harness.bench.tables import grid, markdown, spread
from harness.calibration import as_statistics
from harness.data import DataConfig, load_texts, windows
from harness.intervals import Estimate
from harness.models import ModelConfig, load
from harness.sensitivity.correlation import spearman
from methods.budget import Budget
from methods.sensitivity.base import Metric, Sensitivity, Subject
from methods.sensitivity.gauss_newton import GaussNewton
from methods.sensitivity.hutchinson import Hutchinson


@dataclass
class PeerConfig:
    """The comparison with PyHessian."""

    model: str = "package:tiny"
    """A directory, `package:NAME`, or a size of random model such as 4M."""
    sequences: int = 256
    """Half of what HAWQ-V2 takes at least. PyHessian's products cost more with each of them, ours do not."""
    length: int = 128
    """Tokens a sequence."""
    tolerance: float = 0.15
    """Standard error of every trace, relative to it, or to the median magnitude of all traces where that is larger."""
    max_probes: int = 1024
    """Of ours, and as many drawn labelings."""
    batch: int = 64
    """Sequences that PyHessian takes at once; more go through its data loader."""
    every: int = 13
    """PyHessian is measured on every so many linears, and extrapolated to all."""
    probes: int = 3
    """That PyHessian draws for each of these."""
    repeats: int = 2
    """Runs of ours, with different seeds."""
    widths: list[int] = field(default_factory=lambda: [2, 3, 4, 8])
    group_size: int = 128
    effective_bits: float = 3.25
    """Of the plans that are compared."""
    seed: int = 0


@dataclass(frozen=True)
class Runs:
    """An estimate of all traces, several times.

    Attributes:
        traces: linear to the mean over runs.
        errors: linear to the standard error of one run, on average.
        seconds: of each run.
        passes: of each run.
        worst: largest standard error of any linear and run, in units of `PeerConfig.tolerance`'s reference.
    """

    traces: dict[str, float]
    errors: dict[str, float]
    seconds: list[float]
    passes: list[int]
    worst: float


Ratio: TypeAlias = tuple[float, float, float]
"""A number and its 95 % interval."""


@dataclass(frozen=True)
class Peer:
    """PyHessian.

    Attributes:
        charges: of the linears that it was measured on.
        seconds: for all linears, at equal error.
        over_hutchinson, over_gauss_newton: the same over our seconds.
    """

    charges: dict[str, Charge]
    seconds: float
    over_hutchinson: Ratio
    over_gauss_newton: Ratio


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        fmt: the format that Ω is compared in.
        correlation: Spearman's ρ over linears between the Ω of Hessian and Gauss-Newton traces.
        plans: what allocation makes of either.
    """

    config: PeerConfig
    hessian: Runs
    gauss_newton: Runs
    peer: Peer
    fmt: str
    correlation: Estimate
    plans: Plans

    @property
    def linears(self) -> pd.DataFrame:
        """A row a linear: traces and errors of all three, and what PyHessian was charged where it was measured."""
        rows = []
        for name, trace in self.hessian.traces.items():
            row: dict[str, Any] = {"linear": name, "hutchinson": trace, "hutchinson_error": self.hessian.errors[name]}
            row |= {"gauss_newton": self.gauss_newton.traces[name]}
            row |= {"gauss_newton_error": self.gauss_newton.errors[name]}
            if name in self.peer.charges:
                row |= {f"pyhessian_{key}": value for key, value in asdict(self.peer.charges[name]).items()}
            rows.append(row)
        return pd.DataFrame(rows)


def compare(config: PeerConfig, device: str) -> Comparison:
    """Measure ours on all linears and PyHessian on some of them.

    Raises:
        ValueError: PyHessian is not installed, or there is no such model.
    """
    text = _text(config, device)
    network = text.network
    budget = Budget(effective_bits=config.effective_bits, group_size=config.group_size)
    formats = tuple(budget.format(width) for width in config.widths)
    subject = Subject(network, text.seen, text.seen, formats, as_statistics(network, {}), config.seed)
    metrics = (
        Hutchinson(config.tolerance, config.max_probes, config.length),
        GaussNewton(config.tolerance, config.max_probes, config.length),
    )
    hessian, fisher = (repeated(metric, subject, config.repeats) for metric in metrics)
    h_losses, g_losses = (
        metric.losses(Sensitivity(runs.traces, runs.errors), network, formats)
        for metric, runs in zip(metrics, (hessian, fisher), strict=True)
    )
    narrow = formats[min(1, len(formats) - 1)]
    h, g = (np.array([losses[name][narrow] for name in network.linears]) for losses in (h_losses, g_losses))
    return Comparison(
        config,
        hessian,
        fisher,
        _pyhessian(text, config, hessian, fisher),
        narrow.name,
        spearman(h, g),
        plans(text, budget, h_losses, g_losses),
    )


def _pyhessian(text: Text, config: PeerConfig, hessian: Runs, fisher: Runs) -> Peer:
    names = text.network.linears
    targets = {name: config.tolerance * scale for name, scale in references(hessian.traces).items()}
    generator = np.random.default_rng(config.seed)
    draw(text.network, text.seen, names[0], 1, config.seed, config.batch)  # the first products of a shape are slower
    drawn = {
        name: draw(text.network, text.seen, name, config.probes, config.seed + i, config.batch)
        for i, name in enumerate(names[:: config.every])
    }
    total, replicates = total_seconds(drawn, targets, len(names), generator)
    return Peer(
        {name: charge(one, targets[name], generator) for name, one in drawn.items()},
        total,
        ratio(total, replicates, hessian.seconds, generator),
        ratio(total, replicates, fisher.seconds, generator),
    )


def _text(config: PeerConfig, device: str) -> Text:
    if config.model in SIZES:
        point = Point("metric", Hutchinson.name, SIZES[config.model], config.length, config.sequences, device=device)
        network = random_network(point)
        shape, generator = (2 * config.sequences, config.length), torch.Generator().manual_seed(config.seed)
        tokens = torch.randint(point.size.vocabulary, shape, generator=generator).to(device)
        return Text(network, tokens[: config.sequences], tokens[config.sequences :])
    loaded = load(ModelConfig(path=config.model), device)
    data = DataConfig(length=config.length, calibration_sequences=1, scoring_sequences=config.sequences)
    cut = windows(load_texts(data), loaded.tokenizer, data, loaded.context)
    return Text(loaded.network, cut.scoring.to(device), cut.test.to(device))


def repeated(metric: Metric, subject: Subject, repeats: int) -> Runs:
    """The metric with as many seeds."""
    found = [metric(replace(subject, seed=subject.seed + run)) for run in range(repeats)]
    traces = {name: fmean(one.values[name] for one in found) for name in found[0].values}
    return Runs(
        traces,
        {name: fmean(one.error[name] for one in found) for name in traces},
        [one.cost.seconds for one in found],
        [one.cost.passes for one in found],
        max(one.error[name] / scale for one in found for name, scale in references(one.values).items()),
    )


def references(traces: Mapping[str, float]) -> dict[str, float]:
    """What the tolerance of each linear is relative to: its |trace|, or the median of all, the larger of them."""
    floor = median(map(abs, traces.values()))
    return {name: max(abs(trace), floor) for name, trace in traces.items()}


LEGEND = (
    "Traces of the loss’s Hessian, one for every linear, to a standard error of {tolerance:g} times the trace, or the "
    "median magnitude of all traces where that is larger. Ours ran to the end, {repeats} times. PyHessian was measured "
    "on every {every}th linear, {probes} probes each, over all {sequences} × {length} tokens, in one batch or, beyond "
    "{batch} sequences, through its data loader; from the spread of its probes follow how many the same error takes, "
    "and from its seconds for setup and a probe the time, "
    "which is extrapolated to all linears in proportion to their number. Its error leaves out the choice of text, "
    "which ours includes: ours takes the next sequence for each probe, PyHessian all of them, so that its products "
    "cost less, and say less, with less text. Brackets: of seconds, fastest and slowest run; of ratios, the 95 % "
    "interval by resampling linears, probes and our runs."
)


def page(found: Comparison, header: str) -> str:
    """The comparison as Markdown."""
    rows = [_ours("Hutchinson, ours", found.hessian), _ours("Gauss-Newton, ours (another matrix)", found.gauss_newton)]
    count, measured = len(found.hessian.traces), list(found.peer.charges.values())
    scales = references(found.hessian.traces)

    def total(value: Callable[[Charge], float]) -> float:
        return fmean(map(value, measured)) * count

    own_error = median(charged.own_error / scales[name] for name, charged in found.peer.charges.items())
    rows += [
        _row(
            "PyHessian, same error",
            f"{found.peer.seconds:.3g}",
            f"{total(lambda c: c.probes):.0f} probes",
            f"{found.config.tolerance:g} (asked for)",
        ),
        _row(
            "PyHessian, own rule (change below 1e-3, at most 100 probes)",
            f"{total(lambda c: c.own_seconds):.3g}",
            f"{total(lambda c: c.own_probes):.0f} probes",
            f"{own_error:.2g} (median)",
        ),
    ]
    return markdown(
        "Beside PyHessian",
        [LEGEND.format(**asdict(found.config)), f"Measured on {header}.", grid(rows), *_sentences(found)],
    )


def _ours(name: str, runs: Runs) -> dict[str, str]:
    seconds = spread(median(runs.seconds), min(runs.seconds), max(runs.seconds))
    return _row(name, seconds, f"{median(runs.passes):.0f} passes", f"{runs.worst:.2g} (largest)")


def _row(name: str, seconds: str, work: str, error: str) -> dict[str, str]:
    return {"estimate": name, "seconds": seconds, "work": work, "relative standard error": error}


def _sentences(found: Comparison) -> list[str]:
    """What the table does not say: ratios, agreement with PyHessian, and whether the two matrices rank alike."""
    hessian, peer, rho, plan = found.hessian, found.peer, found.correlation, found.plans
    own = len(hessian.seconds) ** -0.5  # the mean of the runs is nearer than each
    distances = [
        (charged.trace - hessian.traces[name]) / np.hypot(charged.error, own * hessian.errors[name])
        for name, charged in peer.charges.items()
    ]
    (h, h_error), (g, g_error), (d, d_error) = *plan.rises, plan.difference
    verdict = "the same plan" if plan.agreement == 1 else "different plans"
    return [
        f"Seconds of PyHessian over those of our Hutchinson, at equal error: **{spread(*peer.over_hutchinson)}**. "
        "Over those of our Gauss-Newton trace, at equal relative error of another matrix: "
        f"**{spread(*peer.over_gauss_newton)}**.",
        "PyHessian’s traces differ from ours by "
        f"{float(np.sqrt(np.mean(np.square(distances)))):.2f} standard errors (root mean square over its linears), "
        "where 1 or less is expected of estimates of the same number.",
        f"Spearman’s ρ between Hessian and Gauss-Newton of Ω = tr/n · ‖ΔW‖² in {found.fmt}: "
        f"{rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]. Plans of {found.config.effective_bits:g} bits give "
        f"{100 * plan.agreement:.0f} % of the linears the same width. Rounded to nearest, they raise the loss on "
        f"unseen text by {h:.4f} ± {h_error:.4f} (Hessian) and {g:.4f} ± {g_error:.4f} (Gauss-Newton) nats a token; "
        f"paired difference {d:+.4f} ± {d_error:.4f}. On this model the two matrices lead to {verdict}: the second "
        "ratio compares the cost of two rankings, not of the same number.",
    ]
