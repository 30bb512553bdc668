"""What sensitivity metrics cost: against model size, beside GPTQ and AWQ; and beside PyHessian at equal error.

python -m harness.bench hessian
python -m harness.bench hessian scale=small
python -m harness.bench hessian parts=[size] device=cuda sizes=[350M,1.3B,7B] limit=300 minutes=120
python -m harness.bench hessian parts=[pyhessian] peer.tolerance=0.1
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import psutil
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from harness.bench import beside, figures, peer, tables
from harness.bench.command import configure
from harness.bench.measure import SIZES, Point, measure_alone
from harness.bench.scaling import Grid, Limits, Outcome, run
from harness.config import build, part
from harness.messages import refusing, status
from harness.records import write_atomically
from harness.report.figures import save
from methods.base import METHODS, hint
from methods.sensitivity.base import METRICS

console = Console()

SHOWN = [
    "hutchinson",
    "eigenvalue",
    "lanczos",
    "gauss_newton",
    "fisher_trace",
    "fisher_diagonal",
    "kfac",
    "autoquantize_gradient",
    "output_mse",
    "gptq_loss",
    "measured",
]

# The work of a relative standard error of about 0.15 on the embedded model: 32 probes, or 16 drawn labelings; and 10
# products an eigenvalue. A random model's traces have no sign of their own: no error relative to them is ever reached.
OPTIONS: dict[str, dict[str, Any]] = {
    "hutchinson": {"tolerance": 0.0, "max_probes": 2},
    "eigenvalue": {"tolerance": 0.0, "max_iterations": 2, "sequences": 2},
    "lanczos": {"tolerance": 0.0, "max_products": 10, "sequences": 2},
    "gauss_newton": {"tolerance": 0.0, "max_draws": 16},
}
TIMES = {"hutchinson": 16, "eigenvalue": 5}


@dataclass
class HessianBench:
    """What to measure and where to write."""

    parts: list[str] = field(default_factory=lambda: ["size", "pyhessian"])
    sizes: list[str] = field(default_factory=lambda: ["1M", "4M", "16M", "64M", "125M", "350M"])
    lengths: list[int] = field(default_factory=lambda: [128, 512, 2048])
    metrics: list[str] = field(default_factory=lambda: list(SHOWN))
    methods: list[str] = field(default_factory=lambda: ["gptq", "awq"])
    options: dict[str, Any] = field(default_factory=dict)
    """Options of metrics: options.gauss_newton.max_draws=64."""
    times: dict[str, int] = field(default_factory=lambda: dict(TIMES))
    """A metric whose cost is proportional to an option can run a part of the work, and be charged for all of it."""
    sequences: int = 8
    """Sequences of the text, for metrics and methods alike."""
    repeats: int = 3
    """Runs of what takes less than 10 s."""
    limit: float = 120.0
    """Longest predicted run in seconds."""
    minutes: float = 16.0
    """Longest whole grid."""
    peer: beside.PeerConfig = field(default_factory=beside.PeerConfig)
    device: str = "cpu"
    threads: int = 0
    """Of torch; 0 leaves its choice."""
    seed: int = 0
    folder: str = "results"
    """Gets `tables/` and `figures/`."""


SMALL = {
    "sizes": ["1M", "4M"],
    "lengths": [64],
    "sequences": 2,
    "repeats": 2,
    "limit": 10.0,
    "minutes": 1.0,
    "peer": {"sequences": 4, "tolerance": 0.5, "every": 14, "probes": 3, "repeats": 1, "max_probes": 16},
}
CONFIG = configure("hessian", HessianBench, {"scale": "standard"})
_store = ConfigStore.instance()
_store.store(group="scale", name="standard", package="_global_", node={})
_store.store(group="scale", name="small", package="_global_", node=SMALL)


@hydra.main(version_base="1.3", config_path=None, config_name=CONFIG)
@refusing(console)
def job(config: DictConfig) -> None:
    """Measure, print, write."""
    chosen = part(HessianBench, config, "bench")
    for name in chosen.parts:
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}: {hint(name, PARTS)}")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    for name in chosen.parts:
        PARTS[name](chosen)


def against_size(config: HessianBench) -> None:
    """Part 1: cost against model size."""
    points = grid(config)
    limits = Limits(config.limit, 60 * config.minutes, partial(free_memory, config.device))
    patience = 2 * config.limit + 60
    frame = run(points, limits, lambda point: measure_alone(point, patience), _announce)
    if not (frame["status"] == "measured").any():
        raise ValueError("nothing was measured; raise limit and minutes, or take smaller sizes")
    header = tables.machine(torch.get_num_threads(), config.device)
    folder = Path(config.folder)
    write_atomically(folder / "tables" / "bench_hessian.csv", tables.csv(frame, header))
    page = tables.scaling_page(frame, header, work(points))
    write_atomically(folder / "tables" / "bench_hessian.md", page)
    figure = figures.cost_against_size(frame, f"Cost of sensitivity metrics and of quantization: {header}")
    save(figure, folder / "figures" / "bench_hessian")
    console.print(f"Wrote bench_hessian to {folder}/tables and {folder}/figures.")


def beside_pyhessian(config: HessianBench) -> None:
    """Part 2: Hutchinson and Gauss-Newton beside PyHessian."""
    if not peer.available():
        console.print(peer.MISSING, style="yellow", markup=False)
        return
    found = beside.compare(config.peer, config.device)
    header, folder = tables.machine(torch.get_num_threads(), config.device), Path(config.folder) / "tables"
    write_atomically(folder / "bench_pyhessian.csv", tables.csv(found.linears, header))
    page = beside.page(found, header)
    write_atomically(folder / "bench_pyhessian.md", page)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Wrote bench_pyhessian to {folder}.")


PARTS = {"size": against_size, "pyhessian": beside_pyhessian}


def grid(config: HessianBench) -> Grid:
    """The points of the configuration, with the options of each metric.

    Raises:
        ValueError: an unknown size, metric, method or option.
    """
    for size in config.sizes:
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: {hint(size, SIZES)}")
    sizes = sorted(config.sizes, key=lambda size: SIZES[size].parameters)
    if both := set(config.methods) & set(config.metrics):
        raise ValueError(f"{', '.join(sorted(both))} is the name of a metric and of a method; measure one of them")
    kinds = {"forward": "forward"} | dict.fromkeys(config.methods, "method") | dict.fromkeys(config.metrics, "metric")
    points = {}
    for row, kind in kinds.items():
        for length in sorted(config.lengths):
            options = _options(config, row, kind, length)
            for size in sizes:
                points[row, length, size] = Point(
                    kind,
                    row,
                    SIZES[size],
                    length,
                    config.sequences,
                    options,
                    device=config.device,
                    threads=config.threads,
                    seed=config.seed,
                    repeats=config.repeats,
                )
    return Grid(points, {row: count for row, count in config.times.items() if row in kinds})


def _options(config: HessianBench, row: str, kind: str, length: int) -> dict[str, Any]:
    if kind == "forward":
        return {}
    registered: type = METRICS[row] if kind == "metric" else METHODS[row]
    known = {f.name for f in fields(registered)}
    common = {"context": length, "sequences": config.sequences, **OPTIONS.get(row, {})}
    options = {name: value for name, value in common.items() if name in known} | config.options.get(row, {})
    build(registered, options, f"options.{row}")  # a mistyped option shows before anything is measured
    return options


def work(points: Grid) -> dict[str, str]:
    """Row to what it computes."""
    texts = {}
    for (row, _, _), point in points.points.items():
        options = " ".join(f"{name}={value}" for name, value in point.options.items() if name != "context")
        times = f"; measured, and multiplied by {points.times[row]}" if row in points.times else ""
        texts[row] = f"{options or 'no options'}, {point.sequences} sequences of text{times}"
    return texts


def free_memory(device: str) -> int:
    """Bytes that can be had now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _announce(row: str, length: int, size: str, outcome: Outcome) -> None:
    where = f"{row:22} {length:5} tokens {size:>5}"
    if isinstance(outcome, str):
        console.print(f"{where}  – {outcome}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        return
    console.print(
        f"{where}  {outcome.typical:8.2f} s  {outcome.extra_bytes / 1e9:6.2f} GB", markup=False, highlight=False
    )


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    return status(job, console, HessianBench, beside.PeerConfig)
