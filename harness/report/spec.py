"""What a table of the report is: `conf/table/NAME.yaml`, typed.

A table takes rows from a source, keeps some, puts keys at the left, and prints values. Nothing here, and nothing that
reads it, knows the name of a table: another table is another file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.report.forms import FORMS
from harness.report.sources import SOURCES

FOLDER = Path(__file__).parents[2] / "conf" / "table"


@dataclass
class Column:
    """A printed column."""

    head: str = ""
    """What stands above it. Where `value` is a pattern, `{}` is what its `*` stood for."""
    value: str = ""
    """The column of the source to print, or a pattern of several with one `*`."""
    form: str = "text"
    """How it is written, see `harness.report.forms`."""
    reduce: str = ""
    """What rows that are taken together show: median, max or min; by default the mean."""
    optional: bool = False
    """Leave the column out where no row has a value."""


@dataclass
class TableConfig:
    """One table."""

    title: str = ""
    source: str = "records"
    """Where the rows come from, see `harness.report.sources`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the source."""
    where: dict[str, Any] = field(default_factory=dict)
    """Column to the value, the pattern, or a list of either, that rows must have; `!` before a pattern excludes. Of
    records, any field of the cell is a column too, such as `data.seed`."""
    section: list[str] = field(default_factory=lambda: ["section"])
    """Rows that differ in these columns stand in tables of their own, one below the other."""
    keys: list[Column] = field(default_factory=list)
    """What identifies a row. Equal neighbors in the first are a block."""
    across: list[Column] = field(default_factory=list)
    """Keys that stand at the top: the values repeat for each of their combinations."""
    values: list[Column] = field(default_factory=list)
    """What is printed; by default every column of the source."""
    over: list[str] = field(default_factory=list)
    """Rows of the records that differ in these columns only are taken together, as `reduce` says."""
    complete: bool = False
    """Show combinations of a section's methods and budgets that were not run."""
    best: str = ""
    """The value whose best is bold in each block."""
    legend: str = ""
    figures: list[str] = field(default_factory=list)
    """What is drawn of the rows, too: `pareto`, `kl`, `bits`, `dose`; see `harness.report.figures`."""
    nothing: str = "Not run."
    """What it says without rows."""


def names(folder: Path = FOLDER) -> list[str]:
    """Every table's name, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(name: str, folder: Path = FOLDER) -> TableConfig:
    """The table of that name.

    `defaults: [OTHER, _self_]` in its file starts from another table, as in Hydra.

    Raises:
        ValueError: there is no such table; an unknown option; a value of the wrong type; an unknown source or form.
    """
    if name not in names(folder):
        raise ValueError(f"table={name} is none of {', '.join(names(folder))}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TableConfig), _composed(name, folder))
        table: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"conf/table/{name}.yaml: {str(error).splitlines()[0]}") from error
    if table.source not in SOURCES:
        raise ValueError(f"conf/table/{name}.yaml: source={table.source} is none of {', '.join(SOURCES)}")
    for column in (*table.keys, *table.across, *table.values):
        if column.form not in FORMS:
            raise ValueError(f"conf/table/{name}.yaml: form={column.form} is none of {', '.join(FORMS)}")
    return table


def _composed(name: str, folder: Path) -> DictConfig:
    own: Any = OmegaConf.load(folder / f"{name}.yaml")
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    merged: Any = OmegaConf.merge(*(_composed(base, folder) for base in bases), own)
    return merged
