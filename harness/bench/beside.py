"""Traces of all linears beside PyHessian, at equal standard error; and what the cheaper Gauss-Newton trace ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from harness.bench.measure import SIZES, Point, random_network
from harness.bench.peer import Charge, Probes, charge, draw, ratio, total_seconds
from harness.bench.tables import grid, markdown, spread
from harness.calibration import as_statistics
from harness.data import DataConfig, load_texts, windows
from harness.intervals import Estimate
from harness.models import ModelConfig, load
from harness.sensitivity.correlation import spearman
from methods.base import Context
from methods.budget import Budget
from methods.formats.base import Format
from methods.mixed import Mixed
from methods.network import Network
from methods.recipe import Recipe
from methods.sensitivity.base import Metric, Sensitivity, Subject
from methods.sensitivity.gauss_newton import GaussNewton
from methods.sensitivity.hutchinson import Hutchinson
from methods.sensitivity.hvp import mean_loss
from methods.sensitivity.substitution import substituted


@dataclass
class PeerConfig:
    """The comparison with PyHessian."""

    model: str = "package:tiny"
    """A directory, `package:NAME`, or a size of random model such as 4M."""
    sequences: int = 32
    length: int = 128
    """Tokens a sequence."""
    tolerance: float = 0.15
    """Standard error of every trace, relative to it, or to the median magnitude of all traces where that is larger."""
    max_probes: int = 1024
    """Of ours, and as many drawn labelings."""
    every: int = 4
    """PyHessian is measured on every so many linears, and extrapolated to all."""
    probes: int = 12
    """That PyHessian draws for each of these."""
    repeats: int = 3
    """Runs of ours, with different seeds."""
    widths: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int = 128
    effective_bits: float = 3.25
    """Of the plans that are compared."""
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """A model with its texts, int64 [sequences, length]: `seen` for traces, `unseen` for the losses of plans."""

    network: Network
    seen: Tensor
    unseen: Tensor


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


@dataclass(frozen=True)
class Plans:
    """What allocation makes of two rankings.

    Attributes:
        agreement: share of linears with the same width.
        rises: increase of the loss on unseen text when all linears are rounded by the plan of H, and of GN: mean and
            standard error over sequences.
        difference: the increase by the plan of GN minus that of H, likewise, paired.
    """

    agreement: float
    rises: tuple[tuple[float, float], tuple[float, float]]
    difference: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """What was found; `ratios` are PyHessian's seconds over ours with their 95 % intervals."""

    config: PeerConfig
    hessian: Runs
    gauss_newton: Runs
    charges: dict[str, Charge]
    total: float
    ratios: dict[str, tuple[float, float, float]]
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
            if name in self.charges:
                row |= {f"pyhessian_{key}": value for key, value in asdict(self.charges[name]).items()}
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
    options: dict[str, Any] = {"tolerance": config.tolerance, "context": config.length}
    hutchinson = Hutchinson(max_probes=config.max_probes, **options)
    gauss_newton = GaussNewton(max_draws=config.max_probes, **options)
    hessian, fisher = (repeated(metric, subject, config.repeats) for metric in (hutchinson, gauss_newton))
    scales = references(hessian.traces)
    targets = {name: config.tolerance * scale for name, scale in scales.items()}
    generator = np.random.default_rng(config.seed)
    drawn = {
        name: draw(network, text.seen, name, config.probes, config.seed + i)
        for i, name in enumerate(network.linears[:: config.every])
    }
    total, replicates = total_seconds(drawn, targets, len(network.linears), generator)
    both = [_sensitivity(runs) for runs in (hessian, fisher)]
    losses = [metric.losses(found, network, formats) for metric, found in zip((hutchinson, gauss_newton), both)]
    narrow = formats[min(1, len(formats) - 1)]
    return Comparison(
        config,
        hessian,
        fisher,
        {name: charge(one, targets[name], generator) for name, one in drawn.items()},
        total,
        {
            "hutchinson": ratio(total, replicates, hessian.seconds, generator),
            "gauss_newton": ratio(total, replicates, fisher.seconds, generator),
        },
        spearman(*(np.array([row[name][narrow] for name in network.linears]) for row in losses)),
        plans(text, budget, losses[0], losses[1]),
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


def _sensitivity(runs: Runs) -> Sensitivity:
    return Sensitivity(runs.traces, runs.errors)


Losses = Mapping[str, Mapping[Format, float]]


def plans(text: Text, budget: Budget, hessian: Losses, gauss_newton: Losses) -> Plans:
    """The plans of least total loss by either, and what they do to unseen text, rounded to nearest."""
    generator = torch.Generator().manual_seed(0)
    statistics = as_statistics(text.network, {})
    context = Context(text.network, text.seen, text.seen, statistics, budget, generator)
    method = Mixed()
    chosen = []
    for losses in (hessian, gauss_newton):
        recipes = {name: {Recipe(fmt): loss for fmt, loss in row.items()} for name, row in losses.items()}
        chosen.append({name: recipe.weight for name, recipe in method.plan(context, recipes).items()})
    before = _sequence_losses(text)
    rises = [_sequence_losses(text, plan) - before for plan in chosen]
    same = fmean(chosen[0][name] == chosen[1][name] for name in text.network.linears)
    return Plans(same, (_mean(rises[0]), _mean(rises[1])), _mean(rises[1] - rises[0]))


@torch.no_grad()
def _sequence_losses(text: Text, plan: Mapping[str, Format] | None = None) -> Tensor:
    """Mean next-token loss of each unseen sequence, with weights rounded by the plan: fp64 [sequences]."""
    with ExitStack() as stack:
        for name, fmt in (plan or {}).items():
            weight = text.network.weight(name)
            stack.enter_context(substituted(text.network, name, fmt.fit(weight).snap(weight)))
        losses = [float(mean_loss(text.network, sequence.unsqueeze(0))) for sequence in text.unseen]
    return torch.tensor(losses, dtype=torch.float64)


def _mean(samples: Tensor) -> tuple[float, float]:
    return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)


LEGEND = (
    "Traces of the loss’s Hessian, one for every linear, to a standard error of {tolerance:g} times the trace, or the "
    "median magnitude of all traces where that is larger. Ours ran to the end, {repeats} times. PyHessian was measured "
    "on every {every}th linear, {probes} probes each, over all {sequences} × {length} tokens in one batch; from the "
    "spread of its probes follow how many the same error takes, and from its seconds for setup and a probe the time, "
    "which is extrapolated to all linears in proportion to their number. Its error leaves out the choice of text, which "
    "ours includes: ours takes the next sequence for each probe, PyHessian all of them. Brackets of ratios: 95 % "
    "interval by resampling linears, probes and our runs."
)


def page(found: Comparison, header: str) -> str:
    """The comparison as Markdown."""
    rows = [_ours("Hutchinson, ours", found.hessian), _ours("Gauss-Newton, ours (another matrix)", found.gauss_newton)]
    count, measured = len(found.hessian.traces), list(found.charges.values())
    scales = references(found.hessian.traces)

    def total(value: Callable[[Charge], float]) -> float:
        return fmean(map(value, measured)) * count

    own_error = median(charged.own_error / scales[name] for name, charged in found.charges.items())
    rows += [
        _row("PyHessian, same error", f"{found.total:.3g}", f"{total(lambda c: c.probes):.0f} probes", "as asked"),
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
    ours, fisher, plan = found.ratios["hutchinson"], found.ratios["gauss_newton"], found.plans
    z = [(c.trace - found.hessian.traces[n]) / np.hypot(c.error, found.hessian.errors[n]) for n, c in found.charges.items()]
    rho, (low, high) = found.correlation.value, (found.correlation.low, found.correlation.high)
    alike = plan.agreement == 1
    verdict = (
        "On this model both lead to the same plan."
        if alike
        else "On this model the two do not rank alike: they are different matrices, and the second ratio is one of the "
        "cost of ranking linears, not of computing the same number."
    )
    (h, h_error), (g, g_error), (d, d_error) = *plan.rises, plan.difference
    return [
        f"Seconds of PyHessian over those of our Hutchinson, at equal error: **{spread(*ours)}**. "
        f"Over those of our Gauss-Newton trace, at equal relative error of another matrix: **{spread(*fisher)}**.",
        f"Both Hutchinson estimates agree if differences are about one standard error: theirs are "
        f"{float(np.sqrt(np.mean(np.square(z)))):.2f} (root mean square over the linears that PyHessian did).",
        f"Spearman’s ρ of Ω = tr/n · ‖ΔW‖² between Hessian and Gauss-Newton: {rho:.2f} [{low:.2f}, {high:.2f}]. "
        f"Plans of {found.config.effective_bits:g} bits give {100 * plan.agreement:.0f} % of the linears the same width. "
        f"Rounded to nearest, they raise the loss on unseen text by {h:.4f} ± {h_error:.4f} (Hessian) and "
        f"{g:.4f} ± {g_error:.4f} (Gauss-Newton) nats a token; paired difference {d:+.4f} ± {d_error:.4f}. {verdict}",
    ]
