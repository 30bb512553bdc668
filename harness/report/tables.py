"""The comparison as Markdown, LaTeX and CSV, and the list of cells that failed.

Perplexity is bold for a block's best and for those that cannot be told from it, which a dagger (Markdown, terminal)
or underline (LaTeX) marks: the border of bold is a significant difference, never a bare minimum.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.records import DONE, FAILED, SKIPPED, write_atomically
from harness.report import frame as frames

BLANK = "–"
WORDS = {FAILED: "fail", SKIPPED: "skip", frames.NOT_RUN: BLANK}
DIGITS = ((10, 3), (100, 2), (1000, 1), (math.inf, 0))
HUGE = 1e5
NOT_IN_CSV = ["settings", "nll", "layers", "reference", "method_name"]
LEGEND = (
    "Perplexity per token, lower is better; ± half a 95 % bootstrap interval over sequences. "
    "Δ: difference from fp16, with the interval of the paired difference. "
    "KL: mean divergence from fp16 in nats a token; top-1: how often both agree on the next token. "
    "Bold: best of its budget, or (†) not significantly different from the best (paired 95 % interval). "
    "Bits: nominal, and as stored for the quantized linears; MB: the whole model. "
    f"{BLANK}: not run."
)


def decimals(value: float, half_width: float = math.nan) -> int:
    """Four figures or so of `value`, and one at least of the half width of its interval."""
    digits = next(digits for limit, digits in DIGITS if abs(value) < limit)
    return max(digits, min(4, math.ceil(-math.log10(half_width)))) if half_width > 0 else digits


def number(value: float, digits: int) -> str:
    """Fixed point, but for numbers too large to read that way: 1.2e6."""
    if abs(value) < HUGE:
        return f"{value:.{digits}f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _small(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _interval(name: str, plus: str = "") -> Callable[[pd.Series], str]:
    def text(row: pd.Series) -> str:
        value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
        if math.isnan(value):
            return ""
        half = (high - low) / 2
        digits = decimals(value, half)
        shown = f"{plus if value >= 0 else '−'}{number(abs(value), digits)}"
        return shown if math.isnan(half) else f"{shown} ± {number(half, digits)}"

    return text


def _scaled(name: str, unit: float, digits: int) -> Callable[[pd.Series], str]:
    return lambda row: "" if math.isnan(row[name]) else f"{row[name] / unit:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A printed column: its head, and the text of a cell that is done."""

    head: str
    text: Callable[[pd.Series], str]


PERPLEXITY = "Perplexity ↓"
COLUMNS = (
    Column("Bits", lambda row: f"{row['nominal_bits']:g}"),
    Column("Stored", _scaled("effective_bits", 1, 3)),
    Column("MB", _scaled("model_bytes", 1e6, 2)),
    Column(PERPLEXITY, _interval("perplexity")),
    Column("Δ fp16 ↓", _interval("delta", "+")),
    Column("KL ↓", lambda row: _small(row["kl"])),
    Column("Top-1 % ↑", _scaled("top1", 0.01, 1)),
    Column("Quant. s", _scaled("seconds_quantize", 1, 1)),
    Column("Peak GB", _scaled("peak_bytes", 1e9, 2)),
)


@dataclass(frozen=True)
class Note:
    """Which cells have no numbers, and why: one sentence."""

    status: str
    text: str


@dataclass(frozen=True)
class Display:
    """One section, ready to print.

    Attributes:
        title: the section's label.
        cells: plain text, [row, column], by budget and method (and seed, if there are several).
        standing: of each row, as in the tidy table.
        notes: why cells were skipped or failed; the first is marked (1).
    """

    title: str
    cells: pd.DataFrame
    standing: pd.Series
    notes: list[Note]


def display(title: str, rows: pd.DataFrame) -> Display:
    """The text of every cell of one section."""
    blank = rows[rows["status"].isin([FAILED, SKIPPED])]
    reasons = blank.groupby(["status", "reason"], sort=False)
    number_of = {reason: i for i, reason in enumerate(reasons.groups, 1)}
    table = [_cells(row, number_of) for _, row in rows.iterrows()]
    cells = pd.DataFrame(table, columns=[column.head for column in COLUMNS])
    cells.insert(0, "Budget", rows["budget"].to_list())
    cells.insert(1, "Method", rows["method"].to_list())
    if rows["seed"].nunique() > 1:
        cells.insert(2, "Seed", ["" if pd.isna(seed) else str(seed) for seed in rows["seed"]])
    notes = [_note(status, reason, group) for (status, reason), group in reasons]
    return Display(title, cells, rows["standing"].reset_index(drop=True), notes)


def _cells(row: pd.Series, number_of: dict[tuple[str, str], int]) -> list[str]:
    if row["status"] == DONE:
        return [column.text(row) for column in COLUMNS]
    note = number_of.get((row["status"], row["reason"]))
    word = WORDS[row["status"]] + (f" ({note})" if note else "")
    return [word if c.head == PERPLEXITY else c.text(row) if c.head == "Bits" else "" for c in COLUMNS]


def _note(status: str, reason: str, rows: pd.DataFrame) -> Note:
    budgets = rows.groupby("budget", sort=False)["method"].unique()
    cells = "; ".join(f"{', '.join(methods)} at {budget}" for budget, methods in budgets.items())
    return Note(status, f"{cells} {status}: {_one_line(reason)}")


def write(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `comparison.{md,tex,csv}` and `failures.{md,csv}`; the same records give the same bytes."""
    displays = [display(title, rows) for title, rows in frames.sections(frame)]
    failures = failed(frame)
    contents = {
        "comparison.md": markdown(displays, provenance(frame)),
        "comparison.tex": latex(displays, provenance(frame)),
        "comparison.csv": frame.drop(columns=NOT_IN_CSV).to_csv(index=False, lineterminator="\n"),
        "failures.md": _failures_markdown(failures, provenance(frame)),
        "failures.csv": failures.to_csv(index=False, lineterminator="\n"),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


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
        cells = shown.cells.map(_markdown_text)
        column = cells.columns.get_loc(PERPLEXITY)
        for i, standing in enumerate(shown.standing):
            if standing:
                mark = " †" if standing == frames.TIED else ""
                cells.iloc[i, column] = f"**{cells.iloc[i, column]}**{mark}"
        parts += [f"## {_markdown_text(shown.title)}", _pipe_table(cells)]
        parts += [f"({i}) {_markdown_text(note.text)}" for i, note in enumerate(shown.notes, 1)]
    return "\n\n".join(parts) + "\n"


def _failures_markdown(failures: pd.DataFrame, made: str) -> str:
    cells = failures.drop(columns="key").astype(str).map(_one_line).map(_markdown_text)
    table = _pipe_table(cells, numeric=0) if len(cells) else "No cell failed."
    return "\n\n".join([f"<!-- {made} -->", "# Failures", table]) + "\n"


def _pipe_table(cells: pd.DataFrame, numeric: int = len(COLUMNS)) -> str:
    align = ["left"] * (cells.shape[1] - numeric) + ["right"] * numeric
    return cells.to_markdown(index=False, disable_numparse=True, colalign=align)


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: neither HTML nor emphasis, links, code, math or table borders."""
    escapes = str.maketrans({mark: f"\\{mark}" for mark in r"\`*_[]|~$"})
    return html.escape(text, quote=False).translate(escapes)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# What pdfTeX's fonts lack: our own signs as mathematics, anything else beyond Latin-1 as its code point.
SIGNS = str.maketrans(
    {
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "Δ": r"$\Delta$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "Ŵ": r"$\hat{W}$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
    }
)


def latex(displays: list[Display], made: str) -> str:
    """One `tabular` a section, the section's label as its spanning head, its notes below."""
    parts = [f"% {made}", "% Needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs,multirow}."]
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
    marks = pd.DataFrame("", range(len(cells)), cells.columns)
    perplexity = cells.columns[[head == PERPLEXITY for _, head in cells.columns]]
    bold, underline = "textbf:--rwrap;", "underline:--rwrap;"
    marks[perplexity] = (
        shown.standing.map({frames.BEST: bold, frames.TIED: bold + underline}).fillna("").to_frame().to_numpy()
    )
    text = (
        _escaped(cells)
        .apply(lambda _: marks.to_numpy(), axis=None)
        .to_latex(
            hrules=True,
            multirow_align="t",
            multicol_align="c",
            clines="skip-last;data",
            column_format="l" * len(keys) + "r" * len(COLUMNS),
        )
    )
    return _between_blocks(text, len(keys) + len(COLUMNS))


def _escaped(cells: pd.DataFrame) -> pd.io.formats.style.Styler:
    def sign(text: str) -> str:
        return text.translate(SIGNS)

    style = cells.style.format(sign, escape="latex")
    return style.format_index(sign, escape="latex", axis=0).format_index(sign, escape="latex", axis=1)


def _between_blocks(text: str, width: int) -> str:
    """booktabs' rules between budgets, in place of pandas' clines, which leave gaps beside them."""
    lines = text.replace(f"\\cline{{1-{width}}}", r"\midrule")
    return lines.replace("\\midrule\n\\bottomrule", r"\bottomrule")


def _notes(notes: list[Note]) -> str:
    numbered = [(f"({i})", _printable(note.text)) for i, note in enumerate(notes, 1)]
    style = _escaped(pd.DataFrame(numbered, columns=["", " "]).set_index("").rename_axis(None)).hide(axis="columns")
    return "\\par\\smallskip\n" + style.to_latex(column_format=r"rp{0.9\linewidth}") + "\\par\\bigskip\n"


def _printable(text: str) -> str:
    return "".join(c if ord(c) < 256 or ord(c) in SIGNS else f"U+{ord(c):04X}" for c in text)
