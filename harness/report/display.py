"""The comparison as text: what each cell of a table says, and the notes on cells without numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.records import DONE, FAILED, SKIPPED
from harness.report import frame as frames

BLANK = "–"
WORDS = {FAILED: "fail", SKIPPED: "skip", frames.NOT_RUN: BLANK}
DIGITS = ((10, 3), (100, 2), (1000, 1))
HUGE = 1e5


def decimals(value: float, half_width: float = math.nan) -> int:
    """Four figures or so of `value`, and one at least of the half width of its interval."""
    digits = next((digits for limit, digits in DIGITS if abs(value) < limit), 0)
    return max(digits, min(4, math.ceil(-math.log10(half_width)))) if half_width > 0 else digits


def number(value: float, digits: int) -> str:
    """Fixed point, but for numbers too large to read that way: 1.2e6."""
    if abs(value) < HUGE:
        return f"{value:.{digits}f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _small(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _interval(name: str, plus: str = "") -> Callable[[pd.Series], str]:
    def text(row: pd.Series) -> str:
        value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
        if math.isnan(value):
            return ""
        half = (high - low) / 2
        digits = decimals(value, half)
        shown = f"{plus if value >= 0 else '−'}{number(abs(value), digits)}"
        return shown if math.isnan(half) else f"{shown} ± {number(half, digits)}"

    return text


def _scaled(name: str, unit: float, digits: int) -> Callable[[pd.Series], str]:
    return lambda row: "" if math.isnan(row[name]) else f"{row[name] / unit:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A printed column: its head, and the text of a cell that is done."""

    head: str
    text: Callable[[pd.Series], str]


PERPLEXITY = "Perplexity ↓"
COLUMNS = (
    Column("Bits", lambda row: f"{row['nominal_bits']:g}"),
    Column("Stored", _scaled("effective_bits", 1, 3)),
    Column("MB", _scaled("model_bytes", 1e6, 2)),
    Column(PERPLEXITY, _interval("perplexity")),
    Column("Δ fp16 ↓", _interval("delta", "+")),
    Column("KL ↓", lambda row: _small(row["kl"])),
    Column("Top-1 % ↑", _scaled("top1", 0.01, 1)),
    Column("Quant. s", _scaled("seconds_quantize", 1, 1)),
    Column("Peak GB", _scaled("peak_bytes", 1e9, 2)),
)


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
        cells: plain text, [row, column], by budget and method (and seed, if there are several).
        standing: of each row, as in the tidy table.
        notes: why cells were skipped or failed; the first is marked (1).
    """

    title: str
    cells: pd.DataFrame
    standing: pd.Series
    notes: list[Note]


def display(title: str, rows: pd.DataFrame) -> Display:
    """The text of every cell of one section."""
    blank = rows[rows["status"].isin([FAILED, SKIPPED])]
    reasons = blank.groupby(["status", "reason"], sort=False)
    number_of = {reason: i for i, (reason, _) in enumerate(reasons, 1)}
    table = [_cells(row, number_of) for _, row in rows.iterrows()]
    cells = pd.DataFrame(table, columns=[column.head for column in COLUMNS])
    cells.insert(0, "Budget", rows["budget"].to_list())
    cells.insert(1, "Method", rows["method"].to_list())
    if rows["seed"].nunique() > 1:
        cells.insert(2, "Seed", ["" if pd.isna(seed) else str(seed) for seed in rows["seed"]])
    notes = [_note(str(status), str(reason), group) for (status, reason), group in reasons]
    return Display(one_line(title), cells, rows["standing"].reset_index(drop=True), notes)


def _cells(row: pd.Series, number_of: dict[Any, int]) -> list[str]:
    if row["status"] == DONE:
        return [column.text(row) for column in COLUMNS]
    note = number_of.get((row["status"], row["reason"]))
    word = WORDS[row["status"]] + (f" ({note})" if note else "")
    return [word if c.head == PERPLEXITY else c.text(row) if c.head == "Bits" else "" for c in COLUMNS]


def _note(status: str, reason: str, rows: pd.DataFrame) -> Note:
    budgets = rows.groupby("budget", sort=False)["method"].unique()
    cells = "; ".join(f"{', '.join(methods)} at {budget}" for budget, methods in budgets.items())
    return Note(status, f"{cells} {status}: {one_line(reason)}")


def one_line(text: str) -> str:
    """With single spaces between words, whatever the line breaks were."""
    return " ".join(text.split())
