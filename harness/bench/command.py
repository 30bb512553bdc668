"""The Hydra configuration of a bench: one job, which makes no folders and logs of its own."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore


def configure(name: str, schema: type, *defaults: Any) -> str:
    """Store the configuration `name`_bench, with the fields of `schema`; returns that name.

    Args:
        defaults: further entries of the defaults list, before the configuration itself.
    """
    store, config = ConfigStore.instance(), f"{name}_bench"
    quiet = ({"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"})
    store.store(name=f"{config}_schema", node=schema)
    store.store(
        name=config,
        node={
            "defaults": [f"{config}_schema", *defaults, "_self_", *quiet],
            "hydra": {"output_subdir": None, "run": {"dir": "."}},
        },
    )
    return config
