"""Print the comparison of all records and write its tables and figures.

python -m harness.report
python -m harness.report records=results/runs folder=results
python -m harness.report name=allocators method="mixed solver=*" budget="b*"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from rich.console import Console

from harness.records import Store
from harness.report import report, tables, terminal
from harness.tracking import log_figures


@dataclass
class ReportConfig:
    """What to read and where to write."""

    records: str = "results/runs"
    """Folder of the records."""
    folder: str = "results"
    """Gets `tables/` and `figures/`."""
    name: str = tables.MAIN
    """Of the tables and, unless it is the main comparison, of the figures."""
    method: str = "*"
    """Pattern of the methods' labels to show; the reference is always there."""
    budget: str = "*"
    """Pattern of the budgets' labels to show."""
    tracking: str = "offline"
    """wandb, which shows tables and figures as one run: offline, online or disabled."""
    group: str = "report"
    """The group under which wandb shows them."""


# Hydra keeps no log and no folder of its own: a report leaves nothing but what it writes.
NO_TRACES = {
    "defaults": ["report_schema", "_self_", {"override hydra/job_logging": "stdout"}],
    "hydra": {"output_subdir": None, "run": {"dir": "."}},
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
    labels = {"method": config.method, "budget": config.budget}
    paths = report(records, Path(config.folder), console, config.name, labels)
    log_figures(paths, mode=config.tracking, group=config.group, directory=Path(config.records))
    console.print(f"Wrote {len(paths)} files to {config.folder}/tables and {config.folder}/figures.")


if __name__ == "__main__":
    main()
