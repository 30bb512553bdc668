"""Records: what is known of a cell, one JSON file each, written atomically and checked when read.

Records are the truth; tables, figures, the report page and wandb read them and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """The outcome of one cell.

    Attributes:
        key: hash of everything that determines the numbers; the file's name.
        status: `done`, `failed` or `skipped`.
        reason: why it failed or was skipped, one sentence.
        cell: the resolved configuration: model, data, method, budget, evaluation, seed.
        labels: model, data, method and budget as tables print them.
        result: the numbers, a function of `key` alone; empty unless done.
        cost: seconds per phase and peak memory: of this run on this machine.
        environment: versions, hardware, threads, git state.
        created: ISO time, UTC.
    """

    key: str
    status: str
    cell: dict[str, Any]
    labels: dict[str, str]
    reason: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""


class Store:
    """A folder of records. Writers of the same key agree on the content, so the last one may win."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """Where the record of `key` lies."""
        return self.folder / f"{key}.json"

    def write(self, record: Record) -> None:
        """Write atomically: readers see the old file, the new file, or none, never a part."""
        body = asdict(record)
        write_atomically(self.path(record.key), _dumps({**body, "schema": SCHEMA, "checksum": _checksum(body)}))

    def read(self, key: str) -> Record | None:
        """The record of `key`, or None if there is none. One that is torn, altered or foreign is reported and
        treated as absent, so that the cell is computed again."""
        try:
            body = json.loads(self.path(key).read_text())
            checksum, schema = body.pop("checksum"), body.pop("schema")
            record = Record(**body)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("record %s is unreadable (%s); its cell will be computed again", self.path(key), error)
            return None
        if schema != SCHEMA or record.key != key or checksum != _checksum(body):
            log.warning("record %s was altered or is foreign; its cell will be computed again", self.path(key))
            return None
        return record

    def all(self) -> list[Record]:
        """Every readable record, sorted by key."""
        return [record for key in self._keys() if (record := self.read(key)) is not None]

    def _keys(self) -> Iterator[str]:
        yield from sorted(path.stem for path in self.folder.glob("*.json"))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the target, flush to the disk, and rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    return digest(body)


def _dumps(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=1, allow_nan=False) + "\n"
