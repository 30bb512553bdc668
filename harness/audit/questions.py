"""The questions as data: one file a tool in `conf/audit/*.yaml`, typed and checked before anything is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from harness.audit.inspections import Inspection, named
from harness.audit.packages import KINDS, WHEEL
from harness.config import build
from methods.base import hint

FOLDER = Path(__file__).parents[2] / "conf" / "audit"
T = TypeVar("T")


@dataclass(frozen=True)
class Tool:
    """A file of `conf/audit`.

    Attributes:
        tool: its name, as the table shows it.
        package: its name at the package index.
        versions: asked about, oldest first, unless a question names its own.
        archive: wheel or sdist.
        questions: see `Entry`.
    """

    tool: str
    package: str
    versions: list[str]
    archive: str = WHEEL
    questions: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A question as it is written.

    Attributes:
        claims: ids of the ledger that it bears on.
        question: what the survey says, as a sentence that each version makes true or false.
        look: name of an inspection and its options, as in `{mentions: {pattern: hawq}}`.
        present: whether the sentence is true if that is found, or if it is not.
        versions: those of the tool if none.
    """

    claims: list[str]
    question: str
    look: dict[str, Any]
    present: bool = True
    versions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A question about the versions of one package; see `Tool` and `Entry`."""

    tool: str
    package: str
    archive: str
    versions: tuple[str, ...]
    claims: tuple[str, ...]
    question: str
    inspection: Inspection
    present: bool


def load(folder: Path = FOLDER) -> list[Question]:
    """Every question, in the order of the files.

    Raises:
        ValueError: a file is no YAML, or an entry is incomplete or has an unknown option; one sentence names it.
    """
    return [question for path in sorted(folder.glob("*.yaml")) for question in _read(path)]


def asked(questions: list[Question], wanted: list[str]) -> list[Question]:
    """The questions that bear on these claims; all for none.

    Raises:
        ValueError: no question bears on one of them.
    """
    known = {claim for question in questions for claim in question.claims}
    for claim in wanted:
        if claim not in known:
            raise ValueError(f"no question bears on {claim!r}: {hint(claim, known)}")
    return [question for question in questions if not wanted or set(wanted) & set(question.claims)]


def _read(path: Path) -> list[Question]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path.name} is no YAML: {_where(error)}") from error
    tool = _built(Tool, values, path.name)
    if tool.archive not in KINDS:
        raise ValueError(f"{path.name}: unknown archive {tool.archive!r}: {hint(tool.archive, KINDS)}")
    return [_question(tool, entry, f"{path.name}: questions[{i}]") for i, entry in enumerate(tool.questions)]


def _where(error: Exception) -> str:
    """The problem and the line; YAML's own message spans several lines and names the file again."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else str(error).splitlines()[0]


def _question(tool: Tool, values: Any, where: str) -> Question:
    entry = _built(Entry, values, where)
    versions = entry.versions or tool.versions
    if not versions or not entry.claims:
        raise ValueError(f"{where} names no {'claims' if versions else 'versions'}; list at least one")
    if len(entry.look) != 1:
        raise ValueError(f"{where}.look must name one inspection, and names {len(entry.look)}")
    [(name, options)] = entry.look.items()
    try:
        look = _built(named(str(name)), options, f"look.{name}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Question(
        tool.tool,
        tool.package,
        tool.archive,
        tuple(versions),
        tuple(entry.claims),
        entry.question.strip(),
        look,
        entry.present,
    )


def _built(cls: type[T], values: Any, where: str) -> T:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of options, not {values!r}")
    try:
        return build(cls, values, where)
    except MissingMandatoryValue as error:
        raise ValueError(f"{where} is incomplete: {str(error).splitlines()[0]}") from error
