"""Every metric on one model: a score for each linear at each width, what it cost, and how its ranking agrees with
the truth, which is the measured increase of the loss on text that no metric has seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from harness.sensitivity.correlation import kendall, spearman
from harness.session import Clock, Session
from methods.base import Stat
from methods.formats.base import Format
from methods.sensitivity.base import Metric, Sensitivity, Subject, entry
from methods.sensitivity.measured import Measured

log = logging.getLogger(__name__)

PRICED = " Ω"  # what allocation makes of a score


@dataclass(frozen=True)
class Study:
    """What was found.

    Attributes:
        scores: a row a (metric, linear, format), with `value` and `error`. A score that knows no format has the
            same value in all.
        costs: a row a metric: seconds, passes, peak_gb; `reason` where it could not be measured.
    """

    scores: pd.DataFrame
    costs: pd.DataFrame


def subject(session: Session, formats: Sequence[Format], stats: frozenset[Stat], seed: int) -> Subject:
    """What a metric looks at: scoring text for losses, calibration text for statistics."""
    clock = Clock()
    return Subject(
        session.network,
        session.windows.scoring.to(session.device),
        session.windows.calibration.to(session.device),
        tuple(formats),
        session.statistics(stats, clock),
        seed,
        session.memo(session.windows.scoring, clock, "sensitivity"),
        session.meter,
    )


def run(
    session: Session,
    metrics: Iterable[Metric],
    truth: Measured,
    formats: Sequence[Format],
    seed: int = 0,
    announce: Callable[[str, Sensitivity | str], None] = lambda *_: None,
) -> Study:
    """Measure the truth on test text and every metric on scoring text.

    A metric that cannot be measured on this model says why and is left out; the others go on.

    Args:
        announce: told the name of each metric and its result, or the reason why there is none.
    """
    metrics = list(metrics)
    given = subject(session, formats, frozenset().union(*(m.needs for m in metrics), truth.needs), seed)
    unseen = session.windows.test
    test = replace(given, tokens=unseen.to(session.device), memo=session.memo(unseen, Clock(), "sensitivity"))
    rows: list[pd.DataFrame] = []
    costs: list[dict[str, object]] = []
    for name, metric, seen in [("truth", truth, test), *((m.name, m, given) for m in metrics)]:
        try:
            found = seen.measure(metric)
        except (ValueError, FloatingPointError) as error:
            announce(name, str(error))
            costs.append({"metric": name, "reason": str(error)})
            continue
        announce(name, found)
        rows += _rows(name, metric, found, seen)
        cost = found.cost
        costs.append({"metric": name, "seconds": cost.seconds, "passes": cost.passes, "peak_gb": cost.peak_bytes / 1e9})
    return Study(_without_repeats(pd.concat(rows, ignore_index=True)), pd.DataFrame(costs))


def _rows(name: str, metric: Metric, found: Sensitivity, seen: Subject) -> Iterable[pd.DataFrame]:
    """The metric's own values, and the losses that allocation makes of a score where they rank differently."""
    linears = seen.network.linears
    own = {n: {f: found.values[entry(n, f) if metric.per_format else n] for f in seen.formats} for n in linears}
    error = {n: {f: found.error[entry(n, f) if metric.per_format else n] for f in seen.formats} for n in linears}
    yield _tidy(name, own, error)
    if not metric.per_format:
        losses = metric.losses(found, seen.network, seen.formats)
        if any(_ranks(own, fmt) != _ranks(losses, fmt) for fmt in seen.formats):
            yield _tidy(name + PRICED, losses, None)


def _without_repeats(scores: pd.DataFrame) -> pd.DataFrame:
    """Without the Ω of a score that ranks as another metric does: HAWQ-V2's is that of Hutchinson's trace."""
    order = scores.groupby(["metric", "format"], sort=False)["value"].rank()
    ranks = {name: tuple(part) for name, part in order.groupby(scores["metric"], sort=False)}
    kept: dict[tuple[float, ...], str] = {}
    for name in sorted(ranks, key=lambda name: name.endswith(PRICED)):
        kept.setdefault(ranks[name], name)
    repeats = {name for name in ranks if name.endswith(PRICED) and kept[ranks[name]] != name}
    return scores[~scores["metric"].isin(repeats)].reset_index(drop=True)


def _ranks(values: Mapping[str, Mapping[Format, float]], fmt: Format) -> list[str]:
    return sorted(values, key=lambda name: values[name][fmt])


def _tidy(
    metric: str, values: Mapping[str, Mapping[Format, float]], error: Mapping[str, Mapping[Format, float]] | None
) -> pd.DataFrame:
    rows = [
        {
            "metric": metric,
            "linear": name,
            "format": fmt.name,
            "bits": fmt.bits,
            "value": value,
            "error": np.nan if error is None else error[name][fmt],
        }
        for name, row in values.items()
        for fmt, value in row.items()
    ]
    return pd.DataFrame(rows)


def agreement(scores: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of every metric with the truth in each format: a row a (metric, format).

    Columns: spearman, spearman_low, spearman_high, kendall, kendall_low, kendall_high. Linears are the samples.
    """
    rows = []
    for fmt, table in scores.groupby("format", sort=False):
        wide = table.pivot(index="linear", columns="metric", values="value")
        for metric in table["metric"].unique():
            if metric == "truth":
                continue
            pair = wide[metric].to_numpy(float), wide["truth"].to_numpy(float)
            row: dict[str, object] = {"metric": metric, "format": fmt, "bits": table["bits"].iloc[0]}
            for kind, correlate in (("spearman", spearman), ("kendall", kendall)):
                found = correlate(*pair)
                row |= {kind: found.value, f"{kind}_low": found.low, f"{kind}_high": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def matrix(scores: pd.DataFrame, fmt: str) -> pd.DataFrame:
    """Spearman's ρ between all metrics, the truth first, in one format."""
    chosen = scores[scores["format"] == fmt]
    wide = chosen.pivot(index="linear", columns="metric", values="value")[list(chosen["metric"].unique())]
    return wide.corr(method="spearman")
