"""All results on one page, `results/report.html`: claims, tables that sort and filter, figures.

The page is one file without references to any other: it opens from disk, offline, in any current browser. It is
made from the committed tables and figures alone, never from records.

The tables are DataTables, as bundled by the package itables. Figures are compressed, and unpacked by the
browser into images of their own, so that neither identifiers nor styles of two figures meet.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote

import itables.options
from jinja2 import Environment, PackageLoader, StrictUndefined

from harness.records import write_atomically
from harness.report import artefacts, style
from harness.report.artefacts import MAIN, Figure, Part, Table
from harness.report.grid import Grid, generic, interval

FILE = "report.html"
GREY = "#8A8A8A"
VERDICTS = {
    "supported": ("✓", style.COLORS[2]),
    "partly supported": ("◐", style.COLORS[5]),
    "inconclusive": ("?", style.COLORS[0]),
    "refuted": ("✗", style.COLORS[3]),
    "not testable": ("∅", style.COLORS[4]),
    "not run": ("–", GREY),
}
"""A sign and a color each, in the order of the summary."""
GROUPS = (
    ("Comparisons", ()),
    ("Sensitivity metrics", ("agreement_", "sensitivity_")),
    ("Parity with the libraries", ("parity",)),
    ("Costs", ("bench_", "cost", "kernels")),
    ("Other tables", ()),
)
"""Chapters by the first letters of their tables' names; other comparisons are known by their columns."""
COMPARED = {"method", "budget", "perplexity"}
"""Columns of comparisons."""
MAIN_FIGURES = ("pareto", "kl", "bits")
"""First words of the figures of the main comparison."""
BESIDE = {"metrics": "agreement"}
"""Figures whose first word is not that of the table that they go with."""


@dataclass(frozen=True)
class Section:
    """All that one CSV has to show: its printed tables each with its figures, all its rows, and lesser tables."""

    table: Table
    parts: list[tuple[Part, list[Figure]]]
    rows: Grid
    children: list[Section]


def write(folder: Path) -> Path:
    """Write `report.html` in `folder`; the same tables and figures give the same bytes."""
    path = folder / FILE
    write_atomically(path, build(folder))
    return path


def build(folder: Path) -> str:
    """The page of the results in `folder`, which has `tables/` and `figures/`.

    Raises:
        ValueError: `folder` has no tables.
    """
    tables = artefacts.tables(folder / "tables")
    if not tables:
        raise ValueError(f"{folder}/tables holds no CSV; make the tables first: make tables")
    provenance = artefacts.provenance(tables.values())
    figures = artefacts.figures(folder / "figures")
    ledger = tables.pop("claims", None)
    claims, counts = _claims(ledger, figures)
    chapters = _chapters(tables, figures)
    script, styles, licences = _assets()
    environment = _environment()
    return environment.get_template("page.html.j2").render(
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        styles=styles,
        licences=licences,
        provenance=provenance,
        verdicts=VERDICTS | {verdict: ("·", GREY) for verdict in counts if verdict not in VERDICTS},
        ledger=ledger,
        claims=claims,
        counts=counts,
        tests=chapters.pop("Claims", []),
        chapters=chapters,
        others=[*figures.values()],
    )


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("harness.report"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["url"] = lambda text: quote(text, safe="")
    return environment


def _assets() -> tuple[str, str, str]:
    """The page's script and styles, each with the library's, and the library's licences."""
    bundle = Path(itables.options.dt_bundle)
    library, looks = bundle.read_text(), bundle.with_suffix(".css").read_text()
    script, styles = (_environment().get_template(name).render() for name in ("page.js", "page.css"))
    module = f"data:text/javascript;base64,{base64.b64encode(library.encode()).decode()}"
    package = distribution("itables")
    own = package.read_text("licenses/LICENSE") or ""
    notices = library[library.rindex("/*! Bundled license information") :].strip("/*! \n")
    return script.replace("DATATABLES", module), looks + styles, f"itables {package.version}\n\n{own}\n{notices}"


def _claims(ledger: Table | None, figures: dict[str, Figure]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A mapping a claim, and how many claims have each verdict."""
    claims: list[Any] = ledger.frame.to_dict("records") if ledger else []
    for claim in claims:
        ends = [claim[name] for name in ("effect", "effect_low", "effect_high")]
        claim["effect"] = interval(*(math.nan if end == "" else float(end) for end in ends))
        claim["drawn"] = figures.pop(f"claims/{claim['id']}", None)
    found = Counter(claim["verdict"] for claim in claims)
    return claims, {verdict: found[verdict] for verdict in (*VERDICTS, *(found.keys() - VERDICTS)) if found[verdict]}


def _chapters(tables: dict[str, Table], figures: dict[str, Figure]) -> dict[str, list[Section]]:
    """The sections of each chapter; the figures that they show are taken out of `figures`."""
    chapters: dict[str, list[Section]] = {"Claims": [], **{name: [] for name, _ in GROUPS}}
    owners = {name: _owner(name, tables) for name in sorted(figures, key=lambda name: figures[name].rank)}
    for name, table in tables.items():
        if table.parent not in tables:
            lesser = [_section(child, []) for child in tables.values() if child.parent == name]
            own = [figures.pop(figure) for figure, owner in owners.items() if owner == name]
            chapters[_chapter(table)].append(_section(table, own, lesser))
    return {name: sections for name, sections in chapters.items() if sections}


def _owner(figure: str, tables: Iterable[str]) -> str:
    """The table that a figure goes with: the longest name that its own begins with; the main one's are bare."""
    if figure.partition("_")[0] in MAIN_FIGURES:
        return MAIN
    first, _, rest = figure.partition("_")
    name = f"{BESIDE.get(first, first)}_{rest}"
    return max((table for table in tables if f"{name}_".startswith(f"{table}_")), key=len, default="")


def _chapter(table: Table) -> str:
    if table.parent == "claims":
        return "Claims"
    named = next((name for name, starts in GROUPS if table.name.startswith(starts)), "")
    return named or ("Comparisons" if {*table.frame} >= COMPARED else "Other tables")


def _section(table: Table, figures: list[Figure], children: Iterable[Section] = ()) -> Section:
    parts = [(part, _of(part.label, figures)) for part in table.parts] or [(Part("", Grid([], [])), [])]
    parts[-1][1].extend(figures)
    return Section(table, parts, generic(table.frame), [*children])


def _of(label: str, figures: list[Figure]) -> list[Figure]:
    """Takes out the figures of one section of a comparison, whose names end with the model or with the whole label."""
    ends = tuple("_" + re.sub(r"[^A-Za-z0-9._-]+", "-", text) for text in (label, label.partition(" on ")[0]) if text)
    mine = [figure for figure in figures if figure.name.endswith(ends)]
    figures[:] = [figure for figure in figures if figure not in mine]
    return mine
