"""A report and a workspace in wandb that show the mirrored runs as the project's own tables and figures do.

python -m harness.dashboard
python -m harness.dashboard entity=TEAM project=hawq-bench group=default

Runs must be on wandb's server (`make wandb-sync`). Each call makes a new report and a new saved view. The package
that makes them is a public preview of wandb's: it is optional (`pip install 'hawq-bench[dashboard]'`), and nothing but
this file knows it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from rich.console import Console

from harness.messages import refusing, status
from harness.tracking.runs import PROJECT

console = Console(stderr=True, highlight=False, soft_wrap=True)

TITLE = "Bits, and what they lose"
METHOD = "method_label"
"""The key of a run's configuration by which panels group."""
AGAINST_BITS = {"perplexity": "Perplexity", "kl": "KL from the full-precision model", "top1": "Top-1 agreement"}
COSTS = {"seconds_quantize": "Seconds to quantize", "peak_bytes": "Peak memory, bytes", "model_bytes": "Model, bytes"}
"""Metrics of a run's summary and the titles of their panels."""
MOST_RUNS = 1000
"""Runs that a panel of the workspace shows; wandb's default is 10."""


@dataclass
class DashboardConfig:
    """Where the runs are, and which of them to show."""

    entity: str | None = None
    """Owner of the project; the login's own by default."""
    project: str = PROJECT
    """wandb's project."""
    group: str | None = None
    """The sweep to show; all by default."""
    folder: str = "results"
    """Its `figures/` say which pictures to show."""


# Hydra keeps no log and no folder of its own.
NO_TRACES = {
    "defaults": [
        "dashboard_schema",
        "_self_",
        {"override hydra/job_logging": "none"},
        {"override hydra/hydra_logging": "none"},
    ],
    "hydra": {"output_subdir": None, "run": {"dir": "."}},
}
ConfigStore.instance().store(name="dashboard_schema", node=DashboardConfig)
ConfigStore.instance().store(name="dashboard", node=NO_TRACES)


def quality() -> list[Any]:
    """Every quality against the stored bits: a point a run."""
    from wandb_workspaces.reports import v2 as wr

    bits = wr.SummaryMetric("effective_bits")
    return [
        wr.ScatterPlot(title=title, x=bits, y=wr.SummaryMetric(name), log_y=name != "top1")
        for name, title in AGAINST_BITS.items()
    ]


def costs() -> list[Any]:
    """What each method costs, in the mean over its runs."""
    from wandb_workspaces.reports import v2 as wr

    return [
        wr.BarPlot(title=title, metrics=[wr.SummaryMetric(name)], groupby=wr.Config(METHOD), groupby_aggfunc="mean")
        for name, title in COSTS.items()
    ]


def results(figures: Sequence[str]) -> list[Any]:
    """The claims' table, and the figures by their names."""
    from wandb_workspaces.reports import v2 as wr

    wide = wr.Layout(w=24, h=14)
    return [
        wr.WeavePanelSummaryTable(table_name="claims", layout=wide),
        wr.MediaBrowser(title="Figures", media_keys=list(figures), num_columns=2, layout=wide),
    ]


def report(config: DashboardConfig, entity: str, figures: Sequence[str]) -> Any:
    """The report: quality and cost of the cells, then what was concluded from them. Not saved yet."""
    from wandb_workspaces.reports import v2 as wr

    def grid(kind: str, panels: list[Any]) -> Any:
        runs = wr.Runset(entity=entity, project=config.project, name=kind, filters=_filters(kind, config.group))
        return wr.PanelGrid(runsets=[runs], panels=panels)

    blocks = [
        wr.P(text="A run is one cell: a model, a method and a budget. Bits are those stored for every weight."),
        wr.H2(text="Quality against stored bits"),
        grid("cell", quality()),
        wr.H2(text="Cost"),
        grid("cell", costs()),
        wr.H2(text="Claims and figures"),
        grid("report", results(figures)),
    ]
    return wr.Report(project=config.project, entity=entity, title=TITLE, blocks=blocks, width="fluid")


def workspace(config: DashboardConfig, entity: str) -> Any:
    """The workspace: cells grouped by method, with the same panels. Not saved yet."""
    from wandb_workspaces import workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=config.project,
        name=TITLE,
        sections=[
            ws.Section(name="Quality against stored bits", panels=quality(), is_open=True),
            ws.Section(name="Cost", panels=costs(), is_open=True),
        ],
        settings=ws.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=_filters("cell", config.group),
            groupby=[ws.Config(METHOD)],
            pinned_columns=["summary:effective_bits", *(f"summary:{name}" for name in AGAINST_BITS)],
        ),
    )


def _filters(kind: str, group: str | None) -> list[Any]:
    from wandb_workspaces.expr import Metric

    return [Metric("JobType") == kind, *([Metric("Group") == group] if group else [])]


def create(config: DashboardConfig) -> list[str]:
    """Save the report and the workspace, and return their addresses.

    Raises:
        ValueError: the package is missing, or nobody is logged in.
    """
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the dashboard needs a package of wandb's that is not installed: pip install 'hawq-bench[dashboard]'; "
            "without it, group the project's runs by method_label and plot perplexity against effective_bits"
        ) from error
    import wandb

    try:
        login = wandb.Api()
        entity = config.entity or login.default_entity
        if entity is None:
            raise ValueError("this login has no default entity: name the project's owner with entity=NAME")
        figures = sorted(path.stem for path in Path(config.folder, "figures").glob("*.png"))
        return [page.save().url for page in (report(config, entity, figures), workspace(config, entity))]
    except wandb.Error as error:
        raise ValueError(f"wandb made no dashboard ({error}); log in with `wandb login`") from error


@hydra.main(version_base="1.3", config_path=None, config_name="dashboard")
@refusing(console)
def job(config: DashboardConfig) -> None:
    """Make both pages, and say where they are."""
    for address in create(config):
        console.print(address)


def main() -> int:
    """Exit status: 0 when done, 2 when a page could not be made."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    return status(job, console, DashboardConfig)


if __name__ == "__main__":
    sys.exit(main())
