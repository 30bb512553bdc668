"""What a cell's method is made of, as columns: its rounding of inputs, its allocation, and its accuracy on tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from harness.records import Record

PARTS = ("solver", "metric", "rounding", "transform", "kv_cache", "inputs", "format")
FLOAT = re.compile(r"(?:mx|nv)?fp\d")


def of(record: Record) -> dict[str, Any]:
    """Columns of a record:

    - `solver`, `metric`, `rounding`, `transform`, `kv_cache`, `inputs`, `format`: as options are called; blank where
      the method has no such option, or left it at none;
    - `options`: the label without the name and those of these that have a column in tables of allocation;
    - `input_bits`: mean width of the linears' inputs, where they are rounded;
    - `precision`: such as W4A8 or FP8, where inputs are rounded;
    - `accuracy`, `accuracy_stderr`: mean over tasks, if there are several.
    """
    method = record.cell["method"]
    input_bits = _input_bits(record)
    return {
        **{part: str(method.get(part) or "") for part in PARTS},
        "options": _options(record.labels["method"]),
        "input_bits": input_bits,
        "precision": _precision(record.cell, input_bits),
        **_accuracy(record.result.get("tasks") or {}),
    }


def _options(label: str) -> str:
    shown = ("solver=", "metric=", "rounding=", "transform=")
    return " ".join(word for word in label.split()[1:] if not word.startswith(shown))


def _input_bits(record: Record) -> float | None:
    """As the linears of the result have it; what was not run tells by its options alone."""
    measured = [layer.get("input_bits") for layer in record.result.get("layers") or []]
    widths = [width for width in measured if width]
    if widths:
        return sum(widths) / len(widths)
    named = re.search(r"\d+", record.cell["method"].get("inputs") or "")
    option = record.cell["method"].get("input_bits")
    return float(named[0]) if named else float(option) if isinstance(option, int) and option else None


def _precision(cell: Mapping[str, Any], input_bits: float | None) -> str:
    if not input_bits:
        return ""
    method, bits = cell["method"], cell["budget"].get("bits") or cell["budget"].get("effective_bits")
    weights = re.search(r"\d+", method.get("format") or "")
    width = float(weights[0]) if weights else bits
    floats = all(FLOAT.match(method.get(part) or "") for part in ("format", "inputs"))
    if floats and width == input_bits:
        return f"FP{width:g}"
    return f"W{width:g}A{input_bits:g}" if width else f"A{input_bits:g}"


def _accuracy(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """The mean of the tasks' accuracies; its standard error takes tasks for independent."""
    scores = [metrics for metrics in tasks.values() if "acc" in metrics]
    if len(scores) < 2:
        return {"accuracy": None, "accuracy_stderr": None}
    errors = [metrics.get("acc_stderr", math.nan) for metrics in scores]
    return {
        "accuracy": sum(metrics["acc"] for metrics in scores) / len(scores),
        "accuracy_stderr": math.sqrt(sum(error**2 for error in errors)) / len(scores),
    }
