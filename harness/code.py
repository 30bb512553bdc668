"""The version of the code behind a number: a hash over a module and everything of this project that it imports."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("harness", "methods", "kernels")


def code_version(*modules: str) -> str:
    """SHA-256 over the syntax trees of these modules and their imports within the project.

    Comments and formatting do not count; whatever is imported, inside functions too, does, and so do files in a folder
    `csrc` beside a module, which it may compile.
    """
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(_imports(module))
    return hashlib.sha256("\0".join(f"{m}\0{_tree(m)}" for m in sorted(seen)).encode()).hexdigest()


@cache
def _source(module: str) -> Path | None:
    """The file of a module of this project; None if there is no such module (`from package import name`)."""
    if module.split(".")[0] not in PACKAGES:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


@cache
def _tree(module: str) -> str:
    path = _source(module)
    if path is None:
        return ""
    compiled = sorted(file for file in path.parent.glob("csrc/*") if file.is_file())
    return "\0".join([ast.dump(ast.parse(path.read_text())), *(file.read_text() for file in compiled)])


@cache
def _imports(module: str) -> tuple[str, ...]:
    path = _source(module)
    if path is None:
        return ()
    return tuple(name for name in _named(ast.parse(path.read_text())) if _source(name))


def _named(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
