"""Tokens a second of packed models beside the same model unpacked: the embedded shape, and a model of 10⁹ parameters.

python -m harness.bench decode
python -m harness.bench decode sizes=[tiny] formats=[w4] dtypes=[float32]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from omegaconf import DictConfig
from rich.console import Console

from harness.accounting import packed_copy, storage
from harness.bench import tables
from harness.bench.command import configure
from harness.bench.measure import SIZES, Point, random_network
from harness.config import part
from harness.messages import refusing, status
from harness.metrics import RATES, ends
from harness.models import DTYPES
from harness.records import write_atomically
from harness.report.tables import markdown_text
from harness.throughput import throughput
from kernels.activations import TokenScale, integers
from methods.base import Quantized, hint
from methods.formats.integer import Integer
from methods.network import Network
from methods.rounding.nearest import round_to_nearest

console = Console()

LEGEND = (
    "Random Llama models. Linears in groups of 128, rounded to nearest; the embedding, which is the head too, stays. "
    "*a8*: inputs of linears are rounded to 8 bits by token, inside the time. Tokens a second: median of {rounds} "
    "rounds, and quartiles; *prefill* reads {prompt} tokens, *decode* one more after them. *Times unpacked*: over the "
    "same model with all weights in the dtype of the row, both taking turns; median of rounds, and 95 % interval by "
    "resampling."
)
GROUP = 128


@dataclass
class DecodeBench:
    """What to measure and where to write."""

    sizes: list[str] = field(default_factory=lambda: ["tiny", "1.3B"])
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    formats: list[str] = field(default_factory=lambda: ["w8", "w4", "w3", "w2", "w8a8", "w4a8"])
    """wN or wNa8."""
    prompt: int = 32
    """Tokens."""
    rounds: int = 5
    device: str = "cpu"
    threads: int = 0
    """Of torch; 0 leaves its choice."""
    seed: int = 0
    folder: str = "results"
    """Gets `tables/`."""


CONFIG = configure("decode", DecodeBench)


@hydra.main(version_base="1.3", config_path=None, config_name=CONFIG)
@refusing(console)
def job(config: DictConfig) -> None:
    """Measure, print, write."""
    chosen = part(DecodeBench, config, "bench")
    for name, known in [(n, SIZES) for n in chosen.sizes] + [(n, DTYPES) for n in chosen.dtypes]:
        if name not in known:
            raise ValueError(f"unknown {name!r}: {hint(name, known)}")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    header = tables.machine(torch.get_num_threads(), chosen.device)
    frame = pd.DataFrame([row for size in chosen.sizes for row in measure(chosen, size)])
    page = decode_page(frame, header, chosen)
    stem = Path(chosen.folder) / "tables" / "bench_decode"
    write_atomically(stem.with_suffix(".csv"), tables.csv(frame, header))
    write_atomically(stem.with_suffix(".md"), page)
    console.print(page, markup=False, highlight=False, soft_wrap=True)


def measure(config: DecodeBench, size: str) -> list[dict[str, Any]]:
    """A row for each dtype and format."""
    point = Point("method", "rtn", SIZES[size], 2 * config.prompt, 1, device=config.device, seed=config.seed)
    network = random_network(point)
    prompt = torch.randint(SIZES[size].vocabulary, (config.prompt,), generator=torch.Generator().manual_seed(0))
    rows = []
    for dtype in config.dtypes:
        network.model.to(DTYPES[dtype])
        for fmt in config.formats:
            console.print(f"{size} {dtype} {fmt}", style="dim", highlight=False)
            packed = packed_copy(network, rounded(network, fmt))
            found = throughput(network.model, packed, prompt, config.rounds)
            bits = storage(packed)["effective_bits"]
            rows.append({"size": size, "dtype": dtype, "format": fmt, "effective_bits": bits} | ends(found, RATES))
    return rows


def rounded(network: Network, fmt: str) -> Quantized:
    """Every linear in the format `wN` or `wNa8`.

    Raises:
        ValueError: it is neither.
    """
    width, _, inputs = fmt.removeprefix("w").partition("a")
    if not width.isdigit() or inputs not in ("", "8"):
        raise ValueError(f"unknown format {fmt!r}: take wN or wNa8, such as w4 or w4a8")
    integer = Integer(int(width), GROUP)
    packed = {name: round_to_nearest(network.weight(name), integer).packed for name in network.linears}
    return Quantized(packed, inputs=dict.fromkeys(packed, TokenScale(integers(8))) if inputs else {})


def decode_page(frame: pd.DataFrame, header: str, config: DecodeBench) -> str:
    """A table for each model and dtype."""
    parts = [LEGEND.format(rounds=config.rounds, prompt=config.prompt), f"Measured on {markdown_text(header)}."]
    for (size, dtype), rows in frame.groupby(["size", "dtype"], sort=False):
        millions = SIZES[str(size)].parameters / 1e6
        parts += [f"## {size}, {dtype}: {millions:.0f} · 10⁶ weights in linears"]
        parts += [tables.grid([_cells(row) for _, row in rows.iterrows()])]
    return tables.markdown("Tokens a second", parts)


def _cells(row: pd.Series) -> dict[str, str]:
    def text(name: str) -> str:
        return tables.spread(row[name], row[f"{name}_low"], row[f"{name}_high"])

    return {
        "format": row["format"],
        "stored bits": f"{row['effective_bits']:.2f}",
        "prefill tokens/s": text("prefill"),
        "times unpacked": text("prefill_speedup"),
        "decode tokens/s": text("decode"),
        "times unpacked ": text("decode_speedup"),
    }


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    return status(job, console, DecodeBench)
