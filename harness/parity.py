"""Our methods beside the libraries that made them known: the same checkpoint, calibration tokens, bits and judge.

python -m harness.parity
python -m harness.parity pairs=[gptq,hqq] budgets=[w4g128]
python -m harness.parity model=local model.path=DIR data=text data.path=FILE.jsonl budgets=[w3g32,w4g32]
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from rich.console import Console

from harness.bench.tables import csv, grid, machine, markdown
from harness.cell import Cell
from harness.config import RunConfig, build, named_budgets, part, register_configs
from harness.data import DataConfig
from harness.evaluate import EvalConfig
from harness.intervals import paired_difference
from harness.messages import refusing, status
from harness.models import ModelConfig
from harness.records import DONE, Record, write_atomically
from harness.sweep import run_cell
from methods.base import METHODS, hint

console = Console(width=max(150, Console().width))

LEGEND = (
    "Each row quantizes one checkpoint twice, by our adapter and by the library in its own environment, on the same "
    "calibration tokens; both results are packed, counted and evaluated by us. *Ratio*: our perplexity over the "
    "library's, with a 95 % bootstrap interval that pairs the windows; *no worse* unless the interval lies above 1. "
    "*Times faster*: the library's seconds over ours. Seconds run from the loaded model to the quantized one, without "
    "imports; GB is the largest resident size of the process meanwhile, the model included."
)


@dataclass
class Pair:
    """Two methods to compare, as `name` and options."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    budgets: list[str] = field(default_factory=list)
    """Where the pair makes sense; all budgets of the command by default."""


@dataclass
class ParityConfig:
    """The root of this command's configuration."""

    model: Any = MISSING
    data: Any = MISSING
    run: Any = MISSING
    table: dict[str, Pair] = field(default_factory=dict)
    """Every pair by name."""
    pairs: list[str] = field(default_factory=list)
    """Names of pairs; all by default."""
    budgets: list[str] = field(default_factory=lambda: ["w3g128", "w4g128"])
    force: bool = False
    """Compute cells again that are done."""
    folder: str = "results"
    """Gets `tables/`."""


ConfigStore.instance().store(name="base_parity", node=ParityConfig)
register_configs()


@hydra.main(version_base="1.3", config_path="../conf", config_name="parity")
@refusing(console)
def job(config: DictConfig) -> None:
    """Run, print, write."""
    run = part(RunConfig, config.run, "run")
    model, data = part(ModelConfig, config.model, "model"), part(DataConfig, config.data, "data")
    rows = []
    for name, pair in chosen(config).items():
        for budget in pair.budgets or list(config.budgets):
            ours, theirs = (
                run_cell(_cell(model, data, options, budget), run, force=config.force)[0]
                for options in (pair.ours, pair.theirs)
            )
            rows.append({"pair": name, "budget": budget, **compare(ours, theirs)})
    frame = pd.DataFrame(rows)
    header = machine(run.threads or torch.get_num_threads(), run.device)
    page = markdown(f"Parity on {model.name}", [LEGEND, f"Measured on {header}.", grid([_shown(r) for r in rows])])
    stem = Path(config.folder) / "tables" / f"parity_{model.name}"
    write_atomically(stem.with_suffix(".md"), page)
    write_atomically(stem.with_suffix(".csv"), csv(frame, header))
    console.print(page, markup=False)


def chosen(config: DictConfig) -> dict[str, Pair]:
    """The pairs that were asked for.

    Raises:
        ValueError: an unknown pair.
    """
    table = {name: part(Pair, node, f"table.{name}") for name, node in config.table.items()}
    for name in config.pairs:
        if name not in table:
            raise ValueError(f"unknown pair {name!r}: {hint(name, table)}")
    return {name: table[name] for name in config.pairs or table}


def _cell(model: ModelConfig, data: DataConfig, options: dict[str, Any], budget: str) -> Cell:
    known = named_budgets()
    if budget not in known:
        raise ValueError(f"unknown budget {budget!r}: {hint(budget, known)}")
    others = {key: value for key, value in options.items() if key != "name"}
    method = build(METHODS[options["name"]], others, "method")
    return Cell(model, data, method, known[budget], EvalConfig(kl=False, layer_error=False))


def compare(ours: Record, theirs: Record) -> dict[str, Any]:
    """One row: both results, and what differs."""
    row: dict[str, Any] = {"our_method": ours.labels["method"], "their_method": theirs.labels["method"]}
    for side, record in (("our", ours), ("their", theirs)):
        row[f"{side}_status"], row[f"{side}_reason"] = record.status, record.reason
        if record.status == DONE:
            seconds = record.cost["seconds"]
            row[f"{side}_perplexity"] = record.result["perplexity"]["value"]
            row[f"{side}_bits"] = record.result["effective_bits"]
            row[f"{side}_seconds"] = seconds["quantize"] + seconds.get("statistics", 0.0)
            row[f"{side}_peak_gb"] = record.cost["quantize_peak_bytes"] / 1e9
    if ours.status == theirs.status == DONE:
        difference = paired_difference(ours.result["nll"], theirs.result["nll"])
        low, high = math.exp(difference.low), math.exp(difference.high)
        row |= {"ratio": math.exp(difference.value), "ratio_low": low, "ratio_high": high}
        row["times_faster"] = row["their_seconds"] / row["our_seconds"]
        row["verdict"] = "worse" if low > 1 else "better" if high < 1 else "no worse"
    return row


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """A row as text."""

    def side(which: str, key: str, form: str) -> str:
        value = row.get(f"{which}_{key}")
        return row[f"{which}_status"] if value is None else form.format(value)

    def both(key: str, form: str) -> str:
        return f"{side('our', key, form)} / {side('their', key, form)}"

    ratio = "ratio" in row
    return {
        "ours / library": f"{row['our_method']} / {row['their_method']}",
        "budget": row["budget"],
        "perplexity": both("perplexity", "{:.3f}"),
        "ratio": f"{row['ratio']:.4f} [{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]" if ratio else "",
        "": row.get("verdict", ""),
        "stored bits": both("bits", "{:.3f}"),
        "seconds": both("seconds", "{:.2f}"),
        "times faster": f"{row['times_faster']:.1f}" if ratio else "",
        "GB": both("peak_gb", "{:.2f}"),
        "reason": row["our_reason"] or row["their_reason"] or "",
    }


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    return status(job, console, ParityConfig)


if __name__ == "__main__":
    sys.exit(main())
