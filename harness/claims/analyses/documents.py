"""What papers, packages and published tables say: read, not measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pandas as pd

from harness.claims.analysis import ANALYSES, Analysis
from harness.claims.evidence import Evidence, Missing
from harness.claims.verdicts import Case, Rule

YES_OR_NO = Rule((1.0, 1.0), (0.0, 0.0))
UNIT = "(1: agrees)"


def _exact(label: str, agrees: bool, source: str) -> Case:
    value = float(agrees)
    return Case(label, value, value, value, UNIT, test=source)


@dataclass
class Fact:
    """What a source says about the claim."""

    fact: str
    source: str
    agrees: bool


@ANALYSES.register("documented")
@dataclass(frozen=True, kw_only=True)
class Documented(Analysis):
    """Facts that were looked up, each with its source, and whether they agree with the survey."""

    facts: list[Fact] = field(default_factory=list)

    default: ClassVar[Rule] = YES_OR_NO

    def cases(self, evidence: Evidence) -> list[Case]:  # noqa: ARG002
        return [_exact(f.fact, f.agrees, f.source) for f in self.facts]


@ANALYSES.register("citation")
@dataclass(frozen=True, kw_only=True)
class Citation(Analysis):
    """What the survey says of a paper, beside `results/bibliography.csv`.

    Attributes:
        paper: as the column `paper` names it.
        stated: the survey's value for some of the columns arxiv, venue, year, title, authors.
    """

    paper: str
    stated: dict[str, str] = field(default_factory=dict)

    default: ClassVar[Rule] = YES_OR_NO

    def cases(self, evidence: Evidence) -> list[Case]:
        known = evidence.bibliography
        rows = known[known["paper"] == self.paper]
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} entries for {self.paper!r} in results/bibliography.csv; there must be one")
        paper = rows.iloc[0]
        return [
            _exact(f"{column}: survey {told!r}, paper {paper[column]!r}", told == paper[column], paper["source"])
            for column, told in self.stated.items()
        ]


@ANALYSES.register("published")
@dataclass(frozen=True, kw_only=True)
class Published(Analysis):
    """How many figures of `results/reported.csv` belong to some methods, as a share of those of some papers.

    Attributes:
        papers, methods, models: patterns (regular expressions) of the columns' values.
    """

    papers: list[str] = field(default_factory=lambda: [".*"])
    methods: str = ".*"
    models: str = ".*"

    default: ClassVar[Rule] = Rule((1e-9, 1.0), (0.0, 0.0))

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence.reported, pattern) for pattern in self.papers]

    def _case(self, figures: pd.DataFrame, pattern: str) -> Case:
        rows = figures[figures["paper"].str.fullmatch(pattern) & figures["model"].str.contains(self.models)]
        if rows.empty:
            raise Missing(f"results/reported.csv has no figures of {pattern}")
        share = float(rows["method"].str.contains(self.methods).mean())
        name = f"{self.methods} in {'all papers' if pattern == '.*' else pattern}"
        return Case(name, share, share, share, f"of {len(rows)} figures", test="count in results/reported.csv")


@ANALYSES.register("audit")
@dataclass(frozen=True, kw_only=True)
class Audit(Analysis):
    """What an inspection of the tools' packages found: `tables/toolchain_audit.csv`, made by `make audit`.

    Attributes:
        claim: id under which the audit lists its findings.
    """

    claim: str

    default: ClassVar[Rule] = YES_OR_NO

    def cases(self, evidence: Evidence) -> list[Case]:
        found = evidence.table("toolchain_audit", "make audit")
        rows = found[found["claim"] == self.claim]
        if rows.empty:
            raise Missing(f"not run: the audit has no row for {self.claim}")
        return [self._case(row) for _, row in rows.iterrows()]

    def _case(self, row: pd.Series) -> Case:
        name = f"{row['tool']} {row['version']}: {row['question']}"
        if row["verdict"] == "not checked":
            return Case(name, missing=f"not checked: {row['evidence']}")
        return _exact(name, row["verdict"] == "holds", f"{row['verdict']}: {row['evidence']}")
