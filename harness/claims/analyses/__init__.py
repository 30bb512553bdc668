"""One file an analysis; importing it registers it."""

from __future__ import annotations

import importlib
import pkgutil


def discover() -> None:
    """Import every analysis of this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
