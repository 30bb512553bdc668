"""What a Python source defines, from its syntax tree alone."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Definition:
    """A class, function, parameter, assignment, dataclass field or enum member.

    Attributes:
        name: qualified, as in `Class.method.parameter` or `Enum.MEMBER`.
        value: source of its default or value, normalized by `ast.unparse`; empty for none.
    """

    name: str
    line: int
    value: str = ""


def definitions(source: str) -> list[Definition]:
    """Every definition of a module, in order.

    Raises:
        ValueError: the source is no Python of this version, or nested too deeply.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return list(_inside(ast.parse(source).body, ""))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be parsed: {str(error).partition(' (<unknown>')[0]}") from error


def _inside(body: list[ast.stmt], prefix: str) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, SCOPES):
            name = f"{prefix}{node.name}"
            yield Definition(name, node.lineno)
            if not isinstance(node, ast.ClassDef):
                yield from _parameters(node, f"{name}.")
            yield from _inside(node.body, f"{name}.")
        elif isinstance(node, ast.Assign):
            yield from _assigned(node.targets, node.value, prefix)
        elif isinstance(node, ast.AnnAssign):
            yield from _assigned([node.target], node.value, prefix)
        else:  # branches and blocks open no scope
            for block in ("body", "orelse", "finalbody"):
                yield from _inside(getattr(node, block, []), prefix)
            for handler in getattr(node, "handlers", []):
                yield from _inside(handler.body, prefix)


def _assigned(targets: list[ast.expr], value: ast.expr | None, prefix: str) -> Iterator[Definition]:
    for target in targets:
        if isinstance(target, ast.Name):
            yield Definition(f"{prefix}{target.id}", target.lineno, ast.unparse(value) if value else "")


def _parameters(node: Function, prefix: str) -> Iterator[Definition]:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [*zip(positional, [*required, *arguments.defaults], strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    for argument, default in pairs:
        yield Definition(f"{prefix}{argument.arg}", argument.lineno, ast.unparse(default) if default else "")
