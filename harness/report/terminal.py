"""A table in the terminal, with what failed and what was skipped under it in full sentences."""

from __future__ import annotations

import textwrap

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.records import DONE, FAILED, SKIPPED
from harness.report.builder import Built
from harness.report.display import Display
from harness.report.forms import BLANK, NOT_RUN
from harness.report.standing import BEST, TIED

WIDTH = 120
"""Characters that the main table needs."""
STYLES = {"": "", BEST: "bold green", TIED: "bold"}
SIGNS = {"": "  ", BEST: "  ", TIED: " †"}
LABEL = 22
"""Characters that labels have at least before they wrap."""
GAP, EDGES = 2, 3
"""Characters between columns; and beside the table, with the label's own space."""


def show(built: Built, console: Console) -> None:
    """Print every section. A table that does not fit widens the console: labels wrap, and no number is cut."""
    if not built.displays:
        console.print(Text(f"{built.spec.title}: {built.spec.nothing}"))
    for shown in built.displays:
        _print(shown, console)
        for i, note in enumerate(shown.notes, 1):
            console.print(Text(f"({i}) {note.text}", style="red" if note.status == FAILED else ""))
    if "standing" in built.rows:
        console.print(_summary(built))


def _print(shown: Display, console: Console) -> None:
    """One section: a block's name stands above its rows, and the next key labels them."""
    label = min(shown.keys, 2) - 1
    columns = range(label + 1, len(shown.heads))
    texts = [[_text(shown, row, column) for column in columns] for row in range(len(shown.cells))]
    heads, room = _fitted(
        shown, label, [max(text.cell_len for text in column) for column in zip(*texts, strict=True)], console
    )
    table = Table(
        title=Text(shown.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column(shown.heads[label], width=room)
    for head, column in zip(heads, columns, strict=True):
        table.add_column(Text(head), justify="right" if shown.numeric[column] else "left", no_wrap=True)
    blocks = {*shown.blocks}
    for i, row in enumerate(shown.cells):
        if label and i in blocks and row[0] != BLANK:
            table.add_row(Text(row[0], style="italic"))
        table.add_row(_wrapped(row[label], room), *texts[i], end_section=i + 1 in blocks)
    console.print(table, end="\n")


def _fitted(shown: Display, label: int, widths: list[int], console: Console) -> tuple[list[str], int]:
    """The heads of the columns behind the labels, and the characters for labels. Heads stand on one line and labels
    have `LABEL` characters if that fits; else both wrap, and if that does not fit either, the console gets wider."""
    heads = [
        "\n".join(filter(None, pair)) for pair in zip(shown.groups[label + 1 :], shown.heads[label + 1 :], strict=True)
    ]
    labels = [shown.heads[label], *(row[label] for row in shown.cells)]
    longest, word = max(map(len, labels)), max(len(part) + 2 for text in labels for part in text.split() or [""])
    wrapped = [
        head.replace(" ", "\n") if cell_len(head) > width else head for head, width in zip(heads, widths, strict=True)
    ]
    for choice, least in ((heads, min(LABEL, longest)), (wrapped, min(LABEL, word))):
        taken = EDGES + sum(_width(head, width) + GAP for head, width in zip(choice, widths, strict=True))
        if taken + least <= console.width:
            return choice, min(longest, console.width - taken)
    console.width = taken + least
    return wrapped, least


def _width(head: str, width: int) -> int:
    return max(width, *map(cell_len, head.splitlines()))


def _text(shown: Display, row: int, column: int) -> Text:
    """The marks of a column with any stand behind its numbers, which stay aligned."""
    text, mark = shown.cells[row][column], shown.marks[row][column]
    marked = any(marks[column] for marks in shown.marks)
    return Text(text + (SIGNS[mark] if marked else ""), style=STYLES[mark])


def _wrapped(label: str, width: int) -> Text:
    """At spaces where it can be, with what follows set in."""
    lines = textwrap.wrap(label, width, subsequent_indent="  ", break_on_hyphens=False)
    return Text("\n".join(lines))


def _summary(built: Built) -> Text:
    counts = built.rows["status"].value_counts()
    parts = [f"{counts.get(status, 0)} {status}" for status in (DONE, SKIPPED, FAILED, NOT_RUN)]
    return Text(f"Cells: {', '.join(parts)}. † not significantly different from the best of its block.")
