"""Cost against size: which points of a grid are measured, in which order, and the power laws through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, isfinite, log
from time import perf_counter
from typing import TypeAlias

import numpy as np
import pandas as pd

from harness.bench.measure import Measurement, Point, dtype

FLOOR = 1.0
"""Least exponent of a prediction: fixed costs make the smallest sizes look as if cost grew more slowly."""
NOT_MEASURED = "not measured"
NOR = "nor was the size or length before it"

Cell: TypeAlias = tuple[str, int, int]
"""A row's label, and the positions of a length and of a size."""
Outcome: TypeAlias = Measurement | str
"""What was measured, or one sentence that says why nothing was."""


@dataclass(frozen=True)
class Grid:
    """What to measure.

    Attributes:
        points: label of a row, length, name of a size, to the point; rows × lengths × sizes, sizes from the smallest.
        times: label of a row to what its seconds and passes are multiplied by, where a run is a part of the work
            to be charged and the rest would be more of the same.
    """

    points: Mapping[tuple[str, int, str], Point]
    times: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """When a point is not measured.

    Attributes:
        seconds: longest predicted run.
        total: seconds of the whole grid.
        free: bytes that may be used, asked before every point.
    """

    seconds: float
    total: float
    free: Callable[[], int]


def run(
    grid: Grid,
    limits: Limits,
    measure: Callable[[Point], Outcome],
    announce: Callable[[str, int, str, Outcome], None] = lambda *_: None,
) -> pd.DataFrame:
    """Measure the grid, always the point with the shortest predicted time next, so that what does not fit into the
    total are the longest points.

    Returns:
        A row a point; `reason` says why where `seconds` is missing. Seconds and passes are those of the whole work
        (`Grid.times`), `extra_bytes` is the peak beyond the loaded model.
    """
    began = perf_counter()
    rows = list(dict.fromkeys(row for row, _, _ in grid.points))
    lengths = list(dict.fromkeys(length for _, length, _ in grid.points))
    sizes = list(dict.fromkeys(size for _, _, size in grid.points))
    points = {
        (row, i, j): grid.points[row, length, size]
        for row in rows
        for i, length in enumerate(lengths)
        for j, size in enumerate(sizes)
    }
    waiting, done = dict(points), dict[Cell, Outcome]()
    while waiting:
        ready = [cell for cell in waiting if _before(cell) is None or _before(cell) in done]
        guesses = {cell: _predicted(cell, points, done, lambda found: found.typical) for cell in ready}
        cell = min(ready, key=guesses.__getitem__)
        point = waiting.pop(cell)
        extra = _predicted(cell, points, done, lambda found: found.extra_bytes)
        reason = _reason(guesses[cell], extra + _weight_bytes(point), limits, perf_counter() - began)
        if reason is None and isinstance(failed := done.get(_before(cell) or cell), str):
            reason = failed if failed.startswith(NOR) else f"{NOR}: {failed}"
        done[cell] = measure(point) if reason is None else reason
        announce(cell[0], lengths[cell[1]], sizes[cell[2]], done[cell])
    return pd.DataFrame(
        [
            _row(row, lengths[i], sizes[j], points[row, i, j], outcome, grid.times.get(row, 1))
            for (row, i, j), outcome in sorted(done.items(), key=lambda item: (rows.index(item[0][0]), *item[0][1:]))
        ]
    )


def predict(scales: Sequence[float], values: Sequence[float], scale: float) -> float:
    """The value at `scale` by the power law through the last two of the values, or linearly from a single one; 0 if
    there is none. The exponent is at least `FLOOR`."""
    if not values:
        return 0.0
    slope = FLOOR
    if len(values) > 1 and min(values[-2:]) > 0:
        slope = max(FLOOR, log(values[-1] / values[-2]) / log(scales[-1] / scales[-2]))
    return values[-1] * (scale / scales[-1]) ** slope


def _before(cell: Cell) -> Cell | None:
    """The point that a prediction starts from: the previous size; for the smallest, the previous length."""
    row, length, size = cell
    if size:
        return row, length, size - 1
    return (row, length - 1, 0) if length else None


def _predicted(
    cell: Cell, points: Mapping[Cell, Point], done: Mapping[Cell, Outcome], value: Callable[[Measurement], float]
) -> float:
    row, length, size = cell
    earlier = [(row, length, j) for j in range(size)] if size else [(row, i, 0) for i in range(length)]

    def scale(other: Cell) -> float:
        return points[other].size.parameters if size else points[other].length

    known = [(scale(other), value(found)) for other in earlier if isinstance(found := done[other], Measurement)]
    return predict([x for x, _ in known], [y for _, y in known], scale(cell))


def _reason(seconds: float, needed: float, limits: Limits, spent: float) -> str | None:
    """Why a point is not measured, or None."""
    if seconds > limits.seconds:
        return f"it would take about {seconds:.0f} s, more than the limit of {limits.seconds:g} s"
    if needed > (free := limits.free()):
        return f"it would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    if spent + seconds > limits.total:
        return f"the {limits.total / 60:g} minutes of the whole run would not suffice"
    return None


def _weight_bytes(point: Point) -> int:
    size = point.size
    return (size.parameters + size.vocabulary * size.hidden) * dtype(point).itemsize


def _row(row: str, length: int, size: str, point: Point, outcome: Outcome, times: int) -> dict[str, object]:
    shape = point.size
    known = {
        "row": row,
        "kind": point.kind,
        "length": length,
        "size": size,
        "parameters": shape.parameters,
        "hidden": shape.hidden,
        "blocks": shape.blocks,
        "sequences": point.sequences,
        "dtype": str(dtype(point)).removeprefix("torch."),
        "device": point.device,
        "times": times,
    }
    if isinstance(outcome, str):
        return {**known, "status": NOT_MEASURED, "reason": outcome}
    return {
        **known,
        "status": "measured",
        "seconds": times * outcome.typical,
        "seconds_low": times * min(outcome.seconds),
        "seconds_high": times * max(outcome.seconds),
        "repeats": len(outcome.seconds),
        "passes": None if outcome.passes is None else times * outcome.passes,
        "base_bytes": outcome.base_bytes,
        "peak_bytes": outcome.peak_bytes,
        "extra_bytes": outcome.extra_bytes,
    }


@dataclass(frozen=True)
class PowerLaw:
    """value = factor · scaleᵃ.

    Attributes:
        exponent: a.
        error: standard error of a, of the residuals; NaN for fewer than 3 points.
        points: fitted.
    """

    factor: float
    exponent: float
    error: float
    points: int


def fit(scales: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Least squares in log-log over positive values; NaN for fewer than 2 of them."""
    pairs = [(log(x), log(y)) for x, y in zip(scales, values, strict=True) if y > 0 and isfinite(y)]
    if len({x for x, _ in pairs}) < 2:
        return PowerLaw(np.nan, np.nan, np.nan, len(pairs))
    x, y = np.array(pairs).T
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - slope * centred
    freedom = len(x) - 2
    error = float(np.sqrt(residuals @ residuals / freedom / (centred @ centred))) if freedom else np.nan
    return PowerLaw(exp(float(y.mean() - slope * x.mean())), slope, error, len(x))


def summarize(frame: pd.DataFrame, unit: str = "gptq") -> pd.DataFrame:
    """A row a (length, row): power laws of seconds and of the peak beyond the model against parameters, and the ratio
    of seconds to those of `unit` at the same sizes: median, least and most."""
    measured = frame[frame["status"] == "measured"]
    found = []
    for (length, row), part in measured.groupby(["length", "row"], sort=False):
        of_unit = measured[(measured["row"] == unit) & (measured["length"] == length)].set_index("size")["seconds"]
        ratio = (part.set_index("size")["seconds"] / of_unit).dropna()
        laws = {column: fit(list(part["parameters"]), list(part[column])) for column in ("seconds", "extra_bytes")}
        found.append(
            {"length": length, "row": row, "largest": part["size"].iloc[-1]}
            | {f"{column}_{name}": value for column, law in laws.items() for name, value in vars(law).items()}
            | {
                "ratio": ratio.median() if len(ratio) else np.nan,
                "ratio_low": ratio.min() if len(ratio) else np.nan,
                "ratio_high": ratio.max() if len(ratio) else np.nan,
                "ratio_sizes": len(ratio),
            }
        )
    return pd.DataFrame(found)


def unmeasured(frame: pd.DataFrame) -> dict[tuple[str, int], tuple[str, str]]:
    """(row, length) to the sizes that are missing, and the reason of the smallest of them."""
    missing = frame[frame["status"] == NOT_MEASURED]
    return {
        (str(row), int(str(length))): (", ".join(part["size"]), str(part["reason"].iloc[0]))
        for (row, length), part in missing.groupby(["row", "length"], sort=False)
    }
