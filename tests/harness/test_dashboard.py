"""The dashboard names what the mirrored runs hold; with wandb's package it is built, never saved."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import wandb

from harness import dashboard
from harness.dashboard import AGAINST_BITS, COSTS, DashboardConfig, create
from harness.metrics import NUMERIC

ONLINE = "the package wandb-workspaces is optional, and not installed"


def test_panels_show_numbers_that_runs_have() -> None:
    assert {"effective_bits", *AGAINST_BITS, *COSTS} <= set(NUMERIC)


def test_without_the_package_one_sentence_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ValueError, match=r"pip install 'hawq-bench\[dashboard\]'"):
        create(DashboardConfig())


def test_without_a_login_one_sentence_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb_workspaces", ModuleType("wandb_workspaces"))
    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(ValueError, match=r"No API key configured\..*log in with `wandb login`"):
        create(DashboardConfig(entity="team"))


def test_both_pages_are_saved_for_the_entity_of_the_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "pareto_tiny.png").touch()
    saved: list[tuple[Any, ...]] = []

    def page(*arguments: Any) -> Any:
        saved.append(arguments)
        address = f"https://page/{len(saved)}"
        return SimpleNamespace(save=lambda: SimpleNamespace(url=address))

    monkeypatch.setitem(sys.modules, "wandb_workspaces", ModuleType("wandb_workspaces"))
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="me"))
    monkeypatch.setattr(dashboard, "report", page)
    monkeypatch.setattr(dashboard, "workspace", page)
    config = DashboardConfig(folder=str(tmp_path))
    assert create(config) == ["https://page/1", "https://page/2"]
    assert saved == [(config, "me", ["pareto_tiny"]), (config, "me")]


def test_the_report_shows_cells_claims_and_figures() -> None:
    pytest.importorskip("wandb_workspaces", reason=ONLINE)
    page = dashboard.report(DashboardConfig(project="p", group="default"), "team", ["pareto_tiny"])
    grids = [block for block in page.blocks if hasattr(block, "panels")]
    assert [grid.runsets[0].name for grid in grids] == ["cell", "cell", "report"]
    for grid in grids:
        (runs,) = grid.runsets
        assert (runs.entity, runs.project) == ("team", "p")
        assert runs.filters == f"Metric(\"JobType\") == '{runs.name}' and Metric(\"Group\") == 'default'"
    assert [(panel.x.name, panel.y.name) for panel in grids[0].panels] == [("effective_bits", y) for y in AGAINST_BITS]
    assert [panel.metrics[0].name for panel in grids[1].panels] == list(COSTS)
    table, media = grids[2].panels
    assert (table.table_name, media.media_keys) == ("claims", ["pareto_tiny"])


def test_the_workspace_groups_cells_by_method() -> None:
    pytest.importorskip("wandb_workspaces", reason=ONLINE)
    spec = dashboard.workspace(DashboardConfig(), "team")._to_model().model_dump_json(by_alias=True)
    assert '"grouping":[{"section":"config","name":"method_label.value"}]' in spec
    assert '"key":{"section":"run","name":"jobType"},"op":"=","value":"cell"' in spec
    assert '"xAxis":"summary:effective_bits","yAxis":"summary:perplexity"' in spec
