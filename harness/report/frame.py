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

from harness.intervals import paired_difference
from harness.metrics import NUMERIC, metrics
from harness.records import DONE, Record, canonical
from harness.report import style

NOT_RUN = "not run"
BEST, TIED = "best", "tied"
EXCESS = 1.025
"""Stored bits over those of the budget, up to which cells compete: a group index, or a width for each group."""

TEXTS = ("reason", "key", "created", "git")
DIFFERENCE = ("delta_nll", "delta_nll_low", "delta_nll_high", "delta", "delta_low", "delta_high")


def build(records: Iterable[Record]) -> pd.DataFrame:
    """The tidy table of all records, ordered for print.

    Of records with equal model, data, evaluation, method, budget and seed the latest counts. The reference
    stands once in each section. Combinations of a section's methods and budgets that have no record get a row
    with the status `not run`. `delta…` is the difference from the reference (of the mean negative
    log-likelihood, and of perplexity) with its paired 95 % interval; `standing` is `best` for the lowest
    perplexity of a block, and `tied` where the paired interval of the difference from the best contains zero.

    Raises:
        ValueError: there are no records.
    """
    rows = [_row(record) for record in records]
    if not rows:
        raise ValueError("there are no records to report; run a cell or a sweep first: python -m harness --help")
    frame = _latest(pd.DataFrame(rows))
    frame["section"] = _section_labels(frame)
    frame = pd.concat([frame, *_not_run(frame)], ignore_index=True)
    frame[list(NUMERIC)] = frame[list(NUMERIC)].astype(float)
    frame["seed"] = frame["seed"].astype("Int64")
    frame[list(TEXTS)] = frame[list(TEXTS)].fillna("")
    frame = _ordered(frame)
    return frame.join(_differences(frame)).join(_standings(frame))


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
        "nominal_bits": bound.get("bits") or bound.get("effective_bits"),
        "reference": reference,
        "status": record.status,
        "reason": record.reason,
        **metrics(record),
        "key": record.key,
        "created": record.created,
        "git": record.environment.get("git"),
        "settings": canonical(_settings(cell)),
        "nll": np.asarray(record.result.get("nll", []), dtype=float),
        "layers": record.result.get("layers", []),
    }


def _settings(cell: dict[str, Any]) -> dict[str, Any]:
    """What the cells of a section share. `data.seed` chooses calibration text only, and may differ."""
    data = {name: value for name, value in cell["data"].items() if name != "seed"}
    return {"model": cell["model"], "data": data, "evaluation": cell["evaluation"]}


def _latest(frame: pd.DataFrame) -> pd.DataFrame:
    """The latest record of each cell; of the reference, which no budget or seed changes, the latest done."""
    identity = ["model", "data", "settings", "method", "budget"]
    age = frame.assign(done=frame["status"] == DONE).sort_values(["created", "key"])
    reference = age[age["reference"]].sort_values("done", kind="stable").drop_duplicates(identity, keep="last")
    others = age[~age["reference"]].drop_duplicates([*identity, "seed"], keep="last")
    return pd.concat([reference, others], ignore_index=True).drop(columns="done")


def _section_labels(frame: pd.DataFrame) -> pd.Series:
    """`model on data`, and the settings in which sections of one model and text differ."""
    labels = {}
    for (model, data), rows in frame.groupby(["model", "data"]):
        distinct = sorted(rows["settings"].unique())
        settings = pd.json_normalize([json.loads(text) for text in distinct]).map(str)
        varying = settings.loc[:, settings.nunique() > 1]
        for key, values in zip(distinct, varying.to_dict("records"), strict=True):
            differing = ", ".join(f"{name}={value}" for name, value in values.items())
            labels[model, data, key] = f"{model} on {data}" + (f" with {differing}" if differing else "")
    return pd.Series(
        [labels[row] for row in frame[["model", "data", "settings"]].itertuples(index=False, name=None)],
        frame.index,
    )


def _not_run(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Rows for the methods and budgets of a section that were not combined."""
    for _, rows in sections(frame[~frame["reference"]]):
        shared = rows[["section", "model", "data", "settings"]].iloc[:1]
        methods = rows[["method", "method_name"]].drop_duplicates("method")
        budgets = rows[["budget", "nominal_bits"]].drop_duplicates("budget")
        pairs = shared.merge(methods, how="cross").merge(budgets, how="cross")
        pairs = pairs.merge(rows[["method", "budget"]], how="left", indicator="record")
        blank = pairs[pairs["record"] == "left_only"].drop(columns="record")
        if len(blank):
            yield blank.assign(reference=False, status=NOT_RUN)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    order = frame.assign(rank=frame["method_name"].map(style.rank), block=~frame["reference"])
    order = order.sort_values(["section", "block", "nominal_bits", "budget", "rank", "method", "seed"])
    return order.drop(columns=["rank", "block"]).reset_index(drop=True)


def _differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Every row against its section's reference; rows that cannot be compared stay blank."""
    found = pd.DataFrame(np.nan, frame.index, list(DIFFERENCE))
    for _, rows in sections(frame[frame["status"] == DONE]):
        for _, reference in rows[rows["reference"]].iterrows():
            for index, row in rows[~rows["reference"]].iterrows():
                if _comparable(row, reference):
                    nll = _difference(row, reference)
                    found.loc[index] = [*nll, *(reference["perplexity"] * np.expm1(nll))]
    return found


def _standings(frame: pd.DataFrame) -> pd.Series:
    """Who is best in each block, and who cannot be told from the best. One cell alone is neither.

    Cells that stored more than their budget do not compete: their perplexity is that of other bits.
    """
    standing: dict[Any, str] = {}
    within = ~(frame["effective_bits"] > EXCESS * frame["limit_bits"])  # without a limit, all are
    contenders = frame[~frame["reference"] & (frame["status"] == DONE) & within]
    for _, block in contenders.groupby(["section", "budget"]):
        best, *others = [row for _, row in block.sort_values("perplexity", kind="stable").iterrows()]
        rivals = [row for row in others if _comparable(row, best)]
        if rivals:
            standing[best.name] = BEST
        for rival in rivals:
            _, low, _ = _difference(rival, best)
            standing[rival.name] = TIED if low <= 0 else ""
    return pd.Series([standing.get(index, "") for index in frame.index], frame.index, name="standing")


def _difference(row: pd.Series, other: pd.Series) -> np.ndarray:
    """Mean NLL of `row` minus that of `other`, and the ends of the paired interval."""
    estimate = paired_difference(row["nll"], other["nll"])
    return np.array([estimate.value, estimate.low, estimate.high])


def _comparable(row: pd.Series, other: pd.Series) -> bool:
    """Whether both were measured on the same sequences."""
    same = row["tokens"] == other["tokens"] and row["length"] == other["length"]
    return bool(same and len(row["nll"]) == len(other["nll"]) > 0)
