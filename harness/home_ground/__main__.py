"""HAWQ where it was first validated: a small CNN and a small BERT-style encoder, trained here, quantized, compared.

python -m harness.home_ground                                    # minutes on 2 cores; trained weights are kept
python -m harness.home_ground models=[cnn] seeds=[0] folder=DIR  # a part of it
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console

from harness.cache import Cache
from harness.config import RunConfig, build, part, register_configs
from harness.home_ground import ranks, report, table
from harness.home_ground.study import Outcome, Study
from harness.home_ground.train import HOMES, Home, trained
from harness.messages import refusing, status
from methods.base import hint

console = Console()


@dataclass
class HomeConfig:
    """The root of this command's configuration."""

    run: Any = MISSING
    models: list[str] = field(default_factory=lambda: sorted(HOMES))
    """Of `cnn` and `encoder`."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each trains a model of its own."""
    budgets: list[str] = field(default_factory=lambda: ["2.75", "w3", "3.5"])
    """Stored bits a weight, or `w3`: what 3-bit codes store on a grid."""
    randoms: int = 20
    """Random plans a budget and grid."""
    folder: str = "results"
    """Gets `tables/` and `figures/`."""


ConfigStore.instance().store(name="base_home_ground", node=HomeConfig)
register_configs()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="home_ground")
@refusing(console)
def job(config: DictConfig) -> None:
    """Train, score, allocate, round, test, write."""
    run = part(RunConfig, config.run, "run")
    if run.threads:
        torch.set_num_threads(run.threads)
    chosen = build(HomeConfig, OmegaConf.to_container(config, resolve=True), "home")  # type: ignore[arg-type]
    homes = {name: home(name) for name in chosen.models}
    outcomes: dict[tuple[str, int], list[Outcome]] = {}
    scores: list[pd.DataFrame] = []
    for (name, home_), seed in product(homes.items(), chosen.seeds):
        study = _study(home_, seed, chosen, Cache(run.cache))
        found = study.scored()
        scores += [ranks.tidy(own).assign(model=name, seed=seed, grid=grid) for grid, own in found.items()]
        outcomes[name, seed] = list(study.outcomes(found))
        full = outcomes[name, seed][0]
        console.print(f"{name} seed {seed}: {len(outcomes[name, seed])} plans, accuracy {full.correct.mean():.3f}")
    paths = report.write(table.frame(outcomes), ranks.agreement(pd.concat(scores)), Path(chosen.folder))
    console.print(f"Wrote {', '.join(map(str, paths))}.")


def home(name: str) -> Home:
    """A model on its task, by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in HOMES:
        raise ValueError(f"unknown model {name!r}: {hint(name, HOMES)}")
    return HOMES[name]


def _study(chosen: Home, seed: int, config: HomeConfig, cache: Cache) -> Study:
    examples = chosen.examples()
    model = trained(chosen, examples, seed, cache)
    return Study(model, examples, chosen.group_size, config.budgets, randoms=config.randoms, seed=seed)


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    return status(job, console, HomeConfig)


if __name__ == "__main__":
    sys.exit(main())
