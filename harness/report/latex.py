"""Tables as booktabs LaTeX, for any engine: what is not ASCII becomes a command, or its code point."""

from __future__ import annotations

from itertools import groupby

from harness.report.display import Display, Note
from harness.report.standing import BEST, TIED

MARKED = {"": "{}", BEST: r"\textbf{{{}}}", TIED: r"\textbf{{\underline{{{}}}}}"}
ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "Δ": r"$\Delta$",
    "†": r"$\dagger$",
    "≤": r"$\leq$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "…": r"\ldots{}",
    "’": "'",
    "½": r"$\frac12$",
}


def latex(displays: list[Display], legend: str, made: str) -> str:
    """One `tabular` a section, its label as its spanning head, its notes below; `legend` under them all."""
    parts = [f"% {_ascii(made)}", "% Needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}."]
    for shown in displays:
        parts.append(_tabular(shown))
        if shown.notes:
            parts.append(_notes(shown.notes))
        parts.append("\\par\\bigskip")
    if legend:
        parts.append(f"{{\\footnotesize {escaped(legend.strip())}\\par}}")
    return "\n".join([*parts, ""])


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(
        ESCAPES.get(sign) or (sign if sign.isascii() and sign.isprintable() else _code(sign)) for sign in text
    )


def _code(sign: str) -> str:
    return " " if sign.isspace() else f"U+{ord(sign):04X}"


def _ascii(text: str) -> str:
    """For a comment, which may hold any sign but the end of its line."""
    return "".join(sign if sign.isascii() and sign.isprintable() else _code(sign) for sign in text)


def _tabular(shown: Display) -> str:
    width = len(shown.heads)
    blocks = set(shown.blocks)
    lines = [f"\\begin{{tabular}}{{{''.join('r' if number else 'l' for number in shown.numeric)}}}", "\\toprule"]
    if shown.title:
        lines += [_line([f"\\multicolumn{{{width}}}{{c}}{{{escaped(shown.title)}}}"]), f"\\cmidrule(lr){{1-{width}}}"]
    if any(shown.groups):
        lines += _groups(shown.groups)
    lines += [_line([escaped(head) for head in shown.heads])]
    for i, (cells, marks) in enumerate(zip(shown.cells, shown.marks, strict=True)):
        first = i in blocks
        texts = [MARKED[mark].format(escaped(text)) if text else "" for text, mark in zip(cells, marks, strict=True)]
        texts[0] = texts[0] if first or shown.keys < 2 else ""  # a block is named once
        lines += (["\\midrule"] if first else []) + [_line(texts)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def _groups(groups: list[str]) -> list[str]:
    """A line of heads that span the columns below them, and the rules under them."""
    cells, rules, column = [], [], 1
    for group, members in groupby(groups):
        span = len(list(members))
        cells.append(f"\\multicolumn{{{span}}}{{c}}{{{escaped(group)}}}")
        if group:
            rules.append(f"\\cmidrule(lr){{{column}-{column + span - 1}}}")
        column += span
    return [_line(cells), "".join(rules)]


def _notes(notes: list[Note]) -> str:
    rows = [_line([f"({i})", escaped(note.text)]) for i, note in enumerate(notes, 1)]
    return "\n".join(["\\par\\smallskip", "\\begin{tabular}{rp{0.9\\linewidth}}", *rows, "\\end{tabular}"])


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"
