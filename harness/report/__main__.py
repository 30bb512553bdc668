"""Make every table of conf/table, figures and the page `report.html`, from the records and committed CSV files.

python -m harness.report
python -m harness.report records=results/runs folder=results
python -m harness.report table=mixed
python -m harness.report name=allocators method="mixed solver=*" budget="b*"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from rich.console import Console

from harness.records import Record, Store
from harness.report import frame, page, report, report_all, roofline, spec, tables, terminal
from harness.report.sources import REPORTED, Material
from harness.tracking import log_figures

ANY = "*"


@dataclass
class ReportConfig:
    """What to read and where to write."""

    records: str = "results/runs"
    """Folder of the records."""
    measured: str = "results/tables"
    """Folder of the CSV files that benchmarks and audits wrote."""
    reported: str = str(REPORTED)
    """The published figures."""
    folder: str = "results"
    """Gets `tables/` and `figures/`."""
    table: str = ""
    """One table of conf/table; by default all, and the figures."""
    name: str = tables.MAIN
    """Of a comparison of its own: all records whose labels match."""
    method: str = ANY
    """Pattern of the methods' labels that it shows; the reference is always there."""
    budget: str = ANY
    """Pattern of the budgets' labels that it shows."""
    tracking: str = "offline"
    """wandb, which shows tables and figures as one run: offline, online or disabled."""
    group: str = "report"
    """The group under which wandb shows them."""


# Hydra keeps no log and no folder of its own: a report leaves nothing but what it writes.
NO_TRACES = {
    "defaults": ["report_schema", "_self_", {"override hydra/job_logging": "stdout"}],
    "hydra": {
        "output_subdir": None,
        "run": {"dir": "."},
        "job_logging": {"root": {"level": "WARNING"}},  # fonts are embedded with many words
    },
}
ConfigStore.instance().store(name="report_schema", node=ReportConfig)
ConfigStore.instance().store(name="report", node=NO_TRACES)


@hydra.main(version_base="1.3", config_path=None, config_name="report")
def main(config: ReportConfig) -> None:
    """Status 0 also when cells failed: the sweep's own status says so."""
    console = Console(width=max(terminal.WIDTH, Console().width))  # a narrow window wraps; no number is cut
    records = Store(config.records).all()
    if not records:
        raise SystemExit(f"{config.records} holds no records; run a sweep first: python -m harness -m --help")
    try:
        paths = _write(config, records, console)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    log_figures(paths, mode=config.tracking, group=config.group, directory=Path(config.records))
    folders = " and ".join(sorted({str(path.parent) for path in paths}, reverse=True))
    console.print(f"Wrote {len(paths)} files to {folders}.", soft_wrap=True)


def _write(config: ReportConfig, records: list[Record], console: Console) -> list[Path]:
    labels = {"method": config.method, "budget": config.budget}
    if config.name != tables.MAIN or set(labels.values()) != {ANY}:
        return report(records, Path(config.folder), console, config.name, labels)
    material = Material(frame.tidy(records), Path(config.measured), Path(config.reported))
    if config.table:
        return report_all(material, [config.table], Path(config.folder), console)
    paths = report_all(material, spec.names(), Path(config.folder), console)
    paths += roofline.write(Path(config.measured), Path(config.folder) / "figures")
    return [*paths, page.write(Path(config.folder))]


if __name__ == "__main__":
    main()
