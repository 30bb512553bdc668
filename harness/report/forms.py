"""How a value is written: the forms that a column of a table may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

BLANK, NOT_RUN = "–", "not run"
DIGITS = ((10, 3), (100, 2), (1000, 1))
HUGE = 1e5

Row = Mapping[str, Any]
Text = Callable[[Row, str], str]


@dataclass(frozen=True)
class Form:
    """The text of column `name` of a row, and whether it is a number, which stands to the right."""

    text: Text
    number: bool = True


def decimals(value: float, half_width: float = math.nan) -> int:
    """Four figures or so of `value`, and one at least of the half width of its interval."""
    digits = next((digits for limit, digits in DIGITS if abs(value) < limit), 0)
    return max(digits, min(4, math.ceil(-math.log10(half_width)))) if half_width > 0 else digits


def number(value: float, digits: int) -> str:
    """Fixed point, but for numbers too large to read that way: 1.2e6."""
    if abs(value) < HUGE:
        return f"{value:.{digits}f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def one_line(text: str) -> str:
    """With single spaces between words, whatever the line breaks were."""
    return " ".join(text.split())


def plain(value: Any) -> str:
    """A value as one line; nothing where there is none."""
    return "" if absent(value) else f"{value:g}" if isinstance(value, float) else one_line(str(value))


def absent(value: Any) -> bool:
    """Whether this is None or not a number."""
    return value is None or value is pd.NA or bool(value != value)


def _finite(text: Callable[[Row, str, float], str]) -> Text:
    return lambda row, name: "" if absent(row[name]) else text(row, name, float(row[name]))


def _half(row: Row, name: str) -> float:
    """Half an interval; of several rows taken together, their standard deviation."""
    if row.get("cells", 1) > 1 and f"{name}_sd" in row:
        return float(row[f"{name}_sd"])
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return math.nan if absent(low) or absent(high) else (float(high) - float(low)) / 2  # type: ignore[arg-type]


def _interval(plus: str = "") -> Text:
    def text(row: Row, name: str, value: float) -> str:
        half = _half(row, name)
        digits = decimals(value, half)
        shown = f"{plus if value >= 0 else '−'}{number(abs(value), digits)}"
        return shown if math.isnan(half) else f"{shown} ± {number(half, digits)}"

    return _finite(text)


def _ends(low: str, high: str, form: Callable[[float, float], str]) -> Text:
    """`low` and `high` are what the columns of both ends have behind the value's name."""

    def text(row: Row, name: str, _: float) -> str:
        return form(float(row[f"{name}{low}"]), float(row[f"{name}{high}"]))

    return _finite(text)


def _range(low: float, high: float) -> str:
    least, most = _figures(low), _figures(high)
    return least if least == most else f"{least} – {most}"


def _figures(value: float) -> str:
    """Three or four figures."""
    if not math.isfinite(value):
        return str(value)
    return number(value, decimals(value)) if abs(value) >= 1e-2 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _small(_: Row, __: str, value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _share(row: Row, name: str, value: float) -> str:
    error = row.get(f"{name}_stderr")
    return f"{100 * value:.1f}" + ("" if absent(error) else f" ± {100 * float(error):.1f}")  # type: ignore[arg-type]


def _scaled(unit: float, digits: int) -> Form:
    return Form(_finite(lambda _, __, value: f"{value / unit:.{digits}f}"))


def _group(_: Row, __: str, value: float) -> str:
    return f"{value:g}" if value > 0 else "row" if value == 0 else BLANK


FORMS: dict[str, Form] = {
    "text": Form(lambda row, name: plain(row[name]), number=False),
    "general": Form(lambda row, name: plain(row[name])),
    "figures": Form(_finite(lambda _, __, value: _figures(value))),
    "interval": Form(_interval()),
    "difference": Form(_interval("+")),
    "measured": Form(lambda row, name: _interval()(row, name) or NOT_RUN),
    "range": Form(_ends("_low", "_high", _range)),
    "spread": Form(_ends("_least", "_most", _range)),
    "small": Form(_finite(_small)),
    "share": Form(_finite(_share)),
    "percent": _scaled(0.01, 1),
    "signed_percent": Form(_finite(lambda _, __, v: f"{'+' if v >= 0 else '−'}{100 * abs(v):.1f}")),
    "fixed1": _scaled(1, 1),
    "fixed3": _scaled(1, 3),
    "mega": _scaled(1e6, 2),
    "mega1": _scaled(1e6, 1),
    "giga": _scaled(1e9, 2),
    "group": Form(_finite(_group)),
}
"""`interval` and `difference` add ± half the interval from `_low` to `_high`, or the standard deviation of rows taken
together; `measured` says where there is nothing; `range` reads the ends `_low` and `_high`, `spread` the least and the
most of rows taken together; `share` adds ± `_stderr`, in percent; `group` is the columns that share a scale: 0 is a
row, and less is nothing."""
