"""Outcomes of all models and seeds as one tidy table with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.home_ground.ranks import ALL
from harness.home_ground.study import CHANNEL, FULL, GROUP, RANDOM, UNIFORM, Outcome
from harness.intervals import RESAMPLES, Estimate

Floats: TypeAlias = NDArray[np.float64]
CELL = ["model", "grid", "budget", "method", "plan", "rounding"]
RIVAL = ["model", "grid", "budget", "rounding"]
"""What a plan has in common with the uniform one that it is compared with."""
MIXED = "hawq_v3"
"""The Hessian's plan in the ablation."""


def estimate(values: Floats) -> Estimate:
    """The mean of [seeds, examples] and its 95 % interval: seeds and, across them, examples are drawn anew.

    All seeds answer the same test examples, so that an example that is drawn counts for every seed.
    """
    seeds, examples = values.shape
    drawn = np.einsum("rs,rs->r", _weights(seeds), _weights(examples) @ values.T)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


@lru_cache
def _weights(count: int) -> Floats:
    """How much each of `count` samples weighs in each resample: [resamples, count], rows of sum 1."""
    return np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


def frame(outcomes: Mapping[tuple[str, int], Sequence[Outcome]]) -> pd.DataFrame:
    """A row an outcome of every (model, seed), with the answers as arrays in `correct` and `losses`."""
    rows = [
        {"model": model, "seed": str(seed)} | vars(outcome)
        for (model, seed), found in outcomes.items()
        for outcome in found
    ]
    return pd.DataFrame(rows)


def tidy(answers: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and loss of every outcome of every seed, and of all seeds together, with intervals.

    `delta_…` is the paired difference from the uniform plan on the same grid, budget and rounding, and
    `above_random` the share of random plans, rounded to nearest, that lose more. Random plans are taken together
    where seeds are.
    """
    pooled = answers.assign(plan=answers["plan"].where(answers["method"] != RANDOM, 0))
    return pd.concat([_rows(answers, [*CELL, "seed"]), _rows(pooled, CELL)], ignore_index=True)


def _rows(answers: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    rival = [*RIVAL, "seed"] if "seed" in cell else RIVAL
    uniform = {_key(key): part for key, part in answers[answers["method"] == UNIFORM].groupby(rival)}
    rows = []
    for key, part in answers.groupby(cell, sort=False):
        row = {"seed": ALL} | dict(zip(cell, _key(key), strict=True))
        row |= {"bits": part["bits"].mean()}
        base = uniform.get(tuple(row[name] for name in rival))
        for name, column in (("accuracy", "correct"), ("loss", "losses")):
            own = _by_seed(part, column)
            row |= _named(name, estimate(own))
            if base is not None and row["method"] != UNIFORM:
                row |= _named(f"delta_{name}", estimate(own - _by_seed(base, column)))
        row["above_random"] = _above_random(part, answers)
        rows.append(row)
    return pd.DataFrame(rows)


def _by_seed(part: pd.DataFrame, column: str) -> Floats:
    """[seeds, examples]; several plans of a seed are averaged."""
    return np.stack([np.stack(list(own[column])).mean(0) for _, own in part.groupby("seed")])


def _above_random(part: pd.DataFrame, answers: pd.DataFrame) -> float:
    """The mean over seeds; NaN for what was not rounded to nearest, or was not compared with random plans."""
    shares = []
    for _, row in part.iterrows():
        same = (answers[["model", "grid", "budget", "seed"]] == [row.model, row.grid, row.budget, row.seed]).all(axis=1)
        rivals = answers[same & (answers["method"] == RANDOM)]
        if row.rounding == "nearest" and len(rivals) and row.method != RANDOM:
            shares.append(float(np.mean([losses.mean() > row.losses.mean() for losses in rivals["losses"]])))
    return float(np.mean(shares)) if shares else float("nan")


def ablation(answers: pd.DataFrame) -> pd.DataFrame:
    """Q-BERT's 2×2: what groups, the Hessian and both together change in the loss, against uniform widths per channel;
    a row a (model, budget, rounding), all seeds together."""
    rows = []
    chosen = answers[answers["method"].isin([UNIFORM, MIXED])]
    for (model, budget, rounding), part in chosen.groupby(["model", "budget", "rounding"], sort=False):
        cells = dict(list(part.groupby(["grid", "method"])))
        plain, grouped = (_by_seed(cells[grid, UNIFORM], "losses") for grid in (CHANNEL, GROUP))
        mixed, both = (_by_seed(cells[grid, MIXED], "losses") for grid in (CHANNEL, GROUP))
        row: dict[str, Any] = {"model": model, "budget": budget, "rounding": rounding}
        for name, values in (
            ("uniform", plain),
            ("groups", grouped - plain),
            ("hessian", mixed - plain),
            ("both", both - plain),
            ("interaction", both - grouped - mixed + plain),
        ):
            row |= _named(name, estimate(values))
        rows.append(row)
    return pd.DataFrame(rows)


def reference(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the full-precision models, all seeds together."""
    return table[(table["method"] == FULL) & (table["seed"] == ALL)]


def _named(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _key(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)
