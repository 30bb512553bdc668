"""What was mirrored from a folder of records: each run's group, and what wandb's server has of it.

A record does not know the sweep that asked for it, since several may; wandb shows a run in one group.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.records import write_atomically


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        group: under which wandb shows it.
        uploaded: digest of the content that wandb's server has; None before the first upload.
    """

    group: str
    uploaded: str | None = None


def read(directory: Path, identity: str) -> Entry | None:
    """What is known of the run with this id, or None."""
    try:
        return Entry(**json.loads(_path(directory, identity).read_text()))
    except FileNotFoundError:
        return None


def note(directory: Path, identity: str, group: str, uploaded: str | None) -> None:
    """Keep that the run was mirrored; what the server had stays known."""
    before = read(directory, identity)
    entry = Entry(group, uploaded or (before.uploaded if before else None))
    write_atomically(_path(directory, identity), json.dumps(asdict(entry)))


def _path(directory: Path, identity: str) -> Path:
    return directory / "wandb" / "ledger" / f"{identity}.json"
