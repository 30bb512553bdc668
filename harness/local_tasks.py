"""Benchmarks of lm-eval from JSONL files of one's own: what the tasks of `conf/tasks` name as their functions.

The prompts are lm-eval's; only the rows come from a folder, `eval.data`, instead of the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

FOLDER = Path(__file__).parents[1] / "conf" / "tasks"
"""The task files."""


def read(
    *, file: str, fields: Sequence[str], labels: str | None = None, folder: str | None = None, **_: object
) -> DatasetDict:
    """The rows of a task as its split `test`, with these fields alone.

    Args:
        file: JSON objects, one a line; a path within `folder`.
        labels: a file with one number a line, which becomes the field `label`.
        folder: `eval.data`.

    Raises:
        ValueError: there is no such folder or file, or it holds other fields.
    """
    from datasets import Dataset, DatasetDict

    rows = [_row(line, fields, where) for line, where in _lines(folder, file)]
    if labels is not None:
        answers = [_row(f'{{"label": {line}}}', ["label"], where) for line, where in _lines(folder, labels)]
        if len(answers) != len(rows):
            raise ValueError(f"{labels} has {len(answers)} lines and {file} {len(rows)}; take both from one release")
        rows = [row | answer for row, answer in zip(rows, answers, strict=True)]
    return DatasetDict({"test": Dataset.from_list(rows)})


def hellaswag_query(row: dict[str, Any]) -> str:
    """The prompt that lm-eval makes of a row whose `ctx` has both parts of the context joined.

    lm-eval capitalizes the second part, the beginning of a caption's last sentence. Where `ctx` ends within a
    sentence, that beginning is what follows the last full stop.
    """
    return re.sub(r"(?<=[.!?] )[^.!?]+$", lambda part: part[0].capitalize(), row["ctx"])


def _lines(folder: str | None, file: str) -> list[tuple[str, str]]:
    """Each line, and where it stands."""
    if folder is None:
        raise ValueError(f"a task of eval.tasks reads {file}: name the folder that holds it with eval.data=DIR")
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"eval.data={folder} holds no {file}; conf/tasks says where to get it")
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # strings may hold what `splitlines` splits at
    return [(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _row(line: str, fields: Sequence[str], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return {name: row[name] for name in fields}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is no JSON object with {', '.join(fields)}; conf/tasks says where to get it"
        ) from error
