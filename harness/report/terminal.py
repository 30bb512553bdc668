"""The comparison in the terminal, with what failed and what was skipped under it in full sentences."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from harness.records import DONE, FAILED, SKIPPED
from harness.report import frame as frames
from harness.report.display import COLUMNS, PERPLEXITY, Display, display

WIDTH = 120
"""Characters that the table needs."""
STYLES = {frames.BEST: "bold green", frames.TIED: "bold"}


def show(frame: pd.DataFrame, console: Console) -> None:
    """Print every section, in `WIDTH` columns."""
    for title, rows in frames.sections(frame):
        shown = display(title, rows)
        console.print(_table(shown), end="\n")
        for i, note in enumerate(shown.notes, 1):
            console.print(Text(f"({i}) {note.text}", style="red" if note.status == FAILED else ""))
    console.print(_summary(frame))


def _table(shown: Display) -> Table:
    title = Text(shown.title, style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    keys = shown.cells.shape[1] - len(COLUMNS)
    for i, head in enumerate(shown.cells.columns):
        justify: JustifyMethod = "left" if i < keys else "right"
        table.add_column(head, justify=justify, no_wrap=head != "Method", overflow="fold")
    budgets = shown.cells["Budget"]
    first, last = budgets != budgets.shift(), budgets != budgets.shift(-1)
    cells = shown.cells.assign(Budget=budgets.where(first, ""))
    for i, row in enumerate(cells.to_dict("records")):
        texts = [_cell(head, text, shown.standing[i]) for head, text in row.items()]
        table.add_row(*texts, end_section=bool(last[i]))
    return table


def _cell(head: object, text: str, standing: str) -> Text:
    if head != PERPLEXITY or not standing:
        return Text(f"{text}  " if head == PERPLEXITY else text)
    return Text(f"{text} †" if standing == frames.TIED else f"{text}  ", style=STYLES[standing])


def _summary(frame: pd.DataFrame) -> Text:
    counts = frame["status"].value_counts()
    parts = [f"{counts.get(status, 0)} {status}" for status in (DONE, SKIPPED, FAILED, frames.NOT_RUN)]
    return Text(f"Cells: {', '.join(parts)}. † not significantly different from the best of its budget.")
