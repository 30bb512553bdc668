"""Records as runs of wandb: one cell, one run.

A run's id is its cell's key, so mirroring a record twice shows one run. All runs of a sweep are best mirrored
from one process: importing wandb and starting its service take seconds, each further run a fraction of one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.metrics import metrics
from harness.records import DONE, FAILED, Record, digest
from harness.tracking import ledger

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

PROJECT = "hawq-bench"
TAG_LIMIT = 64
"""Characters that wandb allows in a tag."""


def log_record(record: Record, *, mode: str, group: str, directory: Path, project: str = PROJECT) -> bool:
    """Mirror one record as a run of its own: configuration, summary metrics and the table of layers.

    Args:
        mode: `offline`, `online` or `disabled`; offline needs no account and no network.
        group: the experiment's name.
        directory: gets wandb's own folder.

    Returns:
        Whether it worked. A failing wandb is a warning: it never costs a cell.
    """

    def fill(run: wandb.Run) -> None:
        import pandas as pd
        import wandb

        summary = {"status": record.status, "reason": record.reason, **metrics(record)}
        run.summary.update({name: value for name, value in summary.items() if value is not None})
        if record.status == DONE:
            run.log({"layers": wandb.Table(dataframe=pd.DataFrame(record.result["layers"]))})

    labels = [record.labels[part] for part in ("model", "method", "budget")]
    return mirror(
        fill,
        content=digest(asdict(record)),
        mode=mode,
        project=project,
        group=group,
        job_type="cell",
        name="/".join(labels),
        id=record.key,
        tags=sorted({label[:TAG_LIMIT] for label in labels if label}),
        config=_flat(record.cell) | _labels(record) | {"environment": record.environment},
        directory=directory,
        exit_code=int(record.status == FAILED),
    )


def mirrored(directory: Path, identity: str) -> bool:
    """Whether a run of this id was written from here before."""
    return any(directory.glob(f"wandb/*-{identity}"))


def mirror(
    fill: Callable[[wandb.Run], None], *, content: str, directory: Path, exit_code: int = 0, **options: Any
) -> bool:
    """Write a run that `fill` fills, and enter it into the ledger.

    Args:
        content: digest of what is mirrored.
        options: of `wandb.init`.

    Returns:
        Whether it worked.
    """
    if options["mode"] == "disabled":
        return True
    # wandb's service would send crash reports, in offline mode too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))  # else tables are staged in the home folder
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        host="-",
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run = wandb.init(dir=directory, resume="allow", settings=settings, **options)
        try:
            fill(run)
        finally:
            run.finish(exit_code=exit_code)
        ledger.note(directory, options["id"], options["group"], content if options["mode"] == "online" else None)
    except (wandb.Error, OSError) as error:
        log.warning("wandb could not mirror %s: %s", options["name"], error)
        return False
    return True


def _labels(record: Record) -> dict[str, str]:
    """As tables print them; wandb groups and colours by a key without dots only."""
    return {f"{part}_label": label for part, label in record.labels.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"budget": {"bits": 4}} as {"budget.bits": 4}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
