"""Which rows of a source a table shows, and which of them it takes together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd

from harness.records import DONE
from harness.report.forms import absent
from harness.report.standing import DIFFERENCE

IDENTITY = ["section", "model", "data", "settings", "method", "method_name", "budget", "reference", "seed", "data_seed"]
SPREAD = ("perplexity", "effective_bits", "kl", "top1", "seconds_quantize")
"""Values whose standard deviation, least and most are kept of rows taken together."""
ENDS = {"std": "sd", "min": "least", "max": "most"}


def select(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """The rows whose columns match.

    A condition is a value, a pattern as of shells, or a list of which one must match; patterns that begin with `!`
    must not match, whatever else is in the list. An absent value matches null and `""`.

    The reference of records need match only the status and what it shares with its section: model, text and
    evaluation.

    Raises:
        ValueError: there is no such column.
    """
    keep = np.ones(len(frame), dtype=bool)
    reference = frame["reference"].to_numpy(dtype=bool) if "reference" in frame else ~keep
    for column, condition in where.items():
        allowed = condition if isinstance(condition, list | tuple) else [condition]
        values = [value if isinstance(value, Hashable) else str(value) for value in _column(frame, column)]
        found = {value: _matches(value, allowed) for value in set(values)}
        passes = np.array([found[value] for value in values], dtype=bool)
        keep &= passes | (reference & (not _of_sections(column)))
    return frame[keep].reset_index(drop=True)


def aggregate(frame: pd.DataFrame, over: Sequence[str], reduce: Mapping[str, str]) -> pd.DataFrame:
    """Rows of records that are done and differ in the columns `over` alone become one, in the order of the first.

    Numbers become their mean, or what `reduce` says of their column; `nll` the mean of each window, so that paired
    differences are those of the mean. `cells` counts the rows; `…_sd`, `…_least` and `…_most` tell the spread of
    `SPREAD`. Rows that are not done stay where no row of their kind is done.
    """
    identity = [column for column in IDENTITY if column not in over]
    kind = frame.groupby(identity, dropna=False, sort=False).ngroup().rename("kind")
    done = frame["status"] == DONE
    alone = frame[~done & ~kind.isin(kind[done])]
    groups = frame[done].groupby(kind[done], sort=False)
    merged = groups.first()
    numbers = [str(column) for column in frame.select_dtypes("float") if column not in DIFFERENCE]
    merged[numbers] = groups[numbers].agg({column: reduce.get(column, "mean") for column in numbers})
    merged["nll"] = groups["nll"].agg(_mean)
    spread = groups[list(SPREAD)].agg(list(ENDS))
    spread.columns = pd.Index([f"{name}_{end}" for name in SPREAD for end in ENDS.values()])
    merged = merged.join(spread).assign(cells=groups.size())
    merged = merged.set_index(frame[done].groupby(kind[done], sort=False).head(1).index)
    return pd.concat([merged, alone.assign(cells=0)]).sort_index().reset_index(drop=True)


def _mean(windows: pd.Series) -> np.ndarray:
    """The mean of NLLs [windows] over rows; nothing where rows were measured on different windows."""
    same = len({len(nll) for nll in windows}) == 1
    return np.mean(np.stack(windows.to_list()), axis=0) if same else np.empty(0)


def _column(frame: pd.DataFrame, column: str) -> list[Any]:
    if column in frame:
        return frame[column].to_list()
    head, *path = column.split(".")
    if "cell" in frame and path and head in ("model", "data", "method", "budget", "evaluation"):
        return [_field(cell[head], path) for cell in frame["cell"]]
    raise ValueError(
        f"a table's where names {column}, and there is no such column; there are {', '.join(map(str, frame))}"
    )


def _field(part: Any, path: Sequence[str]) -> Any:
    """A nested option; None where a cell has no such option."""
    for name in path:
        part = part.get(name) if isinstance(part, Mapping) else None
    return part


def _of_sections(column: str) -> bool:
    """Whether this column is for the reference, too, to match: what rows of a section share, and the status."""
    return column.startswith(("model", "data", "evaluation", "status")) and column not in ("data_seed", "data.seed")


def _matches(value: Any, allowed: Sequence[Any]) -> bool:
    wanted = [pattern for pattern in allowed if not _excludes(pattern)]
    unwanted = [pattern[1:] for pattern in allowed if _excludes(pattern)]
    return not any(_equals(value, p) for p in unwanted) and (not wanted or any(_equals(value, p) for p in wanted))


def _excludes(pattern: Any) -> bool:
    return isinstance(pattern, str) and pattern.startswith("!")


def _equals(value: Any, pattern: Any) -> bool:
    if isinstance(pattern, str) and pattern:
        return not absent(value) and fnmatchcase(_text(value), pattern)
    if pattern is None or pattern == "":
        return bool(absent(value) or (isinstance(value, str) and not value))
    return bool(not absent(value) and value == pattern)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
