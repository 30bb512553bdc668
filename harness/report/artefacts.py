"""The committed results as the page needs them: tables with their prose, figures packed for a browser."""

from __future__ import annotations

import base64
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from pandas.api.types import is_numeric_dtype

from harness.report.forms import one_line
from harness.report.grid import Cell, Grid, printed

MAIN = "comparison"
"""The table whose figures and failures bear no name of their own."""
TIMED = "; torch "
"""In the first line of a CSV with times, see `harness.bench.tables.machine`."""
CHILDREN = ("failures", "tests")
"""Last words of tables that stand below another."""
TITLES = {
    "activations": "Weights and activations",
    "allocators": "Solvers of the allocation",
    "baselines": "Weight-only methods",
    "claims_tests": "The tests behind the verdicts",
    "comparison": "Main comparison",
    "hawq": "HAWQ, its descendants and its rivals",
}
"""Of tables whose Markdown has no title of its own."""
KINDS = {
    "pareto": "Perplexity against stored bits",
    "kl": "KL divergence from fp16 against stored bits",
    "bits": "Bits of each linear",
    "agreement": "Rank correlation of each metric with the measured loss",
    "metrics": "Rank correlation between metrics",
    "bench_hessian": "Cost against model size",
}
"""What a figure shows, by the words in its name; of others, the name itself."""
KIND = re.compile(rf"(?:(?P<table>.*)_)?(?P<kind>{'|'.join(KINDS)})(?:_(?P<rest>.*))?")
VAGUE = "Comparison"
"""The title of tables that have none of their own."""
ELSEWHERE = re.compile(r"Measured on |No cell failed")
"""Paragraphs that the page has in another place."""
WIDE = 700
"""Points from which on a figure takes the whole width."""
FONT = b"'DejaVu Sans'"
SIMILAR = b"'DejaVu Sans', Verdana, sans-serif"
"""For machines without it: Verdana has nearly the same widths."""

# Neither HTML nor images or links: what a legend says may come from the names of models.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).disable(["image", "link", "autolink"]).enable("table")


@dataclass
class Part:
    """One printed table of a page: its heading, its cells, and the paragraphs below it."""

    label: str
    grid: Grid
    notes: list[Markup] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """One CSV and the Markdown beside it.

    Attributes:
        frame: the CSV; the columns `low` and `high` of an `effect` are named as other intervals are.
        machine: the comment in the CSV's first line, if there is one.
        legend, parts: the Markdown's first paragraphs, and its tables.
        made: the comment in the Markdown's first line.
    """

    name: str
    title: str
    frame: pd.DataFrame
    machine: str
    legend: list[Markup]
    parts: list[Part]
    made: str

    @property
    def parent(self) -> str:
        """The name of the table under which this one stands; empty for one of its own."""
        stem, _, last = self.name.rpartition("_")
        return (stem or MAIN) if last in CHILDREN else ""


@dataclass(frozen=True)
class Figure:
    """A drawing: its path below `figures/` without ending, its size in points, and the SVG, gzip in base64."""

    name: str
    width: int
    height: int
    packed: str

    @property
    def caption(self) -> str:
        """What it shows, and of which model."""
        found = KIND.fullmatch(self.name)
        return (
            ", ".join(filter(None, [KINDS[found["kind"]], found["rest"]]))
            if found
            else _words(self.name.rpartition("/")[2])
        )

    @property
    def rank(self) -> tuple[int, str]:
        """Its place among the figures of a table."""
        found = KIND.fullmatch(self.name)
        return (list(KINDS).index(found["kind"]) if found else len(KINDS), self.name)

    @property
    def wide(self) -> bool:
        """Whether half a page is too narrow for it."""
        return self.width > WIDE


def tables(folder: Path) -> dict[str, Table]:
    """Every CSV of `folder` by name, the main comparison first; titles differ."""
    paths = sorted(folder.glob("*.csv"), key=lambda path: (path.stem != MAIN, path.stem))
    found = [_table(path) for path in paths]
    titles = Counter(table.title for table in found if not table.parent)
    named = [replace(t, title=f"{t.title} ({t.name})") if titles[t.title] > 1 else t for t in found]
    return {table.name: table for table in named}


def figures(folder: Path) -> dict[str, Figure]:
    """Every SVG below `folder` by its name without ending."""
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.svg"))}
    return {name: _figure(name, path) for name, path in paths.items()}


def provenance(tables: Iterable[Table]) -> dict[str, str]:
    """Where the numbers come from: the newest record, the commit that computed it, the machines."""
    tables = list(tables)
    dated = [t.frame[["created", "git"]] for t in tables if {"created", "git"} <= {*t.frame}]
    newest = pd.concat(dated).sort_values("created", kind="stable").iloc[-1] if dated else {"created": "", "git": ""}
    machines = dict.fromkeys(table.machine for table in tables if TIMED in table.machine)
    facts = {
        "Newest record": newest["created"],
        "Commit": newest["git"][:12],
        "Costs measured on": " · ".join(machines),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _table(path: Path) -> Table:
    machine, content = "", path.read_text()
    if content.startswith("#"):
        first, _, content = content.partition("\n")
        machine = first.removeprefix("#").strip()
    frame = pd.read_csv(io.StringIO(content), keep_default_na=False, na_values=[""])
    frame = frame.rename(columns={"low": "effect_low", "high": "effect_high"} if "effect" in frame else {})
    for name in frame:
        if not is_numeric_dtype(frame[name]) or frame[name].isna().all():
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "").astype(str)
    beside = path.with_suffix(".md")
    title, legend, parts, made = _page(beside.read_text() if beside.exists() else "")
    own = TITLES.get(path.stem, _words(path.stem)) if title in ("", VAGUE) else title
    return Table(path.stem, own, frame, machine, legend, parts, made)


def _page(text: str) -> tuple[str, list[Markup], list[Part], str]:
    """Title, first paragraphs, tables with what stands below them, and the comment on top."""
    comment = re.match(r"<!--\s*(.*?)\s*-->", text)
    tokens = MARKDOWN.parse(text[comment.end() :] if comment else text)
    title, label = "", ""
    legend: list[Markup] = []
    parts: list[Part] = []
    for i, token in enumerate(tokens):
        said = tokens[i - 1].tag if token.type == "inline" else ""
        if said == "h1":
            title = _text(token)
        elif said in ("h2", "h3"):
            label = _text(token)
        elif said == "p" and not ELSEWHERE.match(token.content):
            (parts[-1].notes if parts else legend).append(Markup(MARKDOWN.renderInline(token.content)))
        elif token.type == "table_open":
            parts.append(Part(label, _grid(tokens[i:])))
    return title, legend, parts, comment[1] if comment else ""


def _grid(tokens: Sequence[Token]) -> Grid:
    """The table that begins with the first token."""
    rows: list[list[Cell]] = []
    for token in tokens:
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline":
            best = any(child.type == "strong_open" for child in token.children or ())
            rows[-1].append(Cell(_text(token), best=best))
    return printed([cell.text for cell in rows[0]], rows[1:])


def _text(token: Token) -> str:
    return one_line("".join(child.content or " " * (child.type == "softbreak") for child in token.children or ()))


def _figure(name: str, path: Path) -> Figure:
    content = path.read_bytes().replace(FONT, SIMILAR)
    box = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', content)
    width, height = (round(float(side)) for side in box.groups()) if box else (0, 0)
    return Figure(name, width, height, base64.b64encode(gzip.compress(content, mtime=0)).decode())


def _words(name: str) -> str:
    text = one_line(name.replace("_", " "))
    return text[:1].upper() + text[1:]
