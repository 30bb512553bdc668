"""From Hydra's composed configuration to a `Cell`: typed, strict, and with sentences for what is wrong.

Every method is entered into Hydra's ConfigStore from its own dataclass, so `method=gptq method.act_order=true`
works as soon as `methods/gptq.py` exists. Named budgets are generated, since they are a grid: `w3g128` is 3-bit
codes in groups of 128, `w4channel` one scale a row, `b3.25` at most 3.25 effective bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, ValidationError

from harness.cell import Cell
from harness.data import DataConfig
from harness.evaluate import EvalConfig
from harness.models import ModelConfig
from methods.base import METHODS, discover, hint
from methods.budget import Budget
from methods.formats.integer import WIDTHS

T = TypeVar("T")

GROUP_SIZES = (16, 32, 64, 128, 256)
MIXED_BUDGETS = tuple(b / 4 for b in range(9, 32))


@dataclass
class RunConfig:
    """How to run, not what: nothing here is part of a cell's identity."""

    device: str = "cpu"
    """Where tensors live: cpu, cuda, cuda:1 …"""
    threads: int = 0
    """Threads of a worker's tensor operations; 0 leaves the library's choice."""
    time_limit: float = 120.0
    """Minutes after which a cell is stopped and recorded as failed."""
    warm: bool = True
    """Let the cells of one sweep share a worker process; it is restarted after a failure."""
    results: str = "results/runs"
    """Folder of the records."""
    cache: str = ".cache/hawq-bench"
    """Folder of statistics that cells share."""
    toolchains: str = ".cache/toolchains"
    """Folder of the environments of other projects' tools."""


@dataclass
class Config:
    """The root of the configuration."""

    model: Any = MISSING
    data: Any = MISSING
    method: Any = MISSING
    budget: Any = MISSING
    eval: Any = MISSING
    run: Any = MISSING
    seed: int = 0
    """Seeds every random estimate. The calibration text is chosen by `data.seed`."""
    experiment_name: str = "adhoc"
    """The group under which wandb shows the cells."""
    tracking: str = "offline"
    """wandb: offline, online or disabled."""
    force: bool = False
    """Compute cells again that are done."""


SCHEMAS: dict[str, type] = {
    "": Config,
    "model": ModelConfig,
    "data": DataConfig,
    "budget": Budget,
    "eval": EvalConfig,
    "run": RunConfig,
}
"""Config groups and what their files fill; the groups' names are prefixes of options."""


def register_configs() -> None:
    """Enter the schemas, every method and the named budgets into Hydra's ConfigStore."""
    store = ConfigStore.instance()
    for group, schema in SCHEMAS.items():
        store.store(name=f"base_{group or 'config'}", node=_schema(schema), group=group or None)
    for name, method in discover().items():
        store.store(name=name, node=_schema(method), group="method")
    for name, budget in named_budgets().items():
        node = _schema(Budget)
        store.store(name=name, node=OmegaConf.merge(node, dataclasses.asdict(budget)), group="budget")
    store.store(name="bound", node=_schema(Budget), group="budget")  # budget=bound budget.megabytes=3.5


def named_budgets() -> dict[str, Budget]:
    """Every budget that has a name, such as `w4g128`, `w8channel` and `b3.25`."""
    symmetry = (False, True)
    uniform = [Budget(bits=w, group_size=g, symmetric=s) for w in WIDTHS for g in (*GROUP_SIZES, 0) for s in symmetry]
    mixed = {f"b{bits:g}": Budget(effective_bits=bits) for bits in MIXED_BUDGETS}
    return {budget.name: budget for budget in uniform} | mixed


def to_cell(config: DictConfig) -> Cell:
    """The cell that a composed configuration describes.

    Raises:
        ValueError: an unknown option (`+method.typo=1` passes Hydra itself), or a value out of its range.
    """
    method = OmegaConf.get_type(config.method)
    if method is None or method not in METHODS.values():
        raise ValueError(f"method={OmegaConf.to_yaml(config.method)} is no registered method")
    return Cell(
        model=part(ModelConfig, config.model, "model"),
        data=part(DataConfig, config.data, "data"),
        method=part(method, config.method, "method"),
        budget=part(Budget, config.budget, "budget"),
        evaluation=part(EvalConfig, config.eval, "eval"),
        seed=config.seed,
    )


def to_run(config: DictConfig) -> RunConfig:
    """The settings of this run."""
    return part(RunConfig, config.run, "run")


def cell_from_dict(values: Mapping[str, Any]) -> Cell:
    """The inverse of `Cell.as_dict`."""
    method, budget = dict(values["method"]), dict(values["budget"])
    del budget["name"]  # derived
    return Cell(
        model=build(ModelConfig, values["model"], "model"),
        data=build(DataConfig, values["data"], "data"),
        method=build(METHODS[method.pop("name")], method, "method"),
        budget=build(Budget, budget, "budget"),
        evaluation=build(EvalConfig, values["evaluation"], "eval"),
        seed=values["seed"],
    )


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of a config dataclass from plain values, type-checked.

    Raises:
        ValueError: unknown option (with near matches), or a value of the wrong type.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown option {where}.{key}: {hint(str(key), known)}")
    try:
        instance: Any = OmegaConf.to_object(OmegaConf.merge(_schema(cls), dict(values)))
    except ValidationError as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error
    changes = {f: tuple(v) for f in known if isinstance(v := getattr(instance, f), list)}
    return dataclasses.replace(instance, **changes)


def part(cls: type[T], node: DictConfig, where: str) -> T:
    """An instance of a config dataclass from a composed node; see `build`."""
    values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return build(cls, values, where)  # type: ignore[arg-type]


def _schema(cls: type) -> DictConfig:
    """A typed node that may be overridden: frozen dataclasses make read-only nodes. Fields that are mappings take
    any key."""
    node = OmegaConf.structured(cls)
    OmegaConf.set_readonly(node, False)
    for option in dataclasses.fields(cls):
        if option.default_factory is dict:
            OmegaConf.set_struct(node[option.name], False)
    return node
