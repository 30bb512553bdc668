"""The parent's side of a worker process: start it, hand it cells, notice when it dies or hangs."""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Any

from harness.cell import Cell, make_record
from harness.config import RunConfig
from harness.records import FAILED, Record, Store

log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class End:
    """How a task ended: with the record of this key, or for this reason without one."""

    key: str | None = None
    reason: str | None = None


class Worker:
    """One `harness.worker` process, started on first use and again after a failure."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def run(self, cell: Cell, run: RunConfig, listen: Listener = lambda _: None) -> Record:
        """Compute a cell in the worker. A worker that dies or exceeds the time limit leaves a failed record."""
        process = self._started()
        store = Store(run.results)
        task = {"cell": cell.as_dict(), "run": asdict(run)}
        end = self._converse(process, task, run.time_limit * 60, listen)
        # The worker names the record: its key includes the code that ran, which may be newer than this process.
        record = store.read(end.key) if end.key else None
        if record is None:
            record = make_record(cell, FAILED, end.reason or "the worker's record cannot be read")
            store.write(record)
        if record.status == FAILED or not run.warm:
            self.close()
        return record

    def close(self) -> None:
        """Stop the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._lines = queue.Queue()
            threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._process

    def _converse(self, process: subprocess.Popen[str], task: dict[str, Any], limit: float, listen: Listener) -> End:
        """Send the task and follow its events to the end."""
        deadline, phase = time.monotonic() + limit, "start"
        try:
            print(json.dumps(task), file=process.stdin, flush=True)
        except BrokenPipeError:
            return End(reason=f"the worker ended with code {process.wait()} before the cell began")
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.close()
                return End(reason=f"stopped after the time limit of {limit / 60:g} minutes, in phase {phase!r}")
            if not line:
                return End(reason=f"the worker ended with code {process.wait()} in phase {phase!r}")
            event = json.loads(line)
            if event["event"] == "end":
                return End(key=event["key"])
            phase = event.get("phase", phase)
            listen(event)


def _forward(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Put the stream's lines into the queue, and an empty one at its end."""
    for line in stream:
        lines.put(line)
    lines.put("")
