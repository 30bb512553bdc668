"""The audit's table, as rows, CSV and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.audit.archives import Contents
from harness.audit.packages import Unavailable
from harness.audit.questions import Question
from harness.audit.verdicts import LEGEND, verdicts
from harness.bench.tables import csv, grid, markdown
from harness.records import write_atomically
from harness.report.tables import markdown_text

COLUMNS = ["claim", "tool", "package", "version", "question", "verdict", "evidence"]
HEADER = "python -m harness.audit; packages as published at the index, read and not installed"

Source = tuple[str, str, str]
"""Package, version and kind of archive."""


@dataclass(frozen=True)
class Answer:
    """What one version says: whether the survey's sentence is true of it, None if it could not be checked."""

    holds: bool | None
    evidence: str


def sources(questions: Sequence[Question]) -> dict[Source, list[Question]]:
    """What has to be opened, and which questions look into it: every archive is read once."""
    wanted: dict[Source, list[Question]] = {}
    for question in questions:
        for version in question.versions:
            wanted.setdefault((question.package, version, question.archive), []).append(question)
    return wanted


def answers(
    questions: Sequence[Question], opened: Callable[[Source], Contents]
) -> Iterator[tuple[Source, dict[Question, Answer]]]:
    """The answers of each archive, one archive at a time.

    Args:
        opened: reads an archive, or raises `Unavailable`.
    """
    for source, asking in sources(questions).items():
        try:
            contents = opened(source)
        except Unavailable as reason:
            yield source, {question: Answer(None, str(reason)) for question in asking}
        else:
            yield source, {question: _answer(question, contents) for question in asking}


def _answer(question: Question, contents: Contents) -> Answer:
    try:
        found = question.inspection.look(contents)
    except Unavailable as reason:
        return Answer(None, str(reason))
    if not found.there and not question.present and not found.searched:
        return Answer(None, f"nothing to search: {found.evidence}")  # absence from no files is no finding
    return Answer(found.there == question.present, found.evidence)


def table(questions: Sequence[Question], given: Mapping[tuple[Question, str], Answer]) -> pd.DataFrame:
    """One row a claim, question and version.

    Args:
        given: question and version to answer.
    """
    rows = []
    for question in questions:
        found = [given[question, version] for version in question.versions]
        judged = verdicts([answer.holds for answer in found])
        for version, answer, (verdict, since) in zip(question.versions, found, judged, strict=True):
            told = verdict if since is None else f"{verdict} {question.versions[since]}"
            evidence = " ".join(answer.evidence.replace("#", "").split())  # a # opens a comment in the CSV
            cells = [question.tool, question.package, version, question.question, told, evidence]
            rows += [[claim, *cells] for claim in question.claims]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("claim", kind="stable", ignore_index=True)


def write(frame: pd.DataFrame, sentences: Mapping[str, str], folder: Path) -> list[Path]:
    """`tables/toolchain_audit.csv` and `.md` under `folder`.

    Args:
        sentences: claim to what the survey says.
    """
    stem = folder / "tables" / "toolchain_audit"
    parts = [LEGEND]
    for claim, rows in frame.groupby("claim", sort=False):
        parts.append(f"## {claim}: “{markdown_text(sentences[str(claim)])}”")
        parts.append(grid([_shown(row) for _, row in rows.iterrows()]))
    write_atomically(stem.with_suffix(".csv"), csv(frame, HEADER))
    write_atomically(stem.with_suffix(".md"), markdown("What toolchains hold, version by version", parts))
    return [stem.with_suffix(".csv"), stem.with_suffix(".md")]


def _shown(row: pd.Series) -> dict[str, str]:
    return {
        "tool": f"{row['tool']} ({row['package']} {row['version']})",
        "the survey's sentence, of this version": row["question"],
        "verdict": row["verdict"],
        "evidence": row["evidence"],
    }
