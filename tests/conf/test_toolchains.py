"""The experiment on toolchains has every tool, and its table shows what it runs."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from harness.cell import Cell
from harness.config import named_budgets, register_configs, to_cell
from harness.report import spec
from methods.base import discover

CONF = Path(__file__).parents[2] / "conf"
PARAMS = yaml.safe_load((CONF / "experiment" / "toolchains.yaml").read_text())["hydra"]["sweeper"]["params"]


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    """Of every method, under one budget."""
    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [to_cell(compose("config", [f"method={name}"])) for name in PARAMS["method"].split(",")]


def test_the_experiment_has_every_tool(cells: list[Cell]) -> None:
    tools = {name for name in discover() if name.startswith("tool_")}
    assert tools - {cell.method.name for cell in cells} == set()
    assert len({cell.labels["method"] for cell in cells}) == len(cells)


def test_the_table_shows_what_the_experiment_runs(cells: list[Cell]) -> None:
    where = spec.load("tools").where
    labels = {cell.labels["method"] for cell in cells} - {"fp16"}
    assert not [label for label in labels if not any(fnmatchcase(label, pattern) for pattern in where["method"])]
    assert not [pattern for pattern in where["method"] if not any(fnmatchcase(label, pattern) for label in labels)]
    assert where["budget"] == [named_budgets()[name].name for name in PARAMS["budget"].split(",")]
