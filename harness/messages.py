"""Hydra's composition errors as one sentence that names the problem and the remedy."""

from __future__ import annotations

import dataclasses
import re

from hydra.errors import HydraException, MissingConfigException

from harness.config import SCHEMAS
from methods.base import METHODS, hint


def explain(error: HydraException) -> str:
    """The sentence for an error that Hydra raised while it composed the configuration."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        known = [option for option in error.options or () if not option.startswith("base_")]
        return f"unknown {group or 'config'} {name!r}: {hint(name, known)}"
    cause = str(error.__cause__ or "")
    unknown = re.search(r"^Key '(?P<key>[^']*)' .*?full_key: (?P<path>\S+).*?object_type=(?P<owner>\w+)", cause, re.S)
    if unknown:
        return f"unknown option {unknown['path']!r}: {hint(unknown['key'], _options(unknown['owner']))}"
    lines = [line for line in (*str(error).splitlines(), *cause.splitlines()[:1]) if line and "hydra.cc" not in line]
    return ": ".join(dict.fromkeys(lines))


def _options(owner: str) -> list[str]:
    """Names of the options of a config class."""
    classes = {cls.__name__: cls for cls in (*SCHEMAS.values(), *METHODS.values())}
    return [f.name for f in dataclasses.fields(classes[owner])] if owner in classes else []
