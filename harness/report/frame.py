"""Records as one tidy table: a row a cell, a column a quantity; and how the rows of a section differ.

A *section* holds what may stand in one table: cells of one model, text and evaluation. A *block* is a
section's cells of one budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from harness.metrics import NUMERIC, metrics
from harness.records import DONE, Record, canonical
from harness.report import parts, style
from harness.report.forms import NOT_RUN
from harness.report.standing import BEST, DIFFERENCE, EXCESS, TIED, differences, standings

__all__ = ["BEST", "DIFFERENCE", "EXCESS", "NOT_RUN", "TIED", "build", "sections", "slugs"]

TEXTS = ("reason", "key", "created", "git")
INTERNAL = ["cell", "settings", "nll", "layers", "reference", "method_name"]
"""Columns that are for the report's own use."""


def build(records: Iterable[Record]) -> pd.DataFrame:
    """The tidy table of all records, ordered for print.

    Of records with equal model, data, evaluation, method, budget and seeds the latest counts. The reference
    stands once in each section. Combinations of a section's methods and budgets that have no record get a row
    with the status `not run`. `delta…` is the difference from the reference (of the mean negative
    log-likelihood, and of perplexity) with its paired 95 % interval; `standing` is that of `standing.standings`.

    Raises:
        ValueError: there are no records.
    """
    frame = tidy(records)
    if frame.empty:
        raise ValueError("there are no records to report; run a cell or a sweep first: python -m harness --help")
    return compare(complete(sectioned(frame)))


def tidy(records: Iterable[Record]) -> pd.DataFrame:
    """A row a cell, typed; without records, no rows."""
    rows = [_row(record) for record in records]
    return _typed(_latest(pd.DataFrame(rows))) if rows else pd.DataFrame()


def sectioned(frame: pd.DataFrame) -> pd.DataFrame:
    """With the column `section`: `model on data`, and the settings in which sections of one model and text differ."""
    labels = {}
    for (model, data), rows in frame.groupby(["model", "data"]):
        distinct = sorted(rows["settings"].unique())
        settings = pd.json_normalize([json.loads(text) for text in distinct]).map(str)
        varying = settings.loc[:, settings.nunique() > 1]
        for key, values in zip(distinct, varying.to_dict("records"), strict=True):
            differing = ", ".join(f"{name}={value}" for name, value in values.items())
            labels[model, data, key] = f"{model} on {data}" + (f" with {differing}" if differing else "")
    identity = frame[["model", "data", "settings"]].itertuples(index=False, name=None)
    return _ordered(frame.assign(section=[labels[row] for row in identity]))


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """With rows of the status `not run` for the methods and budgets of a section that were not combined."""
    return _ordered(_typed(pd.concat([frame, *_not_run(frame)], ignore_index=True)))


def compare(frame: pd.DataFrame, block: str = "budget") -> pd.DataFrame:
    """With every row's difference from its section's reference, and its standing in its block."""
    return frame.join(differences(frame)).join(standings(frame, [block]))


def sections(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each section's label and rows."""
    for section, rows in frame.groupby("section", sort=False):
        yield str(section), rows


def slugs(frame: pd.DataFrame) -> dict[str, str]:
    """A file name for each section: the model's name where that is enough, and always different."""
    names: dict[str, str] = {}
    models = {section: str(rows["model"].iloc[0]) for section, rows in sections(frame)}
    for section, model in models.items():
        alone = list(models.values()).count(model) == 1
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model if alone else section).strip("-.")[:80] or "model"
        same = sum(name == stem or name.startswith(f"{stem}--") for name in names.values())
        names[section] = f"{stem}--{same + 1}" if same else stem
    return names


def _row(record: Record) -> dict[str, Any]:
    cell, method = record.cell, record.cell["method"]["name"]
    reference, budget = method == style.REFERENCE, cell["budget"]
    bound = record.result if reference else budget
    return {
        "model": record.labels["model"],
        "data": record.labels["data"],
        "method": record.labels["method"],
        "method_name": method,
        "budget": "–" if reference else record.labels["budget"],
        "seed": cell["seed"],
        "data_seed": cell["data"].get("seed", 0),
        "nominal_bits": bound.get("bits") or bound.get("effective_bits"),
        **parts.of(record),
        "reference": reference,
        "status": record.status,
        "reason": record.reason,
        **metrics(record),
        "quantize_peak_bytes": record.cost.get("quantize_peak_bytes"),
        "key": record.key,
        "created": record.created,
        "git": record.environment.get("git"),
        "settings": canonical(_settings(cell)),
        "nll": np.asarray(record.result.get("nll", []), dtype=float),
        "layers": record.result.get("layers", []),
        "cell": cell,
    }


def _settings(cell: dict[str, Any]) -> dict[str, Any]:
    """What the cells of a section share. `data.seed` chooses calibration text only, and may differ."""
    data = {name: value for name, value in cell["data"].items() if name != "seed"}
    return {"model": cell["model"], "data": data, "evaluation": cell["evaluation"]}


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    numeric = [*NUMERIC, "quantize_peak_bytes", "nominal_bits", "input_bits"]
    frame[numeric] = frame[numeric].astype(float)
    frame[["seed", "data_seed"]] = frame[["seed", "data_seed"]].astype("Int64")
    frame[list(TEXTS)] = frame[list(TEXTS)].fillna("")
    return frame


def _latest(frame: pd.DataFrame) -> pd.DataFrame:
    """The latest record of each cell; of the reference, which no budget or seed changes, the latest done."""
    identity = ["model", "data", "settings", "method", "budget"]
    age = frame.assign(done=frame["status"] == DONE).sort_values(["created", "key"])
    reference = age[age["reference"]].sort_values("done", kind="stable").drop_duplicates(identity, keep="last")
    others = age[~age["reference"]].drop_duplicates([*identity, "seed", "data_seed"], keep="last")
    return pd.concat([reference, others], ignore_index=True).drop(columns="done")


def _not_run(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    for _, rows in sections(frame[~frame["reference"]]):
        shared = rows[["section", "model", "data", "settings"]].iloc[:1]
        methods = rows[["method", "method_name"]].drop_duplicates("method")
        budgets = rows[["budget", "nominal_bits"]].drop_duplicates("budget")
        pairs = shared.merge(methods, how="cross").merge(budgets, how="cross")
        pairs = pairs.merge(rows[["method", "budget"]].drop_duplicates(), how="left", indicator="record")
        blank = pairs[pairs["record"] == "left_only"].drop(columns="record")
        if len(blank):
            yield blank.assign(reference=False, status=NOT_RUN)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    order = frame.assign(rank=frame["method_name"].map(style.rank), block=~frame["reference"])
    columns = ["section", "block", "nominal_bits", "budget", "rank", "method", "seed", "data_seed"]
    return order.sort_values(columns).drop(columns=["rank", "block"]).reset_index(drop=True)
