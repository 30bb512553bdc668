"""The few ways of looking into a package. Each is a frozen dataclass whose fields are its options in `conf/audit`;
`@inspection("name")` registers it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar

from harness.audit.archives import Contents
from harness.audit.definitions import Definition, definitions
from harness.audit.packages import Unavailable
from methods.base import hint

T = TypeVar("T", bound="Inspection")
INSPECTIONS: dict[str, type[Inspection]] = {}


@dataclass(frozen=True)
class Found:
    """Whether something is there, and where: `path:line`, or how many files were searched.

    Attributes:
        searched: whether there was anything to search.
    """

    there: bool
    evidence: str
    searched: bool = True


@dataclass(frozen=True, kw_only=True)
class Inspection(ABC):
    """A way of looking."""

    def __post_init__(self) -> None:
        for name in ("files", "pattern", "path"):
            try:
                re.compile(getattr(self, name, ""))
            except re.error as error:
                raise ValueError(f"{name} {getattr(self, name)!r} is no regular expression: {error}") from error

    @abstractmethod
    def look(self, contents: Contents) -> Found:
        """What there is in a package.

        Raises:
            Unavailable: a file that may hold it cannot be read.
        """


def inspection(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make the class known to `conf/audit` as `name`."""

    def enter(cls: type[T]) -> type[T]:
        if name in INSPECTIONS:
            raise ValueError(f"two inspections are called {name!r}")
        INSPECTIONS[name] = cls
        return cls

    return enter


def named(name: str) -> type[Inspection]:
    """The inspection of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in INSPECTIONS:
        raise ValueError(f"unknown inspection {name!r}: {hint(name, INSPECTIONS)}")
    return INSPECTIONS[name]


@inspection("defines")
@dataclass(frozen=True, kw_only=True)
class Defines(Inspection):
    r"""A class, function, parameter, assignment, field or enum member, by the syntax tree.

    Attributes:
        name: qualified, as in `SensitivityMetric.HESSIAN_INPUT_ACTIVATION` or `compress_weights.awq`.
        value: its default or value as Python source; any if empty.
        files: pattern (regular expression) somewhere in the path.
    """

    name: str
    value: str = ""
    files: str = r"\.py$"

    def look(self, contents: Contents) -> Found:
        sources = {path: text for path, text in _chosen(contents, self.files) if path.endswith((".py", ".pyi"))}
        others, unread = [], []
        for path, text in sources.items():
            try:
                found = _definitions(text, self.name)
            except ValueError as error:
                unread.append(f"{path} {error}")
                continue
            for definition in found:
                if self.value in ("", definition.value):
                    return Found(True, f"{path}:{definition.line}")
                others.append(f"{path}:{definition.line} gives {definition.value or 'no value'}")
        if unread:
            raise Unavailable(unread[0])
        return Found(False, others[0] if others else f"0 definitions in {_counted(sources)}", bool(sources))


@inspection("mentions")
@dataclass(frozen=True, kw_only=True)
class Mentions(Inspection):
    """Lines that match a pattern.

    Attributes:
        pattern: regular expression, of either case unless it begins with `(?-i:`.
        files: pattern somewhere in the path; all texts by default: sources, documents, configurations, metadata.
    """

    pattern: str
    files: str = ""

    def look(self, contents: Contents) -> Found:
        matcher = re.compile(self.pattern, re.IGNORECASE)
        searched = dict(_chosen(contents, self.files))
        hits = [(path, number) for path, text in searched.items() for number in _matching(text, matcher)]
        if not hits:
            return Found(False, f"0 hits in {_counted(searched)}", bool(searched))
        path, number = hits[0]
        return Found(
            True, f"{path}:{number}; {_counted(hits, 'hit')} in {len({p for p, _ in hits})} of {_counted(searched)}"
        )


@inspection("file")
@dataclass(frozen=True, kw_only=True)
class File(Inspection):
    """A file whose path matches a pattern."""

    path: str

    def look(self, contents: Contents) -> Found:
        hits = [path for path in contents.paths if re.search(self.path, path)]
        return Found(bool(hits), hits[0] if hits else f"not among {_counted(contents.paths)}", bool(contents.paths))


@inspection("metadata")
@dataclass(frozen=True, kw_only=True)
class Metadata(Inspection):
    """A header of the package's metadata, such as Keywords, Classifier or Requires-Dist, whose value matches."""

    field: str
    pattern: str

    def look(self, contents: Contents) -> Found:
        values = list(contents.metadata(self.field))
        for path, number, value in values:
            if re.search(self.pattern, value, re.IGNORECASE):
                return Found(True, f"{path}:{number}")
        return Found(False, f"0 hits in {_counted(values, 'line')} of {self.field}")


def _definitions(source: str, name: str) -> list[Definition]:
    last = name.rpartition(".")[2]
    return [d for d in definitions(source) if d.name == name] if last in source else []


def _chosen(contents: Contents, files: str) -> Iterator[tuple[str, str]]:
    return ((path, text) for path, text in contents.texts.items() if re.search(files, path))


def _matching(text: str, matcher: re.Pattern[str]) -> Iterator[int]:
    return (number for number, line in enumerate(text.splitlines(), 1) if matcher.search(line))


def _counted(things: Sized, name: str = "file") -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"
