"""Imports go down only: harness → methods → kernels; and nothing in methods or kernels knows Hydra, wandb or disks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "kernels": {"methods", "harness", "hydra", "omegaconf", "wandb", "transformers"},
    "methods": {"harness", "hydra", "omegaconf", "wandb", "transformers", "pathlib", "os"},
    "harness": set(),
}


def imported_packages(path: Path) -> set[str]:
    """Top-level names of everything a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_down(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    offences = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported_packages(f) & FORBIDDEN[package])}
    assert not offences
