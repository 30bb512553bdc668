"""The comparison in the terminal, with what failed and what was skipped under it in full sentences."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.records import DONE, FAILED, SKIPPED
from harness.report import frame as frames
from harness.report.tables import COLUMNS, PERPLEXITY, Display, display

STYLES = {frames.BEST: "bold green", frames.TIED: "bold"}


def show(frame: pd.DataFrame, console: Console) -> None:
    """Print every section; it fits 120 columns."""
    for title, rows in frames.sections(frame):
        shown = display(title, rows)
        console.print(_table(shown), end="\n")
        for i, note in enumerate(shown.notes, 1):
            console.print(Text(f"({i}) {note.text}", style="red" if note.status == FAILED else ""))
    console.print(_summary(frame))


def _table(shown: Display) -> Table:
    table = Table(title=Text(shown.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    numeric = len(COLUMNS)
    for i, head in enumerate(shown.cells.columns):
        right = i >= shown.cells.shape[1] - numeric
        table.add_column(head, justify="right" if right else "left", no_wrap=head != "Method", overflow="fold")
    budgets = shown.cells["Budget"]
    for i, (_, row) in enumerate(shown.cells.iterrows()):
        first = i == 0 or budgets[i] != budgets[i - 1]
        last = i + 1 == len(budgets) or budgets[i] != budgets[i + 1]
        row["Budget"] = row["Budget"] if first else ""
        table.add_row(*(_cell(head, text, shown.standing[i]) for head, text in row.items()), end_section=last)
    return table


def _cell(head: object, text: str, standing: str) -> Text:
    if head != PERPLEXITY or not standing:
        return Text(f"{text}  " if head == PERPLEXITY else text)
    return Text(f"{text} †" if standing == frames.TIED else f"{text}  ", style=STYLES[standing])


def _summary(frame: pd.DataFrame) -> Text:
    counts = frame["status"].value_counts()
    parts = [f"{counts.get(status, 0)} {status}" for status in (DONE, SKIPPED, FAILED, frames.NOT_RUN)]
    return Text(f"Cells: {', '.join(parts)}. † not significantly different from the best of its budget.")
