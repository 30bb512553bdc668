"""Tables as Markdown, LaTeX and CSV files; the same records give the same bytes.

Values are bold for a block's best and for those that cannot be told from it, which a dagger (Markdown, terminal) or
underline (LaTeX) marks: the border of bold is a significant difference, never a bare minimum.
"""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd

from harness.records import write_atomically
from harness.report import frame as frames
from harness.report.builder import Built
from harness.report.display import Display
from harness.report.forms import NOT_RUN
from harness.report.latex import latex

MAIN = "comparison"
FAILURES = "failures"
MARKED = {"": "{}", frames.BEST: "**{}**", frames.TIED: "**{}** †"}


def write(built: Built, folder: Path, name: str) -> list[Path]:
    """Write `NAME.md`, `NAME.tex` and `NAME.csv`."""
    rows = built.rows.drop(columns=frames.INTERNAL, errors="ignore")
    if rows.columns.empty:  # a file without columns is no table to those who read it
        rows = pd.DataFrame({"status": [NOT_RUN]})
    contents = {
        f"{name}.md": markdown(built),
        f"{name}.tex": latex(built.displays, built.spec.legend if built.displays else built.spec.nothing, built.made),
        f"{name}.csv": rows.to_csv(index=False, lineterminator="\n", float_format="%.15g"),
    }
    for file, content in contents.items():
        write_atomically(folder / file, content)
    return [folder / file for file in contents]


def markdown(built: Built) -> str:
    """Every section under its own heading."""
    parts = [f"<!-- {built.made} -->", f"# {built.spec.title}"]
    if not built.displays:
        return "\n\n".join([*parts, built.spec.nothing]) + "\n"
    parts += [markdown_text(one) for one in [built.spec.legend.strip()] if one]
    for shown in built.displays:
        parts += [f"## {markdown_text(shown.title)}"] if shown.title else []
        parts += [_pipe_table(shown)]
        parts += [f"({i}) {markdown_text(note.text)}" for i, note in enumerate(shown.notes, 1)]
    return "\n\n".join(parts) + "\n"


def _pipe_table(shown: Display) -> str:
    heads = [" ".join(filter(None, pair)) for pair in zip(shown.groups, shown.heads, strict=True)]
    rows = [
        [MARKED[mark].format(markdown_text(text)) for text, mark in zip(cells, marks, strict=True)]
        for cells, marks in zip(shown.cells, shown.marks, strict=True)
    ]
    table = pd.DataFrame(rows, columns=[markdown_text(head) for head in heads])
    align = ["right" if number else "left" for number in shown.numeric]
    return str(table.to_markdown(index=False, disable_numparse=True, colalign=align))


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: neither HTML nor emphasis, links, code, math or table borders."""
    escapes = str.maketrans({mark: f"\\{mark}" for mark in r"\`*_[]|~$"})
    return html.escape(text, quote=False).translate(escapes)
