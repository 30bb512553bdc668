"""What the CPU kernels are worth: each width and form of inputs beside other implementations, and beside the speed at
which the machine reads memory.

python -m harness.bench cpu
python -m harness.bench cpu shapes=[[4096,4096]] tokens=[1] rounds=31
HAWQ_GGML=build/src python -m harness.bench cpu     # beside llama.cpp as well
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from rich.console import Console

from harness.bench import tables
from harness.bench.command import configure
from harness.config import part
from harness.messages import refusing, status
from harness.records import write_atomically
from harness.report.tables import markdown_text
from kernels.bench.cpu_contenders import GROUP, Contender, contenders, task
from kernels.bench.ggml import library as ggml
from kernels.bench.rounds import Times, in_turns
from kernels.cpu.library import load
from kernels.cpu.pages import moved

console = Console()
log = logging.getLogger(__name__)

LEGEND = (
    "One product x · Wᵀ a call, in one process, taking turns; each with copies of its weights that together are larger "
    "than the last cache. Ours: groups of {group}, fp16 scales and packed zeros; A8 rounds inputs to 8 bits by token, "
    "inside the time; the others get inputs that are rounded already. *ms*: median of {rounds} rounds, and quartiles. "
    "*GB/s*: stored bytes of the matrix over the median; *of read*: over the speed of reading memory, measured in the "
    "same rounds. *W4A8 faster*: time over that of W4A8, median over rounds, and its 95 % interval by resampling. "
    "*Error*: ‖y − exact‖ over ‖exact‖, against float64, before the timing."
)
READ = "reading memory"
BASE = "W4A8"
SPACE = 2**28
"""Bytes that are read to measure the speed of it."""
PRODUCT = (512, 4096, 4096)
"""Rows, sums and columns of the product whose speed counts as the peak of a dtype."""


@dataclass
class CpuBench:
    """What to measure and where to write."""

    shapes: list[list[int]] = field(default_factory=lambda: [[4096, 4096], [4096, 11008], [11008, 4096]])
    """[out, in]."""
    tokens: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    rounds: int = 15
    threads: int = 1
    noise: float = 0.1
    """Largest distance of quartiles, relative to the median, of the speed of reading memory."""
    attempts: int = 4
    """At a shape and number of tokens, as long as the machine is too noisy."""
    seed: int = 0
    folder: str = "results"
    """Gets `tables/`."""


CONFIG = configure("cpu", CpuBench)


@hydra.main(version_base="1.3", config_path=None, config_name=CONFIG)
@refusing(console)
def job(config: DictConfig) -> None:
    """Measure, print, write; exit status 3, and nothing written, where the machine stays too noisy."""
    chosen = part(CpuBench, config, "bench")
    if load() is None:
        raise ValueError("there is nothing to measure: the CPU kernels cannot be built, see the warning")
    torch.set_num_threads(chosen.threads)
    header = tables.machine(chosen.threads, "cpu")
    read = reader()
    cases = [(out, columns, tokens) for out, columns in chosen.shapes for tokens in chosen.tokens]
    parts = [measure_in_quiet(chosen, out, columns, tokens, read) for out, columns, tokens in cases]
    frame = pd.concat(parts, ignore_index=True)
    page = cpu_page(frame, header, chosen)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    if noise(frame) > chosen.noise:
        told = f"quartiles of the speed of reading memory lie {100 * noise(frame):.0f} % apart"
        limit = f"more than {100 * chosen.noise:.0f} %, in each of {chosen.attempts} attempts at a shape"
        remedy = "Nothing was written; run it again when nothing else runs."
        console.print(f"The machine was too noisy to tell: {told}, {limit}. {remedy}", style="red", markup=False)
        raise SystemExit(3)
    folder = Path(chosen.folder) / "tables"
    write_atomically(folder / "bench_cpu.csv", tables.csv(frame, header))
    write_atomically(folder / "bench_cpu.md", page)
    write_atomically(folder / "kernels_cpu.csv", tables.csv(under_roofs(frame, peaks(chosen.rounds)), header))


def reader() -> Callable[[int], object]:
    """Reads `SPACE` bytes of huge pages from memory, with all threads."""
    library = load()
    assert library is not None
    space = moved(torch.zeros(SPACE, dtype=torch.uint8))
    return lambda _: library.read(space)


def peaks(rounds: int) -> dict[str, float]:
    """Operations a second of a large product of torch's, a multiplication and an addition being two, by dtype."""
    rows, sums, columns = PRODUCT
    operations: dict[str, Callable[[int], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(rows, sums, dtype=dtype), torch.ones(columns, sums, dtype=dtype)
        operations[str(dtype).removeprefix("torch.")] = partial(_linear, x, weight)
    bytes_ = torch.ones(rows, sums, dtype=torch.int8), torch.ones(columns, sums, dtype=torch.int8)
    operations["int8"] = lambda _: torch._int_mm(bytes_[0], bytes_[1].t())
    times = in_turns(operations, rounds)
    return {name: 2 * rows * sums * columns / taken.median for name, taken in times.items()}


def _linear(x: torch.Tensor, weight: torch.Tensor, _: int) -> torch.Tensor:
    return F.linear(x, weight)


def under_roofs(frame: pd.DataFrame, flops: Mapping[str, float]) -> pd.DataFrame:
    """The products alone, with what a roofline needs, see `harness.report.roofline`."""
    reading = frame["kernel"] == READ
    ceilings = {"ceiling_read": 1e9 * frame.loc[reading, "gb_per_s"].median()}
    ceilings |= {f"ceiling_flops_{name}": rate for name, rate in flops.items()}
    return frame[~reading].assign(**ceilings)


def measure_in_quiet(
    config: CpuBench, out: int, columns: int, tokens: int, read: Callable[[int], object]
) -> pd.DataFrame:
    """`measure`, again while the machine is too noisy: a neighbour's minute should not cost the whole bench."""
    for attempt in range(1, config.attempts + 1):
        found = measure(config, out, columns, tokens, read)
        if noise(found) <= config.noise:
            break
        log.warning("%d × %d, %d tokens: too noisy in attempt %d", out, columns, tokens, attempt)
    return found


def measure(config: CpuBench, out: int, columns: int, tokens: int, read: Callable[[int], object]) -> pd.DataFrame:
    """A row for each contender and for reading memory.

    Raises:
        ValueError: a contender computes something else.
    """
    found = contenders(task(out, columns, tokens, config.seed))
    errors = {name: contender.error() for name, contender in found.items()}
    for name, error in errors.items():
        if not error <= found[name].tolerance:
            raise ValueError(f"{name} is wrong: its relative error is {error:.2g}, not {found[name].tolerance:g}")
    times = in_turns({READ: read, **found}, config.rounds)
    shape = {"out": out, "in": columns, "tokens": tokens}
    frame = pd.DataFrame([{**shape, **row(name, times, found.get(name), errors.get(name))} for name in times])
    seconds, work = frame["ms"] / 1e3, 2 * out * columns * tokens
    moved_bytes = 1e9 * frame["gb_per_s"] * seconds + 4 * tokens * (out + columns)
    return frame.assign(intensity=work / moved_bytes, flops=work / seconds, bandwidth=1e9 * frame["gb_per_s"])


def row(name: str, times: Mapping[str, Times], contender: Contender | None, error: float | None) -> dict[str, Any]:
    """Numbers of one contender; None stands for the reading of memory."""
    taken, size = times[name], SPACE if contender is None else contender.bytes
    ratio, low, high = times[BASE].speedup(taken)
    speed, (first, third) = size / taken.median, taken.quartiles
    return {
        "kernel": name,
        "peer": "" if contender is None else contender.peer,
        "ms": 1e3 * taken.median,
        "ms_low": 1e3 * first,
        "ms_high": 1e3 * third,
        "spread": taken.spread,
        "gb_per_s": speed / 1e9,
        "of_read": speed * times[READ].median / SPACE,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "error": error,
    }


def noise(frame: pd.DataFrame) -> float:
    """Largest distance of quartiles, relative to the median, of the speed of reading memory."""
    return float(frame.loc[frame["kernel"] == READ, "spread"].max())


def cpu_page(frame: pd.DataFrame, header: str, config: CpuBench) -> str:
    """A table for each shape and number of tokens."""
    parts = [LEGEND.format(group=GROUP, rounds=config.rounds), f"Measured on {markdown_text(header)}."]
    if ggml() is None:
        parts.append("llama.cpp Q4\\_K: not measured, HAWQ\\_GGML names no build of ggml.")
    for (out, columns, tokens), rows in frame.groupby(["out", "in", "tokens"], sort=False):
        title = f"## {out} × {columns}, {tokens} token{'' if tokens == 1 else 's'}"
        parts += [title, tables.grid([_cells(one) for _, one in rows.iterrows()])]
    return tables.markdown("CPU kernels", parts)


def _cells(found: pd.Series) -> dict[str, str]:
    reading = found["kernel"] == READ
    return {
        "kernel": found["kernel"],
        "ms": tables.spread(found["ms"], found["ms_low"], found["ms_high"]),
        "GB/s": f"{found['gb_per_s']:.1f}",
        "of read": f"{100 * found['of_read']:.0f} %",
        "W4A8 faster": "–" if reading else tables.spread(found["ratio"], found["ratio_low"], found["ratio_high"]),
        "error": "–" if reading else f"{found['error']:.1e}",
    }


def main() -> int:
    """Exit status: 0 when done, 2 for bad input, 3 for a noisy machine."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    return status(job, console, CpuBench)
