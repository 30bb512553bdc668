"""A content-addressed cache of tensors: calibration statistics, sensitivities, reference log-probabilities.

A key hashes everything that determines the value, so an entry never goes stale; an entry that fails its checksum is
reported and computed again. Each entry remembers how long it took, so that a cell which found it still reports the
cost of having to compute it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.records import digest, write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A value, the seconds its computation took, and whether it was found rather than computed."""

    value: dict[str, Tensor]
    seconds: float
    found: bool


class Cache:
    """A folder of safetensors files.

    Reading or writing may fail (a full disk, a read-only folder): the value is then computed, and a warning says
    so; a cell never fails because of its cache.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def __call__(
        self,
        kind: str,
        identity: Mapping[str, Any],
        compute: Callable[[], dict[str, Tensor]],
        recalled: Callable[[], float] = lambda: 0.0,
    ) -> Entry:
        """The value for `identity` (JSON-able), from the cache or computed and kept.

        `recalled` counts the seconds that cached parts of the computation have saved so far: they belong to its cost.
        """
        path = self.folder / kind / f"{digest(dict(identity))}.safetensors"
        entry = self._read(path)
        if entry is not None:
            return entry
        began, saved = time.perf_counter(), recalled()
        value = {name: tensor.contiguous() for name, tensor in compute().items()}
        entry = Entry(value, time.perf_counter() - began + recalled() - saved, found=False)
        self._write(path, entry)
        return entry

    def _read(self, path: Path) -> Entry | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            log.warning("cache entry %s is unreadable (%s); computing it again", path, error)
            return None
        if facts.get("sha256") != _checksum(tensors):
            log.warning("cache entry %s does not match its checksum; computing it again", path)
            return None
        return Entry(tensors, float(facts["seconds"]), found=True)

    def _write(self, path: Path, entry: Entry) -> None:
        facts = {"sha256": _checksum(entry.value), "seconds": repr(entry.seconds)}
        try:
            write_atomically(path, save({k: v.cpu() for k, v in entry.value.items()}, metadata=facts))
        except OSError as error:
            log.warning("cannot keep %s in the cache (%s); later cells will compute it again", path.name, error)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
