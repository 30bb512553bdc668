"""Tests of the published figures, of what may be compared with them, and of the rule that says whether ours agree."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.records import Record, digest
from harness.report import builder, frame, published, spec
from harness.report.sources import REPORTED, Material

SPECIFICATION = Path(__file__).parents[3] / "shared" / "specs" / "reported_results.csv"
MATCH = published.Match(
    models={"llama-2-7b": "LLaMA-2-7B"},
    data={"WikiText-2": "wikitext2/2048"},
    methods={"fp16": ["FP16"], "gptq": ["GPTQ", "GPTQ(act-order)"], "rtn": ["RTN"]},
    unverified=["memory"],
)


def figures(*rows: tuple[str, str, str, str, float], **changes: str) -> pd.DataFrame:
    """Published rows: paper, method, bits, group, value."""
    fixed = {"arxiv": "", "table": "1", "model": "LLaMA-2-7B", "act_bits": "16", "dataset": "WikiText-2",
             "metric": "ppl", "source": "somewhere", **changes}  # fmt: skip
    names = ["paper", "method", "weight_bits", "group_size", "value"]
    return pd.DataFrame([{**fixed, **dict(zip(names, row, strict=True))} for row in rows])[published.COLUMNS]


def record(perplexity: float, method: str = "gptq", bits: int = 4, group: int = 128, **changes: Any) -> Record:
    cell = {
        "model": {"name": "llama-2-7b"},
        "data": {"name": "wikitext2", "length": 2048, "seed": 0} | changes.pop("data", {}),
        "method": {"name": method} | changes.pop("options", {}),
        "budget": {"bits": bits, "group_size": group},
        "evaluation": {},
        "seed": changes.pop("seed", 0),
    }
    labels = {"model": cell["model"]["name"], "data": cell["data"]["name"], "method": method, "budget": "x"}
    result = {"perplexity": {"value": perplexity, "low": perplexity - 1, "high": perplexity + 1}, "effective_bits": 4.1}
    return Record(digest(cell), "done", cell, labels | changes, None, result, created="2026")


def beside(rows: pd.DataFrame, *records: Record) -> dict[str, Any]:
    (cell,) = published.beside(rows, frame.tidy(records), MATCH).to_dict("records")
    return cell


def test_the_committed_figures_are_complete() -> None:
    frame = published.read(REPORTED)
    assert len(frame) == 2017
    assert frame["value"].isna().sum() == 3  # printed as such: GPTQ and PB-LLM on LLaMA-2-70B at 2 bits
    assert (frame["source"] != "").all()
    gptq = frame[(frame["paper"] == "GPTQ") & (frame["model"] == "LLaMA-7B") & (frame["method"] == "RTN")]
    assert sorted(gptq["value"]) == [6.29, 25.54]


@pytest.mark.skipif(not SPECIFICATION.is_file(), reason="the specification of the published figures is not here")
def test_the_committed_figures_are_those_of_the_specification() -> None:
    ours, theirs = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (REPORTED, SPECIFICATION))
    pd.testing.assert_frame_equal(ours.drop(columns="source"), theirs.drop(columns="source"))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [("5.68", "five", "row 2"), ("metric", "measure", "measure"), (",here\n", ",\n", "row 2")],
)
def test_damage_is_named(old: str, new: str, error: str, tmp_path: Path) -> None:
    text = ",".join(published.COLUMNS) + "\nGPTQ,,1,LLaMA-7B,FP16,16,16,,WikiText-2,ppl,5.68,here\n"
    path = tmp_path / "reported.csv"
    path.write_text(text)
    assert len(published.read(path)) == 1
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=error):
        published.read(path)
    path.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(ValueError, match=r"row 3: .* a row twice"):
        published.read(path)


def test_missing_figures_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing"):
        published.read(tmp_path / "reported.csv")


@pytest.mark.parametrize(
    ("measured", "published_", "bits", "expected"),
    [
        (5.10, [5.0], 4, "reproduced"),  # within 2 %
        (4.89, [5.0], 4, "deviates"),
        (5.40, [5.0, 5.2, 5.8], 4, "reproduced"),  # half the range is 0.4, the median 5.2
        (5.61, [5.0, 5.2, 5.8], 4, "deviates"),
        (44.0, [152.31], 2, "same order"),
        (14.0, [152.31], 2, "other order"),
        (1600.0, [152.31], 2, "other order"),
        (600.0, [119.0], 3, "same order"),  # diverged, as published
        (101.0, [6.0], 3, "other order"),  # diverged, where it should not
        (5.0, [5.0], 2.2, "reproduced"),
        (math.nan, [5.0], 4, ""),
        (5.0, [math.nan], 4, ""),
    ],
)
def test_agreement_is_judged_by_the_rule(measured: float, published_: list[float], bits: float, expected: str) -> None:
    values = pd.Series(published_)
    assert published.verdict(measured, values.median(), values.min(), values.max(), bits) == expected


def test_publications_of_one_cell_stand_together() -> None:
    rows = figures(
        ("A", "GPTQ", "4", "128", 5.6), ("B", "GPTQ(act-order)", "4", "128", 5.8), ("C", "GPTQ", "4", "128", 6.4)
    )
    cell = beside(rows, record(5.7))
    assert (cell["published"], cell["published_low"], cell["published_high"]) == (5.8, 5.6, 6.4)
    assert (cell["papers"], cell["perplexity"], cell["verdict"]) == ("A, B, C", 5.7, "reproduced")
    assert cell["deviation"] == pytest.approx(5.7 / 5.8 - 1)


def test_figures_from_memory_do_not_count() -> None:
    rows = pd.concat(
        [figures(("A", "GPTQ", "4", "128", 5.6)), figures(("B", "GPTQ", "4", "128", 9.0), source="memory")]
    )
    assert beside(rows)["published"] == 5.6


@pytest.mark.parametrize(
    "other",
    [
        record(5.0, bits=3),
        record(5.0, group=64),
        record(5.0, group=0),
        record(5.0, method="rtn"),
        record(5.0, data={"length": 4096}),
        record(5.0, data={"name": "c4"}),
        record(5.0, options={"inputs": "int8-token"}),
        record(5.0, model="llama-2-13b"),
        replace(record(5.0), status="failed", result={}),
    ],
    ids=["bits", "group", "row", "method", "length", "text", "inputs", "model", "failed"],
)
def test_other_cells_are_not_compared(other: Record) -> None:
    cell = beside(figures(("A", "GPTQ", "4", "128", 5.6)), other)
    assert math.isnan(cell["perplexity"])
    assert (cell["cells"], cell["verdict"]) == (0, "")
    assert math.isnan(cell["deviation"])


def test_a_scale_a_row_and_full_precision_agree_by_what_they_are() -> None:
    rows = figures(("A", "GPTQ", "4", "-1", 5.8), ("A", "FP16", "16", "", 5.47), ("A", "GPTQ", "4", "", 7.0))
    cells = published.beside(rows, frame.tidy([record(5.9, group=0), record(5.5, "fp16")]), MATCH)
    assert cells[["method", "group_size", "published", "perplexity"]].to_dict("records") == [
        {"method": "fp16", "group_size": published.NONE, "published": 5.47, "perplexity": 5.5},
        {"method": "gptq", "group_size": published.ROW, "published": 5.8, "perplexity": 5.9},
    ]  # who does not say a group is not compared


def test_seeds_are_one_measurement() -> None:
    cell = beside(figures(("A", "GPTQ", "4", "128", 5.6)), *(record(5.5 + 0.1 * i, data={"seed": i}) for i in range(3)))
    assert (cell["cells"], cell["perplexity"], cell["perplexity_sd"]) == (3, pytest.approx(5.6), pytest.approx(0.1))


def test_the_table_keeps_published_and_measured_apart() -> None:
    table = builder.build(spec.load("reported"), Material(frame.tidy([record(5.70)])))
    (shown,) = (one for one in table.displays if one.title == "llama-2-7b, dataset wikitext2/2048")
    rows = [dict(zip(shown.heads, row, strict=True)) for row in shown.cells]
    (ours,) = (row for row in rows if (row["Method"], row["Bits"], row["Group"]) == ("gptq", "4", "128"))
    assert ours["Measured"] == "5.700 ± 1.000"
    assert (ours["Verdict"], ours["Deviation %"]) == ("reproduced", "+1.2")
    assert {row["Measured"] for row in rows if row is not ours} == {"not run"}
    assert {row["Deviation %"] for row in rows if row is not ours} == {""}
    assert all(row["Reported"] for row in rows)
