"""A build backend that runs nothing: it names an sdist by the PKG-INFO inside.

pip asks a build backend for an sdist's metadata even if it only downloads it, and the usual backends answer by running
the package's own `setup.py`. With this one on PYTHONPATH under their names, nothing of the package is executed.
Imported by pip's subprocess alone; it knows nothing but the standard library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:  # noqa: ARG001
    """Write the metadata of the sdist in the current folder without its dependencies; the name of its folder."""
    lines = Path("PKG-INFO").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(": ", 1) for line in reversed(lines) if line.startswith(("Name: ", "Version: ")))
    folder = f"{fields['Name'].replace('-', '_')}-{fields['Version']}.dist-info"
    target = Path(metadata_directory) / folder
    target.mkdir()
    text = f"Metadata-Version: 2.1\nName: {fields['Name']}\nVersion: {fields['Version']}\n"
    (target / "METADATA").write_text(text, encoding="utf-8")
    return folder
