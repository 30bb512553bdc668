"""Score every linear of a model by every metric, and compare the rankings with the measured truth.

python -m harness.sensitivity model=tiny metrics=all
python -m harness.sensitivity model=local model.path=DIR data=text data.path=FILE.jsonl metrics=[hutchinson,kfac]
python -m harness.sensitivity model=tiny metrics=[hutchinson] options.hutchinson.tolerance=0.05
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console

from harness.cache import Cache
from harness.cell import Cell
from harness.config import RunConfig, build, part, register_configs
from harness.data import DataConfig
from harness.evaluate import EvalConfig
from harness.memory import MemoryMeter
from harness.messages import refusing, status
from harness.models import ModelConfig
from harness.sensitivity import report, study
from harness.session import Session
from methods.base import hint
from methods.budget import Budget
from methods.formats.registry import named_format
from methods.fp16 import FP16
from methods.sensitivity.base import METRICS, Metric
from methods.sensitivity.measured import Measured

console = Console(width=max(150, Console().width))  # a narrow window wraps; no number is cut
TRUTH = {"sequences": 32, "context": 256}  # more text than a metric of the same kind takes: it is the reference


@dataclass
class SensitivityConfig:
    """The root of this command's configuration."""

    model: Any = MISSING
    data: Any = MISSING
    run: Any = MISSING
    metrics: Any = "all"
    """Names of metrics, or all."""
    options: Any = MISSING
    """Options of metrics: options.hutchinson.tolerance=0.05; `truth` is the measured loss on test text."""
    bits: list[int] = field(default_factory=lambda: [2, 3, 4, 8])
    """Widths of the integer format at which linears are rounded."""
    group_size: int = 128
    """Columns that share a scale; 0 means one scale per output channel."""
    formats: list[str] = field(default_factory=list)
    """Further formats, such as nvfp4."""
    seed: int = 0
    """Seeds every random estimate."""
    folder: str = "results"
    """Gets `tables/` and `figures/`."""


def _schema() -> DictConfig:
    """Every option of every metric, so that Hydra knows them by name and type."""
    options = {name: OmegaConf.structured(cls) for name, cls in METRICS.complete().items()}
    options["truth"] = OmegaConf.structured(Measured(**TRUTH))
    schema = OmegaConf.structured(SensitivityConfig)
    for node in options.values():
        OmegaConf.set_readonly(node, False)  # frozen dataclasses make read-only nodes
    schema.options = options
    return schema


ConfigStore.instance().store(name="base_sensitivity", node=_schema())
register_configs()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="sensitivity")
@refusing(console)
def job(config: DictConfig) -> None:
    """Measure, print, write."""
    run = part(RunConfig, config.run, "run")
    if run.threads:
        torch.set_num_threads(run.threads)
    options = OmegaConf.to_container(config.options, resolve=True)
    metrics, truth = chosen(config.metrics, options)  # type: ignore[arg-type]
    budget = Budget(bits=4, group_size=config.group_size)
    formats = [*(budget.format(width) for width in config.bits), *map(named_format, config.formats)]
    model, data = part(ModelConfig, config.model, "model"), part(DataConfig, config.data, "data")
    cell = Cell(model, data, FP16(), budget, EvalConfig(), config.seed)
    session = Session(cell, Cache(run.cache), run.device, MemoryMeter())
    found = study.run(session, metrics, truth, formats, config.seed, lambda *told: report.announce(console, *told))
    paths = report.write(found, f"{model.name} on {data.name}", Path(config.folder))
    report.show(console, found)
    console.print(f"Wrote {', '.join(map(str, paths))}.")


def chosen(names: Any, options: dict[str, dict[str, Any]]) -> tuple[list[Metric], Measured]:
    """The metrics that were asked for, and the truth, with their options.

    Raises:
        ValueError: an unknown metric or option.
    """
    known = [*METRICS.complete(), "truth"]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown metric options.{name}: {hint(name, known)}")
    wanted = sorted(METRICS) if names == "all" else [names] if isinstance(names, str) else list(names)
    metrics = [build(METRICS[name], options.get(name, {}), f"options.{name}") for name in wanted]
    return metrics, build(Measured, options.get("truth", TRUTH), "options.truth")


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    return status(job, console, SensitivityConfig)


if __name__ == "__main__":
    sys.exit(main())
