"""What a report wrote as one run of wandb: figures and page as media, CSVs as tables, and all files as artifacts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.records import digest
from harness.tracking import ledger
from harness.tracking.runs import PROJECT, mirror, mirrored

if TYPE_CHECKING:
    import wandb

TABLES = (".csv", ".md", ".tex")
CLAIMS = "claims.csv"
"""The verdicts on the claims under test, which lie beside a report's tables."""


def log_figures(paths: Iterable[Path], *, mode: str, group: str, directory: Path, project: str = PROJECT) -> bool:
    """Mirror what a report wrote as one run; see `log_record`.

    PNGs become images, HTML pages pages, CSVs tables, the claims that lie beside them too. The folders of the tables
    become the artifact `tables`, and the records of `directory`, which every report reads, `records-GROUP`.
    The same content is one run, however often it is written.
    """
    paths = set(paths)
    folders = {path.parent for path in paths if path.suffix in TABLES}
    tables = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in TABLES)
    shown = sorted({path for path in paths if path.suffix in SHOWN} | {path for path in tables if path.name == CLAIMS})
    records = sorted(directory.glob("*.json"))

    def fill(run: wandb.Run) -> None:
        run.log({path.stem: SHOWN[path.suffix](path) for path in shown})
        _attach(run, "tables", "tables", tables)
        _attach(run, f"records-{group}", "records", records)

    content = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in (*shown, *tables, *records)]
    identity = digest(["report", project, group, content])
    known = ledger.read(directory, identity)
    if (mode == "online" and known and known.uploaded) or (mode == "offline" and mirrored(directory, identity)):
        return True
    return mirror(
        fill,
        content=identity,
        mode=mode,
        project=project,
        group=group,
        job_type="report",
        name=f"{group}/report",
        id=identity,
        directory=directory,
    )


def _attach(run: wandb.Run, name: str, kind: str, paths: list[Path]) -> None:
    """Log files as one artifact; versions of an artifact share the files that did not change."""
    import wandb

    if not paths:
        return
    artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII), type=kind)
    for path in paths:
        artifact.add_file(str(path))
    run.log_artifact(artifact)


def _image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))


def _page(path: Path) -> Any:
    import wandb

    return wandb.Html(str(path))


def _table(path: Path) -> Any:
    import pandas as pd
    import wandb

    frame = pd.read_csv(path)
    return wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))  # a blank is a blank, not NaN


SHOWN: dict[str, Callable[[Path], Any]] = {".png": _image, ".html": _page, ".csv": _table}
"""How wandb shows a kind of file. It has no vector images."""
