"""The comparison as Markdown, LaTeX and CSV, and the list of cells that failed.

Perplexity is bold for a block's best and for those that cannot be told from it, which a dagger (Markdown,
terminal) or underline (LaTeX) marks: the border of bold is a significant difference, never a bare minimum.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from harness.records import FAILED, write_atomically
from harness.report import frame as frames
from harness.report.display import BLANK, COLUMNS, PERPLEXITY, Display, Note, display, one_line

MAIN = "comparison"
NOT_IN_CSV = ["settings", "nll", "layers", "reference", "method_name"]
MARKED = {"": "{}", frames.BEST: "**{}**", frames.TIED: "**{}** †"}
LEGEND = (
    "Perplexity per token, lower is better; ± half a 95 % bootstrap interval over sequences. "
    "Δ: difference from fp16, with the interval of the paired difference. "
    "KL: mean divergence from fp16 in nats a token; top-1: how often both agree on the next token. "
    "Bold: best of its budget, or (†) not significantly different from the best (paired 95 % interval); who stores "
    "over 2.5 % more than the budget does not compete. "
    "Bits: nominal, and as stored for the quantized linears; MB: the whole model. "
    f"{BLANK}: not run."
)


def write(frame: pd.DataFrame, folder: Path, name: str = MAIN) -> list[Path]:
    """Write `comparison.{md,tex,csv}` (or another name) and `failures.{md,csv}`; the same records give the same
    bytes."""
    displays = [display(title, rows) for title, rows in frames.sections(frame)]
    failures, failures_name = failed(frame), "failures" if name == MAIN else f"{name}_failures"
    contents = {
        f"{name}.md": markdown(displays, provenance(frame)),
        f"{name}.tex": latex(displays, provenance(frame)),
        f"{name}.csv": frame.drop(columns=NOT_IN_CSV).to_csv(index=False, lineterminator="\n"),
        f"{failures_name}.md": _failures_markdown(failures, provenance(frame)),
        f"{failures_name}.csv": failures.to_csv(index=False, lineterminator="\n"),
    }
    for file, content in contents.items():
        write_atomically(folder / file, content)
    return [folder / file for file in contents]


def provenance(frame: pd.DataFrame) -> str:
    """What the tables were made from, as one line."""
    records = frame[frame["status"] != frames.NOT_RUN].sort_values(["created", "key"])
    newest = records.iloc[-1]
    return (
        f"Made by python -m harness.report from {len(records)} records; "
        f"newest {newest['created']}, git {newest['git'] or 'unknown'}."
    )


def failed(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells that failed, and why."""
    columns = ["model", "data", "method", "budget", "seed", "reason", "key"]
    return frame.loc[frame["status"] == FAILED, columns].reset_index(drop=True)


def markdown(displays: list[Display], made: str) -> str:
    """Every section under its own heading."""
    parts = [f"<!-- {made} -->", "# Comparison", LEGEND]
    for shown in displays:
        cells = shown.cells.map(markdown_text)
        cells[PERPLEXITY] = [
            MARKED[standing].format(text) for text, standing in zip(cells[PERPLEXITY], shown.standing, strict=True)
        ]
        parts += [f"## {markdown_text(shown.title)}", _pipe_table(cells)]
        parts += [f"({i}) {markdown_text(note.text)}" for i, note in enumerate(shown.notes, 1)]
    return "\n\n".join(parts) + "\n"


def _failures_markdown(failures: pd.DataFrame, made: str) -> str:
    cells = failures.drop(columns="key").astype(str).map(one_line).map(markdown_text)
    table = _pipe_table(cells, numeric=0) if len(cells) else "No cell failed."
    return "\n\n".join([f"<!-- {made} -->", "# Failures", table]) + "\n"


def _pipe_table(cells: pd.DataFrame, numeric: int = len(COLUMNS)) -> str:
    align = ["left"] * (cells.shape[1] - numeric) + ["right"] * numeric
    return cells.to_markdown(index=False, disable_numparse=True, colalign=align)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: neither HTML nor emphasis, links, code, math or table borders."""
    escapes = str.maketrans({mark: f"\\{mark}" for mark in r"\`*_[]|~$"})
    return html.escape(text, quote=False).translate(escapes)


# What pdfTeX's fonts lack: our own signs as mathematics, anything else beyond Latin-1 as its code point.
SIGNS = str.maketrans(
    {
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "Δ": r"$\Delta$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "…": r"\ldots{}",
        "’": "'",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
    }
)


def latex(displays: list[Display], made: str) -> str:
    """One `tabular` a section, the section's label as its spanning head, its notes below."""
    parts = [f"% {made}", "% Needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}."]
    for shown in displays:
        parts.append(_tabular(shown))
        if shown.notes:
            parts.append(_notes(shown.notes))
    return "\n".join(parts)


def _tabular(shown: Display) -> str:
    keys = [column for column in ("Budget", "Method", "Seed") if column in shown.cells]
    cells = shown.cells.set_index(keys)
    cells.columns = pd.MultiIndex.from_product([[_printable(shown.title)], cells.columns])
    cells = cells.map(_printable).rename(index=_printable)
    bold, underline = "textbf:--rwrap;", "underline:--rwrap;"
    marks = [{frames.BEST: bold, frames.TIED: bold + underline}.get(standing, "") for standing in shown.standing]
    text = (
        _escaped(cells)
        .apply(lambda _: marks, subset=[name for name in cells.columns if name[-1] == PERPLEXITY])
        .to_latex(
            hrules=True,
            multirow_align="naive",
            multicol_align="c",
            clines="skip-last;data",
            column_format="l" * len(keys) + "r" * len(COLUMNS),
        )
    )
    return _between_blocks(text, len(keys) + len(COLUMNS))


def _escaped(cells: pd.DataFrame) -> Styler:
    def sign(text: Any) -> str:
        return text.translate(SIGNS)

    style = cells.style.format(sign, escape="latex")
    return style.format_index(sign, escape="latex", axis=0).format_index(sign, escape="latex", axis=1)


def _between_blocks(text: str, width: int) -> str:
    """booktabs' rules between budgets, in place of pandas' clines, which leave gaps beside them."""
    lines = text.replace(f"\\cline{{1-{width}}}", r"\midrule")
    return lines.replace("\\midrule\n\\bottomrule", r"\bottomrule")


def _notes(notes: list[Note]) -> str:
    numbers = [f"({i})" for i in range(1, len(notes) + 1)]
    texts = pd.DataFrame({"": [_printable(note.text) for note in notes]}, index=numbers)
    text = _escaped(texts).hide(axis="columns").to_latex(column_format=r"rp{0.9\linewidth}")
    return f"\\par\\smallskip\n{text}\\par\\bigskip\n"


def _printable(text: str) -> str:
    return "".join(c if (c.isprintable() and ord(c) < 256) or ord(c) in SIGNS else f"U+{ord(c):04X}" for c in text)
