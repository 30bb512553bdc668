"""What there is: methods with the parts they are made of, and the parts themselves.

python -m harness.catalogue
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from methods.allocation.base import SOLVERS
from methods.base import METHODS, Method, Registry
from methods.formats.registry import FORMATS
from methods.mixed_precision import MixedPrecision
from methods.rounding.base import ROUNDINGS
from methods.sensitivity.base import METRICS
from methods.transforms.base import TRANSFORMS

Row = tuple[str, ...]
CALCULUS = ("", "gradients", "second derivatives (fp32)")


def methods() -> Iterator[Row]:
    """A row a method: name, the four parts, what it needs, source."""
    for name, cls in sorted(METHODS.complete().items()):
        parts = cls().parts
        yield name, parts.format, parts.transform, parts.rounding, parts.allocation, _needs(cls()), source(cls)


def metrics() -> Iterator[Row]:
    """A row a sensitivity metric: name, what a value is, what it needs, source."""
    for name, cls in sorted(METRICS.complete().items()):
        kind = "loss of a linear in a format" if cls.per_format else "score of a linear"
        needs = [stat.value for stat in sorted(cls.needs)] + [word for word in (CALCULUS[cls.derivatives],) if word]
        yield name, kind, ", ".join(needs) or "–", summary(cls)


def parts(registry: Registry[Any]) -> Iterator[Row]:
    """A row a part: name, and what it is."""
    for name, cls in sorted(registry.complete().items()):
        yield name, summary(cls)


def _needs(method: Method) -> str:
    """Statistics of the calibration text, derivatives of the loss, packages."""
    needs = [stat.value for stat in sorted(method.statistics)]
    rounding = ROUNDINGS.get(method.parts.rounding)  # a method with a loop of its own names none of these
    needs += [f"{stat.value} of the rounded stream" for stat in sorted(rounding.needs)] if rounding else []
    if isinstance(method, MixedPrecision):
        needs += [word for word in (CALCULUS[method.sensitivity().derivatives],) if word]
        needs += ["measured losses"] if method.judge_sequences else []
    needs += [f"the extra [{method.extra}]"] if method.extra else []
    return ", ".join(needs) or "–"


def source(cls: type) -> str:
    """The first sentence of the module's docstring, which names the paper."""
    return _sentence(inspect.getdoc(inspect.getmodule(cls)) or "")


def summary(cls: type) -> str:
    """The first sentence of the class's docstring."""
    return _sentence(inspect.getdoc(cls) or "")


def _sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, on one line."""
    line = " ".join(text.split("\n\n")[0].split())
    end = re.search(r"(?<!al)(?<!\bet)\.(?=\s+[A-Z]|$)", line)
    return line[: end.start()] if end else line


def _show(console: Console, title: str, heads: Row, rows: Iterable[Row]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_style="bold")
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=not i, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def main() -> None:
    console = Console(width=max(150, Console().width))
    _show(
        console,
        "Methods: method=NAME",
        ("name", "format", "transform", "rounding", "allocation", "needs", "source"),
        methods(),
    )
    _show(
        console, "Sensitivity metrics: method=mixed method.metric=NAME", ("name", "value", "needs", "what"), metrics()
    )
    for title, registry in (
        ("Solvers: method.solver=NAME", SOLVERS),
        ("Roundings: method.rounding=NAME", ROUNDINGS),
        ("Transforms: method.transform=NAME", TRANSFORMS),
    ):
        _show(console, title, ("name", "what"), parts(registry))
    _show(
        console,
        "Formats beside the integers: method.formats=[NAME]",
        ("name", "bits", "what"),
        ((name, f"{fmt.bits:g}", summary(type(fmt))) for name, fmt in FORMATS.items()),
    )


if __name__ == "__main__":
    main()
