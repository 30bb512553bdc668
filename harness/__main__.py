"""Run one cell or a sweep.

python -m harness model=tiny method=gptq budget=w4g128
python -m harness -m method=rtn,gptq,awq budget=w3g128,w4g128
python -m harness experiment=default
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.config import register_configs, to_cell, to_run
from harness.messages import explain
from harness.sweep import INVALID, Outcome, Outcomes, conclude, console, mirror, position, run_cell

register_configs()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def job(config: DictConfig) -> None:
    """One Hydra job is one cell. What goes wrong becomes its outcome, so that a sweep always reaches its end."""
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    number, where = (hydra_config.job.num, position(hydra_config)) if sweeping else (0, "")
    outcomes = Outcomes.of_this_sweep()
    try:
        cell, run = to_cell(config), to_run(config)
        record, resumed = run_cell(cell, run, force=config.force, position=where)
    except ValueError as error:  # bad input; a fault inside a cell is a record
        told = " ".join(hydra_config.overrides.task)
        outcomes.add(Outcome(number, told, INVALID, str(error)))
        return
    told = " · ".join(cell.labels.values())
    outcomes.add(Outcome(number, told, record.status, record.reason, resumed))
    mirror(record, resumed, run, config.tracking, config.experiment_name)


def main() -> int:
    """Exit status: 0 when all cells are done or skipped, 1 when one failed, 2 for bad input."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    try:
        job()
    except HydraException as error:
        console.print(f"[red]{explain(error)}[/red]", markup=True)
        return 2
    outcomes = Outcomes.of_this_sweep()
    status = conclude(outcomes.all())
    outcomes.discard()
    return status


if __name__ == "__main__":
    sys.exit(main())
