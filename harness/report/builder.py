"""From a table's description and the rows of its source to what is printed, whatever the table."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from harness.report import display, frame, selection
from harness.report.display import Display
from harness.report.forms import absent, plain
from harness.report.sources import SOURCES, Material
from harness.report.spec import Column, TableConfig


@dataclass(frozen=True)
class Built:
    """A table ready to be written.

    Attributes:
        spec: its description.
        rows: what it shows, in full precision.
        displays: what it prints, a display a section; none where there is nothing to show.
        made: what it was made from, one line.
    """

    spec: TableConfig
    rows: pd.DataFrame
    displays: list[Display]
    made: str


def build(spec: TableConfig, material: Material) -> Built:
    """The table of that description.

    Raises:
        ValueError: it names a column that its source does not have.
    """
    source = SOURCES[spec.source](material, spec.options)
    rows = source.frame if source.frame.empty else selection.select(source.frame, spec.where)
    if not rows.empty and spec.best:
        rows = _with_company(frame.sectioned(rows))
    made = f"Made by python -m harness.report from {source.made or provenance(rows)}."
    if rows.empty:
        return Built(spec, rows, [], made)
    if "settings" in rows:
        rows = _records(spec, frame.sectioned(rows))
    spec = replace(spec, values=list(_expanded(spec.values or _all(rows, spec), rows)))
    spec = replace(spec, keys=[key for key in spec.keys if not key.optional or _varies(rows, key.value)])
    displays = [display.display(_title(key), part, spec) for key, part in _sections(rows, spec.section)]
    return Built(spec, rows, displays, made)


def provenance(rows: pd.DataFrame) -> str:
    """What records a table was made from."""
    if rows.empty:
        return "no record that it shows"
    newest = rows.sort_values(["created", "key"]).iloc[-1]
    return f"{len(rows)} records; newest {newest['created']}, git {newest['git'] or 'unknown'}"


def _records(spec: TableConfig, rows: pd.DataFrame) -> pd.DataFrame:
    """Records with gaps, averages, differences and standings as the description has them."""
    rows = frame.complete(rows) if spec.complete else rows
    if spec.over:
        rows = selection.aggregate(rows, spec.over, {c.value: c.reduce for c in spec.values if c.reduce})
    return frame.compare(rows, spec.keys[0].value) if spec.best else rows


def _with_company(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the sections that hold a reference and nothing to compare it with."""
    return rows[rows["section"].isin(rows.loc[~rows["reference"], "section"])].reset_index(drop=True)


def _sections(
    rows: pd.DataFrame, columns: list[str]
) -> Iterator[tuple[tuple[tuple[str, Hashable], ...], pd.DataFrame]]:
    for key, part in rows.groupby(columns, sort=False, dropna=False):
        values = key if isinstance(key, tuple) else (key,)
        yield tuple(zip(columns, values, strict=True)), part


def _title(key: tuple[tuple[str, Hashable], ...]) -> str:
    (_, first), *others = key
    return ", ".join([plain(first), *(f"{column} {plain(value)}" for column, value in others)])


def _all(rows: pd.DataFrame, spec: TableConfig) -> list[Column]:
    """Every column that is neither a section nor a key."""
    taken = {*spec.section, *(key.value for key in (*spec.keys, *spec.across)), "file", "machine"}
    numeric = set(rows.select_dtypes("number").columns)
    forms = {name: "figures" if name in numeric else "text" for name in rows.columns if name not in taken}
    return [Column(name.replace("_", " "), name, form) for name, form in forms.items()]


def _expanded(columns: list[Column], rows: pd.DataFrame) -> Iterator[Column]:
    """Patterns become a column for each that they match; optional columns without values go."""
    for column in columns:
        if "*" in column.value:
            before, after = column.value.split("*", 1)
            for name in (name for name in rows.columns if fnmatchcase(name, column.value)):
                stem = name[len(before) : len(name) - len(after)]
                yield replace(column, head=column.head.replace("{}", stem), value=name)
        elif column.value not in rows:
            raise ValueError(f"a table's column names {column.value}; there are {', '.join(map(str, rows))}")
        elif not column.optional or any(_shown(value) for value in rows[column.value]):
            yield column


def _varies(rows: pd.DataFrame, column: str) -> bool:
    return len({plain(value) for value in rows[column] if _shown(value)}) > 1


def _shown(value: Any) -> bool:
    return not absent(value) and value != ""
