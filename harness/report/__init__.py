"""What people look at: the comparison in the terminal, tables and figures; all of it from records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from harness.records import Record
from harness.report import frame as frames
from harness.report import style, tables, terminal

ALL: Mapping[str, str] = {}


def report(
    records: Iterable[Record], folder: Path, console: Console, name: str = tables.MAIN, labels: Mapping[str, str] = ALL
) -> list[Path]:
    """Print the comparison and write `tables/` and `figures/` in `folder`.

    Args:
        name: of the tables; figures of another comparison than the main one bear it too.
        labels: patterns (as of shells) that the labels of a record, `method` and `budget`, must match. The
            reference always counts.

    Returns:
        The paths of the files written.

    Raises:
        ValueError: there are no records, or none that match.
    """
    from harness.report import figures  # matplotlib takes a while to import, and the table need not wait

    frame = frames.build(record for record in records if _wanted(record, labels))
    terminal.show(frame, console)
    prefix = "" if name == tables.MAIN else f"{name}_"
    return [*tables.write(frame, folder / "tables", name), *figures.write(frame, folder / "figures", prefix)]


def _wanted(record: Record, labels: Mapping[str, str]) -> bool:
    return record.labels["method"] == style.REFERENCE or all(
        fnmatch(record.labels[label], pattern) for label, pattern in labels.items()
    )
