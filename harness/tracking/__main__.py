"""Bring wandb's server up to date with the records, tables and figures: what is there already is not sent again.

python -m harness.tracking
python -m harness.tracking records=results/runs folder=results group=results

Runs are made again from the records, which `wandb sync` of the offline folders does one by one and more slowly, and
which needs no offline folder at all: records that another machine computed are uploaded as well. A run's id is its
record's key, so it takes the place of the one that was there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from rich.console import Console

from harness.messages import refusing, status
from harness.records import Store, digest
from harness.tracking import ledger, log_figures, log_record
from harness.tracking.results import SHOWN, TABLES
from harness.tracking.runs import PROJECT

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass
class SyncConfig:
    """What to upload, and to where. The entity is that of the login, or of the variable WANDB_ENTITY."""

    records: str = "results/runs"
    """Folder of the records."""
    folder: str = "results"
    """Holds `tables/` and `figures/`."""
    group: str = "results"
    """The group of tables and figures, and of cells that were never mirrored from here."""
    project: str = PROJECT
    """wandb's project."""
    mode: str = "online"
    """Or offline, which writes wandb's folder for another machine to upload."""


# Hydra keeps no log and no folder of its own.
NO_TRACES = {
    "defaults": [
        "sync_schema",
        "_self_",
        {"override hydra/job_logging": "none"},
        {"override hydra/hydra_logging": "none"},
    ],
    "hydra": {"output_subdir": None, "run": {"dir": "."}},
}
ConfigStore.instance().store(name="sync_schema", node=SyncConfig)
ConfigStore.instance().store(name="sync", node=NO_TRACES)


def sync(config: SyncConfig) -> tuple[int, int]:
    """Mirror every record that the server does not have, and the tables and figures as they are.

    Returns:
        The records that were mirrored now, and all records.

    Raises:
        ValueError: wandb refused one; those before it are kept, and the next call goes on after them.
    """
    directory = Path(config.records)
    records = Store(directory).all()
    sent = 0
    for record in records:
        known = ledger.read(directory, record.key)
        if known and known.uploaded == digest(asdict(record)):
            continue
        group = known.group if known else config.group
        _accept(log_record(record, mode=config.mode, group=group, directory=directory, project=config.project))
        sent += 1
    if paths := [*_results(Path(config.folder))]:
        _accept(log_figures(paths, mode=config.mode, group=config.group, directory=directory, project=config.project))
    return sent, len(records)


def _results(folder: Path) -> Iterator[Path]:
    for part in ("tables", "figures"):
        yield from (path for path in sorted((folder / part).glob("*")) if path.suffix in (*SHOWN, *TABLES))


def _accept(worked: bool) -> None:
    if not worked:
        raise ValueError("stopped there; log in with `wandb login`, and call this again: what was sent stays")


@hydra.main(version_base="1.3", config_path=None, config_name="sync")
@refusing(console)
def job(config: SyncConfig) -> None:
    """Upload, and say how much."""
    sent, total = sync(config)
    console.print(f"{sent} of {total} records mirrored now, the others were there already.")


def main() -> int:
    """Exit status: 0 when done, 2 for bad input and when wandb refused."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    return status(job, console, SyncConfig)


if __name__ == "__main__":
    sys.exit(main())
