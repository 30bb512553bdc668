"""What quantization costs: every method on the embedded model's shape, on random models, on one block of a 7 B
model; and our form of GPTQ beside the paper's.

python -m harness.bench quantize
python -m harness.bench quantize sizes=[tiny] methods=[rtn,gptq]
python -m harness.bench quantize parts=[gptq] shapes=[[4096,4096]]
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from harness.bench import tables
from harness.bench.command import configure
from harness.bench.hessian import free_memory
from harness.bench.measure import SIZES, Measurement, Point, measure_alone
from harness.bench.scaling import Grid, Limits, Outcome, run
from harness.bench.textbook import textbook_gptq
from harness.config import build, part
from harness.messages import refusing, status
from harness.records import write_atomically
from methods.base import METHODS, Method, UniformMethod, hint
from methods.formats.integer import Integer
from methods.rounding.gptq import GPTQRounding
from methods.toolchains.base import Toolchain

console = Console()

# Steps are all alike: a part of them is run, and the rest charged for.
PARTLY: dict[str, tuple[dict[str, Any], int]] = {
    "autoround": ({"iters": 10}, 20),
    "teq": ({"steps": 20}, 50),
    "omniquant": ({"epochs": 1}, 20),
    "qat": ({"steps": 4}, 50),
}
LEGEND = (
    "Seconds to quantize to 4 bits in groups of 128, calibration included, and peak memory beyond the loaded model; "
    "each in a process of its own, on random weights and text. 7B-block: one block as wide as those of a 7 B model. "
    "Methods that learn were run for a part of their steps and charged for all (column *times*)."
)
GPTQ_LEGEND = (
    "Rounding one linear by GPTQ, given its Gram matrix, factorization included: our left-looking form beside the "
    "paper's, alternating in one process. *Shared*: each further linear with the same input, which needs no "
    "factorization of its own. *Equal codes*: share of entries. *Loss ratio*: ours over the paper's."
)


@dataclass
class QuantizeBench:
    """What to measure and where to write."""

    parts: list[str] = field(default_factory=lambda: ["methods", "gptq"])
    methods: list[str] = field(default_factory=list)
    """All that give every linear the same width, by default."""
    sizes: list[str] = field(default_factory=lambda: ["tiny", "125M", "7B-block"])
    length: int = 128
    sequences: int = 32
    repeats: int = 3
    """Runs of what takes less than 10 s."""
    limit: float = 120.0
    """Seconds after which a method is stopped."""
    minutes: float = 30.0
    """Longest whole grid."""
    shapes: list[list[int]] = field(default_factory=lambda: [[256, 256], [768, 768], [768, 2304], [4096, 4096]])
    """[out, in] of the linears for GPTQ."""
    device: str = "cpu"
    threads: int = 0
    """Of torch; 0 leaves its choice."""
    seed: int = 0
    folder: str = "results"
    """Gets `tables/`."""


CONFIG = configure("quantize", QuantizeBench)


@hydra.main(version_base="1.3", config_path=None, config_name=CONFIG)
@refusing(console)
def job(config: DictConfig) -> None:
    """Measure, print, write."""
    chosen = part(QuantizeBench, config, "bench")
    for name in chosen.parts:
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}: {hint(name, PARTS)}")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    header = tables.machine(torch.get_num_threads(), chosen.device)
    for name in chosen.parts:
        frame, page = PARTS[name](chosen, header)
        stem = Path(chosen.folder) / "tables" / f"bench_{FILES[name]}"
        write_atomically(stem.with_suffix(".csv"), tables.csv(frame, header))
        write_atomically(stem.with_suffix(".md"), page)
        console.print(page, markup=False, highlight=False, soft_wrap=True)


def measurable() -> list[str]:
    """Methods that give every linear the same width, in this process."""
    return [name for name, cls in sorted(METHODS.complete().items()) if _measurable(cls)]


def _measurable(cls: type[Method]) -> bool:
    return issubclass(cls, UniformMethod) and not issubclass(cls, Toolchain)


def cost_of_methods(config: QuantizeBench, header: str) -> tuple[pd.DataFrame, str]:
    """Part 1: a row a method and size."""
    for size in config.sizes:
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: {hint(size, SIZES)}")
    names = config.methods or measurable()
    points = {
        (name, config.length, size): Point(
            "method",
            name,
            SIZES[size],
            config.length,
            config.sequences,
            _options(name, config.sequences),
            device=config.device,
            threads=config.threads,
            seed=config.seed,
            repeats=config.repeats,
        )
        for name in names
        for size in sorted(config.sizes, key=lambda size: SIZES[size].parameters)
    }
    limits = Limits(config.limit, 60 * config.minutes, partial(free_memory, config.device))
    times = {name: count for name, (_, count) in PARTLY.items() if name in names}
    frame = run(Grid(points, times), limits, lambda point: measure_alone(point, config.limit), _announce)
    rows = [_shown(row) for _, row in frame.iterrows()]
    page = [LEGEND, f"Measured on {tables.markdown_text(header)}.", tables.grid(rows)]
    return frame, tables.markdown("Cost of quantization", page)


def _options(name: str, sequences: int) -> dict[str, Any]:
    """The options of a run: a part of the steps, and no more sequences than there are."""
    known = {f.name for f in fields(METHODS[name])}
    options = dict(PARTLY.get(name, ({}, 1))[0]) | ({"sequences": sequences} if "sequences" in known else {})
    build(METHODS[name], options, f"options.{name}")
    return options


def _shown(row: pd.Series) -> dict[str, str]:
    measured = row["status"] == "measured"
    return {
        "method": row["row"],
        "model": row["size"],
        "seconds": tables.spread(row["seconds"], row["seconds_low"], row["seconds_high"]) if measured else "–",
        "GB beyond the model": f"{row['extra_bytes'] / 1e9:.2f}" if measured else "–",
        "times": str(row["times"]) if row["times"] > 1 else "",
        "not measured because": "" if measured else row["reason"],
    }


def _announce(row: str, length: int, size: str, outcome: Outcome) -> None:
    del length
    told = f"{outcome.typical:8.2f} s" if isinstance(outcome, Measurement) else f"– {outcome}"
    console.print(f"{row:20} {size:>9}  {told}", markup=False, highlight=False, soft_wrap=True)


def gptq_beside_the_paper(config: QuantizeBench, header: str) -> tuple[pd.DataFrame, str]:
    """Part 2: a row a shape."""
    rows = [_compare(out, columns, config) for out, columns in config.shapes]
    frame = pd.DataFrame(rows)
    shown = [
        {
            "out × in": f"{row['out']} × {row['in']}",
            "ours, s": f"{row['ours']:.3g}",
            "shared, s": f"{row['shared']:.3g}",
            "paper's, s": f"{row['textbook']:.3g}",
            "times faster": tables.spread(row["ratio"], row["ratio_low"], row["ratio_high"]),
            "equal codes": f"{row['equal_codes']:.2%}",
            "loss ratio": f"{row['loss_ratio']:.6f}",
        }
        for row in rows
    ]
    page = [GPTQ_LEGEND, f"Measured on {tables.markdown_text(header)}.", tables.grid(shown)]
    return frame, tables.markdown("GPTQ beside its textbook form", page)


def _compare(out: int, columns: int, config: QuantizeBench) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config.seed)
    weight = torch.randn(out, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    x = x * torch.exp(torch.randn(columns, generator=generator)) + x.roll(1, 1)  # uneven energies, correlated neighbors
    gram, fmt = x.T @ x / len(x), Integer(4, 128)
    seconds: dict[str, list[float]] = {"ours": [], "shared": [], "textbook": []}
    for _ in range(max(config.repeats, 2)):
        began = time.perf_counter()
        rounder = GPTQRounding().given(gram)
        factored = time.perf_counter() - began
        ours, shared = _timed(partial(rounder, weight, fmt))
        (codes, rounded), textbook = _timed(partial(textbook_gptq, weight, gram, fmt))
        for name, taken in (("ours", factored + shared), ("shared", shared), ("textbook", textbook)):
            seconds[name].append(taken)
    ratios = [theirs / own for theirs, own in zip(seconds["textbook"], seconds["ours"], strict=True)]
    return {
        "out": out,
        "in": columns,
        **{name: statistics.median(taken) for name, taken in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "equal_codes": float((ours.packed.unpacked_codes() == codes).float().mean()),
        "loss_ratio": _loss(ours.weight - weight, gram) / _loss(rounded - weight, gram),
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def _loss(delta: Tensor, gram: Tensor) -> float:
    return float((delta.double() @ gram.double() * delta.double()).sum())


PARTS = {"methods": cost_of_methods, "gptq": gptq_beside_the_paper}
FILES = {"methods": "quantize", "gptq": "gptq"}


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    return status(job, console, QuantizeBench)
