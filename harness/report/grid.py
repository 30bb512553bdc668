"""Tables as the page shows them: heads and cells, each cell with its text and the number that it sorts by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from harness.report.forms import decimals, number, one_line

TECHNICAL = ("key", "git", "created")
"""Columns that only programs need; the CSV has them."""
UNITS = {"bytes": ("MB", 1e6)}
"""Last words of columns that are shown in another unit."""
WORDS = {"gb": "GB", "kl": "KL", "id": "ID", "gptq": "GPTQ", "pyhessian": "PyHessian", "spearman": "Spearman’s ρ"}
LONG = 36
"""Characters from which on a text may wrap."""
MOST_CHOICES, MOST_FILTERS = 40, 4
FEW = 3
"""Rows up to which columns of one value stay columns."""
NUMBER = re.compile(r"([+−-]?\d[\d,]*(?:\.\d+)?(?:e[+−-]?\d+)?)%?(?: [±×/\[–†].*)?")
"""A number as tables print it: alone, or with an interval, a mark or a second number behind it."""


@dataclass(frozen=True)
class Cell:
    """One cell: plain text, its sort key (of numbers), a hint on hovering, and whether it is best of its block."""

    text: str
    order: str = ""
    hint: str = ""
    best: bool = False


@dataclass(frozen=True)
class Head:
    """The head of a column: `kind` is num, text or long; `choices` are values to filter by, if they repeat."""

    text: str
    kind: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A table ready to print; `shared` are columns that have one value in all rows."""

    heads: list[Head]
    rows: list[list[Cell]]
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def filters(self) -> list[tuple[int, Head]]:
        """The first few columns to filter by, and where they stand."""
        return [(i, head) for i, head in enumerate(self.heads) if head.choices][:MOST_FILTERS]


def printed(heads: list[str], rows: list[list[Cell]]) -> Grid:
    """A table that was printed before. Columns are numbers where most of what they say is."""
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in heads]
    kinds = [_mostly_numbers(column) for column in columns]
    return Grid(
        [_head(text, column, kind) for text, column, kind in zip(heads, columns, kinds, strict=True)],
        [[_sortable(cell) if kind else cell for cell, kind in zip(row, kinds, strict=True)] for row in rows],
    )


def generic(frame: pd.DataFrame) -> Grid:
    """Any table: technical and empty columns left out, `x`, `x_low` and `x_high` as one column."""
    paired = [name for name in frame if {f"{name}_low", f"{name}_high"} <= {*frame}]
    ends = {f"{name}_{end}" for name in paired for end in ("low", "high")}
    empty = {name for name in frame if (frame[name].isna() | (frame[name].astype(str) == "")).all()}
    kept = [str(name) for name in frame if name not in ends | empty and name not in TECHNICAL]
    columns = {name: _column(frame, name) for name in kept}
    same = [name for name in kept if len(frame) > FEW and frame[name].nunique(dropna=False) == 1]
    shown = [name for name in kept if name not in same]
    return Grid(
        [_head(_words(name), columns[name], _numeric(frame[name])) for name in shown],
        [list(row) for row in zip(*(columns[name] for name in shown), strict=True)],
        {_words(name): columns[name][0].text for name in same},
    )


def interval(value: float, low: float, high: float) -> Cell:
    """`value ± half width`; the hint has both ends, as intervals may be lopsided."""
    half = (high - low) / 2
    if math.isnan(half) or half <= 0:
        return Cell(_plain(value), _order(value))
    digits = decimals(value, half)
    least = 0.5 * 10**-digits
    fixed = half >= least and (abs(value) >= least or value == 0)
    shown, spread = (number(abs(value), digits), number(half, digits)) if fixed else (_plain(abs(value)), _plain(half))
    return Cell(f"{_sign(value)}{shown} ± {spread}", _order(value), f"{_plain(low)} to {_plain(high)}")


def _column(frame: pd.DataFrame, name: str) -> list[Cell]:
    """The cells of one column, with its interval if it has one."""
    if not _numeric(frame[name]):
        return [Cell("" if pd.isna(value) else one_line(str(value))) for value in frame[name]]
    values = frame.reindex(columns=[name, f"{name}_low", f"{name}_high"]).astype(float)
    values /= UNITS.get(name.rpartition("_")[2], ("", 1.0))[1]
    if values[name].dropna().mod(1).eq(0).all() and values.iloc[:, 1].isna().all():
        return [Cell(_plain(value, whole=True), _order(value)) for value in values[name]]
    return [interval(*row) for row in values.itertuples(index=False, name=None)]


def _words(name: str) -> str:
    """A column's name as a head: words, with units."""
    first, _, last = name.rpartition("_")
    words = [*first.split("_"), UNITS[last][0]] if last in UNITS else name.split("_")
    text = " ".join(WORDS.get(word, word) for word in words if word)
    return text[:1].upper() + text[1:]


def _head(text: str, cells: list[Cell], numeric: bool) -> Head:
    if numeric:
        return Head(text, "num")
    values = [cell.text for cell in cells if cell.text]
    distinct = tuple(dict.fromkeys(values))
    choose = 2 <= len(distinct) <= MOST_CHOICES and len(distinct) < len(values)
    return Head(text, "long" if max(map(len, values), default=0) > LONG else "text", distinct if choose else ())


def _mostly_numbers(column: list[Cell]) -> bool:
    said = [cell.text for cell in column if cell.text]
    return sum(NUMBER.fullmatch(text) is not None for text in said) > len(said) / 2


def _sortable(cell: Cell) -> Cell:
    found = NUMBER.fullmatch(cell.text)
    return Cell(cell.text, found[1].replace("−", "-").replace(",", "") if found else "", cell.hint, cell.best)


def _numeric(values: pd.Series) -> bool:
    return is_numeric_dtype(values) and not is_bool_dtype(values)


def _plain(value: float, whole: bool = False) -> str:
    """A number without interval, to about four figures."""
    if math.isnan(value):
        return ""
    if whole:
        return f"{_sign(value)}{abs(value):,.0f}"
    if 0 < abs(value) < 1e-3:
        return _sign(value) + re.sub("e-0?", "e−", f"{abs(value):.1e}")
    return _sign(value) + number(abs(value), 4 if abs(value) < 1 else decimals(value))


def _sign(value: float) -> str:
    return "−" if value < 0 else ""


def _order(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:.9g}"
