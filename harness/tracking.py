"""A mirror of the records in wandb. Records are the truth: nothing here is ever read back.

A run's id is its cell's key, so mirroring a record twice shows one run. All runs of a sweep are best mirrored
from one process: importing wandb and starting its service take seconds, each further run a fraction of one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.metrics import metrics
from harness.records import DONE, FAILED, Record, digest

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
    return _mirror(
        fill,
        mode=mode,
        project=project,
        group=group,
        job_type="cell",
        name="/".join(labels),
        id=record.key,
        tags=sorted({label[:TAG_LIMIT] for label in labels if label}),
        config=_flat(record.cell) | {"environment": record.environment},
        directory=directory,
        exit_code=int(record.status == FAILED),
    )


def log_figures(paths: Iterable[Path], *, mode: str, group: str, directory: Path, project: str = PROJECT) -> bool:
    """Mirror what a report wrote as one run: PNGs as images, CSVs as tables; see `log_record`.

    The same content is one run, however often it is written.
    """

    def fill(run: wandb.Run) -> None:
        import pandas as pd
        import wandb

        for path in paths:
            if path.suffix == ".png":
                run.log({path.stem: wandb.Image(str(path))})
            else:
                run.log({path.stem: wandb.Table(dataframe=pd.read_csv(path))})

    paths = sorted(path for path in paths if path.suffix in (".png", ".csv"))
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    identity = digest(["report", project, group, content])
    if mirrored(directory, identity):
        return True
    return _mirror(
        fill,
        mode=mode,
        project=project,
        group=group,
        job_type="report",
        name=f"{group}/report",
        id=identity,
        directory=directory,
    )


def mirrored(directory: Path, identity: str) -> bool:
    """Whether a run of this id was written from here before."""
    return any(directory.glob(f"wandb/*-{identity}"))


def _mirror(fill: Callable[[wandb.Run], None], *, directory: Path, exit_code: int = 0, **options: Any) -> bool:
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
    except (wandb.Error, OSError) as error:
        log.warning("wandb could not mirror %s: %s", options["name"], error)
        return False
    return True


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"budget": {"bits": 4}} as {"budget.bits": 4}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
