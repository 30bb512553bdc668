"""Bad input as one sentence that names the problem and the remedy, Hydra's composition errors among it."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from rich.console import Console

from harness.config import SCHEMAS
from methods.base import METHODS, hint
from methods.sensitivity.base import METRICS


def explain(error: HydraException, *schemas: type) -> str:
    """The sentence for an error that Hydra raised while it composed the configuration.

    `schemas`: config classes of the command besides those that all commands share.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        known = [option for option in error.options or () if not option.startswith("base_")]
        return f"unknown {group or 'config'} {name!r}: {hint(name, known)}"
    cause = str(error.__cause__ or "")
    unknown = re.search(r"^Key '(?P<key>[^']*)' .*?full_key: (?P<path>\S+).*?object_type=(?P<owner>\w+)", cause, re.S)
    if unknown:
        return f"unknown option {unknown['path']!r}: {hint(unknown['key'], _options(unknown['owner'], schemas))}"
    lines = [line for line in (*str(error).splitlines(), *cause.splitlines()[:1]) if line and "hydra.cc" not in line]
    return ": ".join(dict.fromkeys(lines))


def _options(owner: str, schemas: Iterable[type]) -> list[str]:
    """Names of the options of a config class."""
    classes = {cls.__name__: cls for cls in (*SCHEMAS.values(), *METHODS.values(), *METRICS.values(), *schemas)}
    return [f.name for f in dataclasses.fields(classes[owner])] if owner in classes else []


def refusing(console: Console) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Decorator for what Hydra runs: bad input is told in one sentence and ends the process with status 2."""

    def decorate(job: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(job)
        def run(config: Any) -> None:
            try:
                job(config)
            except ValueError as error:
                console.print(str(error), style="red", markup=False)
                raise SystemExit(2) from error

        return run

    return decorate


def status(command: Callable[[], None], console: Console, *schemas: type) -> int:
    """Run a command that Hydra configures: exit status 0 when it is done, 2 when its options make no sense."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    try:
        command()
    except HydraException as error:
        console.print(explain(error, *schemas), style="red", markup=False)
        return 2
    return 0
