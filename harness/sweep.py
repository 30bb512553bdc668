"""The cells of a sweep: skip what is done, run the rest, remember what became of each, say so at the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from rich.markup import escape

from harness.cell import Cell
from harness.config import RunConfig
from harness.records import DONE, FAILED, SKIPPED, Record, Store, write_atomically
from harness.tracking import log_record, mirrored
from harness.workers import Worker

INVALID = "invalid"
SWEEP_VARIABLE = "HAWQ_BENCH_SWEEP"
SWEEPS = Path("results/runs/.sweeps")

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Outcome:
    """What became of one job of a sweep."""

    number: int
    cell: str
    status: str
    reason: str | None
    resumed: bool = False


class Outcomes:
    """The outcomes of one sweep, one file each, so that jobs in other processes or on other nodes can add theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_this_sweep(cls) -> Outcomes:
        """The folder that all jobs of this command share, through an environment variable that they inherit."""
        sweep = os.environ.setdefault(SWEEP_VARIABLE, f"{os.getpid()}-{os.urandom(4).hex()}")
        return cls(SWEEPS / sweep)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        write_atomically(self.folder / f"{outcome.number:06}.json", json.dumps(asdict(outcome)))

    def all(self) -> list[Outcome]:
        """In the order of the jobs."""
        return [Outcome(**json.loads(path.read_text())) for path in sorted(self.folder.glob("*.json"))]

    def discard(self) -> None:
        """Remove the folder once all has been told."""
        shutil.rmtree(self.folder, ignore_errors=True)


@cache
def shared_worker() -> Worker:
    """The worker of this process; one cell follows the other in it."""
    return Worker()


def run_cell(cell: Cell, run: RunConfig, *, force: bool = False, position: str = "") -> tuple[Record, bool]:
    """The record of a cell, and whether it was there already. Failures are tried again."""
    label = escape(" · ".join(cell.labels.values()))
    known = None if force else Store(run.results).read(cell.key)
    if known is not None and known.status != FAILED:
        console.print(f"[dim]{position} {label}  {summary(known)} (had it)[/dim]")
        return known, True
    with console.status(f"{position} {label}") as status:

        def listen(event: dict[str, Any]) -> None:
            detail = event.get("phase") or f"{event['description']} {event['done']}/{event['total']}"
            status.update(f"{position} {label}  [dim]{escape(detail)}[/dim]")

        record = shared_worker().run(cell, run, listen)
    console.print(f"{position} {label}  {summary(record)}")
    return record, False


def summary(record: Record) -> str:
    """What became of a cell, in one line of rich's markup."""
    if record.status != DONE:
        colour = {FAILED: "red", SKIPPED: "yellow"}[record.status]
        return f"[{colour}]{record.status}[/{colour}]: {escape(record.reason or '')}"
    result, seconds = record.result, record.cost["seconds"]["total"]
    return f"perplexity {result['perplexity']['value']:.2f} at {result['effective_bits']:.3f} bits, {seconds:.1f} s"


def conclude(outcomes: list[Outcome]) -> int:
    """Print how the sweep went, with every failure; return the exit status."""
    counts = Counter(o.status for o in outcomes)
    resumed = sum(o.resumed for o in outcomes)
    told = ", ".join(f"{counts[s]} {s}" for s in (DONE, SKIPPED, FAILED, INVALID) if counts[s])
    console.print(f"{len(outcomes)} cells: {told}" + (f" ({resumed} were there already)" if resumed else ""))
    for outcome in outcomes:
        if outcome.status in (FAILED, INVALID):
            console.print(f"[red]{outcome.status}[/red] {escape(outcome.cell)}: {escape(outcome.reason or '')}")
    return 2 if counts[INVALID] else 1 if counts[FAILED] else 0


def mirror(record: Record, resumed: bool, run: RunConfig, mode: str, group: str) -> None:
    """Show a record in wandb, unless it was there before."""
    if not (resumed and mirrored(Path(run.results), record.key)):
        log_record(record, mode=mode, group=group, directory=Path(run.results))


@cache
def _sweep_size(overrides: tuple[str, ...]) -> int:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return math.prod(len(list(o.sweep_iterator())) for o in parsed if o.is_sweep_override())


def position(hydra_config: Any) -> str:
    """Such as `[ 3/42]`: the number of this job and of all jobs of the sweep."""
    params = dict(hydra_config.sweeper.get("params") or {})
    params |= dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a and not a.startswith("-"))  # these win
    total = _sweep_size(tuple(f"{option}={values}" for option, values in params.items()))
    return f"[dim]\\[{hydra_config.job.num + 1:>{len(str(total))}}/{total}][/dim]"
