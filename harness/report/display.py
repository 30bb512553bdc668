"""A section of a table as text: what each cell says, which are marked, and notes on cells without numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.records import FAILED, SKIPPED
from harness.report.forms import BLANK, FORMS, NOT_RUN, one_line
from harness.report.spec import Column, TableConfig

WORDS = {FAILED: "fail", SKIPPED: "skip", NOT_RUN: BLANK}
Key = tuple[str, ...]
ALWAYS = ("nominal_bits",)
"""Values that cells without a result have too."""


@dataclass(frozen=True)
class Note:
    """Which cells have no numbers, and why: one sentence."""

    status: str
    text: str


@dataclass(frozen=True)
class Display:
    """One section, ready to print.

    Attributes:
        title: the section's label.
        keys: how many columns at the left identify a row.
        groups: what stands above each column, where values repeat; else nothing.
        heads: of each column.
        cells: plain text, [row, column].
        marks: `best`, `tied` or nothing, [row, column].
        numeric: whether each column holds numbers.
        notes: why cells were skipped or failed; the first is marked (1).
    """

    title: str
    keys: int
    groups: list[str]
    heads: list[str]
    cells: list[list[str]]
    marks: list[list[str]]
    numeric: list[bool]
    notes: list[Note]

    @property
    def blocks(self) -> list[int]:
        """The rows with which a block begins: neighbors with the same first key are one, if there are other keys."""
        if self.keys < 2:
            return [0]
        return [i for i, row in enumerate(self.cells) if i == 0 or row[0] != self.cells[i - 1][0]]


def display(title: str, rows: pd.DataFrame, spec: TableConfig) -> Display:
    """The text of every cell of one section."""
    reasons = _reasons(rows) if spec.best else {}
    numbers = {reason: i for i, reason in enumerate(reasons, 1)}
    if spec.across:
        title, rows = _reference_in_title(title, rows, spec)
    lines, tops = _grid(rows, spec)
    columns = [(top, column) for top in tops for column in spec.values]
    cells = {key: [_cell(line.get(top), c, spec, numbers) for top, c in columns] for key, line in lines.items()}
    keys = len(spec.keys)
    return Display(
        title=one_line(title),
        keys=keys,
        groups=[""] * keys + [", ".join(top) for top, _ in columns],
        heads=[column.head for column in (*spec.keys, *(column for _, column in columns))],
        cells=[[*key[:keys], *(text for text, _ in line)] for key, line in cells.items()],
        marks=[[""] * keys + [mark for _, mark in line] for line in cells.values()],
        numeric=[FORMS[column.form].number for column in (*spec.keys, *(column for _, column in columns))],
        notes=[_note(status, reason, found) for (status, reason), found in reasons.items()],
    )


def _reasons(rows: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """The rows that failed or were skipped, by status and reason."""
    blank = rows[rows["status"].isin([FAILED, SKIPPED])]
    grouped = blank.groupby(["status", "reason"], sort=False)
    return {(str(status), str(reason)): found for (status, reason), found in grouped}


def _reference_in_title(title: str, rows: pd.DataFrame, spec: TableConfig) -> tuple[str, pd.DataFrame]:
    """The reference belongs to no column where keys stand at the top."""
    if "reference" not in rows:
        return title, rows
    value = spec.values[0]
    shown = [FORMS[value.form].text(row, value.value) for row in _dicts(rows[rows["reference"]])]
    return f"{title} (fp16: {shown[0]})" if shown else title, rows[~rows["reference"]]


def _grid(rows: pd.DataFrame, spec: TableConfig) -> tuple[dict[Key, dict[Key, dict[str, Any]]], list[Key]]:
    """{keys at the left: {keys at the top: row}}, and all keys at the top. No row hides another: one whose place is
    taken gets a line of its own."""
    lines: dict[Key, dict[Key, dict[str, Any]]] = {}
    tops: dict[Key, None] = {}
    for row in _dicts(rows):
        left, top = _keys(row, spec.keys), _keys(row, spec.across)
        while top in lines.get(left, {}):
            left = (*left, "")
        lines.setdefault(left, {})[top] = row
        tops[top] = None
    return lines, list(tops)


def _dicts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return rows.to_dict("records")  # type: ignore[return-value]


def _keys(row: dict[str, Any], columns: list[Column]) -> Key:
    return tuple(FORMS[column.form].text(row, column.value) for column in columns)


def _cell(row: dict[str, Any] | None, column: Column, spec: TableConfig, numbers: dict[Any, int]) -> tuple[str, str]:
    """The text of a value, and its mark."""
    if row is None:
        return BLANK, ""
    word = WORDS.get(row["status"]) if spec.best else None
    if word is None or column.value in ALWAYS:
        mark = row["standing"] if spec.best and column.value == spec.best else ""
        return FORMS[column.form].text(row, column.value) or (BLANK if spec.across else ""), mark
    note = numbers.get((row["status"], row["reason"]))
    return (word + (f" ({note})" if note else "") if column.value == spec.best else ""), ""


def _note(status: str, reason: str, rows: pd.DataFrame) -> Note:
    budgets = rows.groupby("budget", sort=False)["method"].unique()
    cells = "; ".join(f"{', '.join(methods)} at {budget}" for budget, methods in budgets.items())
    return Note(status, one_line(f"{cells} {status}: {reason}"))
