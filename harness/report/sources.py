"""Where the rows of a table come from: the records, committed CSV files, or published figures beside the records."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.report import published
from harness.report.forms import NOT_RUN

REPORTED = Path(__file__).parents[2] / "results" / "reported.csv"
"""The published figures come with the project."""


@dataclass(frozen=True)
class Material:
    """All that tables may read.

    Attributes:
        records: the tidy table of `frame.tidy`.
        measured: the folder of the CSV files that benchmarks and audits commit.
        reported: the CSV file of published figures.
    """

    records: pd.DataFrame
    measured: Path = Path("results/tables")
    reported: Path = REPORTED


@dataclass(frozen=True)
class Rows:
    """Rows of a table before anything is chosen from them, and what they were made from, as a phrase."""

    frame: pd.DataFrame
    made: str = ""


def _records(material: Material, options: Mapping[str, Any]) -> Rows:
    """The records; what they were made from depends on which are chosen."""
    del options
    return Rows(material.records)


def _csv(material: Material, options: Mapping[str, Any]) -> Rows:
    """The rows of CSV files, with the columns `file` (its name without ending) and `machine` (its first line, if that
    is a comment).

    Args:
        options: `files`, patterns of names.
    """
    paths = sorted({path for pattern in options["files"] for path in material.measured.glob(pattern)})
    frames = [_read(path) for path in paths]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return Rows(frame, ", ".join(path.name for path in paths) or f"no file {' or '.join(options['files'])}")


def _read(path: Path) -> pd.DataFrame:
    text = path.read_text()
    head, _, rest = text.partition("\n")
    comment, body = (head.lstrip("# "), rest) if head.startswith("#") else ("", text)
    try:
        frame = pd.read_csv(io.StringIO(body), float_precision="round_trip")
    except ValueError as error:
        raise ValueError(f"{path} is no table of comma-separated values ({error}); write it again") from error
    return frame.assign(file=path.stem, machine=comment)


def _reported(material: Material, options: Mapping[str, Any]) -> Rows:
    """Published figures beside what was measured, see `published.beside`."""
    figures = published.read(material.reported)
    frame = published.beside(figures, material.records, published.Match(**options))
    return Rows(frame, f"{material.reported.name} and {_measured(frame)}")


def _measured(frame: pd.DataFrame) -> str:
    cells = int(frame["cells"].gt(0).sum())
    return f"{cells} measured cells" if cells else f"no record ({NOT_RUN})"


SOURCES: dict[str, Callable[[Material, Mapping[str, Any]], Rows]] = {
    "records": _records,
    "csv": _csv,
    "reported": _reported,
}
