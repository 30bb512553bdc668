"""What people look at: tables in the terminal and in files, and figures; from records and committed CSV alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from harness.records import Record
from harness.report import builder, frame, spec, style, tables, terminal
from harness.report.sources import Material

ALL: Mapping[str, str] = {}


def report(
    records: Iterable[Record], folder: Path, console: Console, name: str = tables.MAIN, labels: Mapping[str, str] = ALL
) -> list[Path]:
    """Print a comparison of all these records, and write it, what failed, and figures.

    Args:
        folder: gets `tables/` and `figures/`.
        name: of the tables; figures of another comparison than the main one bear it too.
        labels: patterns (as of shells) that the labels of a record, `method` and `budget`, must match. The
            reference always counts.

    Returns:
        The paths of the files written.

    Raises:
        ValueError: there are no records, or none that match.
    """
    chosen = [record for record in records if _wanted(record, labels)]
    if not chosen:
        raise ValueError("there are no records to report; run a cell or a sweep first: python -m harness --help")
    material = Material(frame.tidy(chosen))
    everything = replace(spec.load(tables.MAIN), where={})
    failures = spec.load(tables.FAILURES)
    built = builder.build(everything, material)
    terminal.show(built, console)
    return [
        *_write(built, folder, name),
        *_write(builder.build(failures, material), folder, f"{_prefix(name)}{tables.FAILURES}"),
    ]


def report_all(material: Material, names: Iterable[str], folder: Path, console: Console) -> list[Path]:
    """Write the tables of these names, with their figures, and print the main one, or the only one.

    What has no records at all does not replace a table that has.

    Returns:
        The paths of the files written.

    Raises:
        ValueError: a table is unknown, or its description is wrong.
    """
    found = {name: builder.build(spec.load(name), material) for name in names}
    paths = []
    for name, built in found.items():
        if name == tables.MAIN or len(found) == 1:
            terminal.show(built, console)
        if built.rows.empty and (folder / "tables" / f"{name}.md").exists():
            console.print(f"{name}: no records to make it from; the table that is there stays.")
        else:
            paths += _write(built, folder, name)
    return paths


def _write(built: builder.Built, folder: Path, name: str) -> list[Path]:
    paths = tables.write(built, folder / "tables", name)
    if not built.spec.figures or built.rows.empty:
        return paths
    from harness.report import figures  # matplotlib takes a while to import, and the terminal need not wait

    return [*paths, *figures.write(built.rows, folder / "figures", _prefix(name), built.spec.figures)]


def _prefix(name: str) -> str:
    return "" if name == tables.MAIN else f"{name}_"


def _wanted(record: Record, labels: Mapping[str, str]) -> bool:
    return record.labels["method"] == style.REFERENCE or all(
        fnmatch(record.labels[label], pattern) for label, pattern in labels.items()
    )
