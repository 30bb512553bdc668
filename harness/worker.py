"""The process that computes cells: `python -m harness.worker`, started by `harness.workers`.

It reads one JSON task a line from standard input and writes one JSON event a line to standard output; everything
that libraries print goes to standard error. When its parent dies, standard input closes and it stops at once.

This file holds the only broad `except` of the project: whatever goes wrong in a cell becomes its record.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

import torch

from harness.cache import Cache
from harness.cell import Cell, make_record
from harness.config import RunConfig, build, cell_from_dict
from harness.environment import describe
from harness.memory import MemoryMeter
from harness.records import DONE, FAILED, SKIPPED, Record, Store, canonical
from harness.session import Clock, Session, Unsupported
from harness.toolchains.environments import Environments
from methods.base import discover

log = logging.getLogger(__name__)
T = TypeVar("T")


class Runner:
    """Runs cells one after the other, keeping the session of the last one while cells agree with it."""

    def __init__(self, emit: Callable[..., None] = lambda **_: None) -> None:
        self.emit = emit
        self.session: Session | None = None
        self.meter = MemoryMeter()

    def run(self, cell: Cell, run: RunConfig) -> Record:
        """Compute a cell, write its record, return it. Never raises for what the cell does."""
        began, peak = time.perf_counter(), self.meter()
        clock = Clock(on_phase=lambda phase: self.emit(event="phase", phase=phase))
        status, reason, result = DONE, None, {}
        try:
            result = self._session(cell, run, clock).run(cell, clock, self._track)
            canonical(result)  # NaN is a fault of the cell, and found here rather than while its record is written
        except Unsupported as refusal:
            status, reason = SKIPPED, str(refusal)
        except Exception as error:  # noqa: BLE001
            status, reason = FAILED, str(error)
            if type(error) is not ValueError:  # which the project raises with a sentence
                reason = f"{type(error).__name__}: {error}"
                log.error("%s failed\n%s", " ".join(cell.labels.values()), traceback.format_exc())
            result, self.session = {}, None  # whatever state they are in
        clock.seconds["total"] = time.perf_counter() - began
        cost = {
            "seconds": {k: round(v, 4) for k, v in clock.seconds.items()},
            "peak_bytes": peak(),
            "quantize_peak_bytes": clock.quantize_peak,
        }
        record = make_record(cell, status, reason, result=result, cost=cost, environment=describe())
        Store(run.results).write(record)
        return record

    def _session(self, cell: Cell, run: RunConfig, clock: Clock) -> Session:
        if self.session is None or not self.session.serves(cell):
            self.session = None  # free it before the next is loaded
            with clock.phase("load"):
                environments = Environments(run.toolchains)
                self.session = Session(cell, Cache(run.cache), run.device, self.meter, environments)
        return self.session

    def _track(self, items: Iterable[T], description: str) -> Iterator[T]:
        items = list(items)
        for done, item in enumerate(items):
            self.emit(event="progress", description=description, done=done, total=len(items))
            yield item


def main() -> None:
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries must not mix with events
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    discover()
    runner = Runner(lambda **event: print(json.dumps(event), file=events))
    for line in _lines(sys.stdin):
        task = json.loads(line)
        run = build(RunConfig, task["run"], "run")
        if run.threads:
            torch.set_num_threads(run.threads)
        record = runner.run(cell_from_dict(task["cell"]), run)
        runner.emit(event="end", key=record.key)


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines of the stream. A thread reads them, so that its end stops the process even in the middle of a cell."""
    waiting: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            waiting.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


if __name__ == "__main__":
    main()
