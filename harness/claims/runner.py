"""Run what the ledger lacks: cells without a record, each in one of a few workers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape

from harness.cell import Cell
from harness.claims.evidence import Evidence, Overrides
from harness.config import RunConfig
from harness.records import FAILED, Store
from harness.sweep import summary
from harness.workers import Worker


def lacking(evidence: Evidence, needs: Iterable[Overrides], store: Store) -> list[Cell]:
    """The cells that have no record yet, or one that failed: each once, those of a session side by side.

    Further calibration texts come first: claims that need several of them are then complete early.
    """
    cells = {cell.key: cell for cell in map(evidence.cell, dict.fromkeys(needs))}
    waiting = [cell for key, cell in cells.items() if (known := store.read(key)) is None or known.status == FAILED]
    return sorted(waiting, key=lambda cell: (repr(cell.model), -cell.data.seed, repr(cell.data), cell.seed))


def run(
    cells: Sequence[Cell],
    run: RunConfig,
    jobs: int,
    console: Console,
    beside: Sequence[Callable[[RunConfig], None]] = (),
) -> None:
    """Compute the cells in `jobs` worker processes, each with its share of the cores. Failures are records, too.

    Tasks `beside` run in this process, begin first and take the place of a job each.
    """
    share = replace(run, threads=run.threads or max(1, torch.get_num_threads() // jobs))
    torch.set_num_threads(share.threads)
    own, workers, done = threading.local(), [], itertools.count(1)

    def one(cell: Cell) -> None:
        if not hasattr(own, "worker"):
            own.worker = Worker()
            workers.append(own.worker)
        record = own.worker.run(cell, share)
        label = escape(" · ".join((*cell.labels.values(), f"data {cell.data.seed}, seed {cell.seed}")))
        console.print(f"[dim]\\[{next(done):>{len(str(len(cells)))}}/{len(cells)}][/dim] {label}  {summary(record)}")

    try:
        with ThreadPoolExecutor(jobs) as pool:
            others = [pool.submit(task, share) for task in beside]
            for _ in pool.map(one, cells):
                pass
            for other in others:
                other.result()
    finally:
        for worker in workers:
            worker.close()
