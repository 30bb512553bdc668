"""What people look at: the comparison in the terminal, tables and figures; all of it from records alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from harness.records import Record
from harness.report import frame as frames
from harness.report import tables, terminal


def report(records: Iterable[Record], folder: Path, console: Console) -> list[Path]:
    """Print the comparison and write `tables/` and `figures/` in `folder`.

    Returns:
        The paths of the files written.

    Raises:
        ValueError: there are no records.
    """
    from harness.report import figures  # matplotlib takes a while to import, and the table need not wait

    frame = frames.build(records)
    terminal.show(frame, console)
    return [*tables.write(frame, folder / "tables"), *figures.write(frame, folder / "figures")]
