"""Put the survey's sentences about toolchains to the packages as published, version by version.

python -m harness.audit
python -m harness.audit claim=C60
python -m harness.audit offline=true
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from harness.audit import archives, report
from harness.audit.archives import Contents
from harness.audit.packages import Packages
from harness.audit.questions import Question, asked, load
from harness.audit.report import Answer, Source
from harness.claims import ledger
from harness.messages import refusing, status

console = Console(width=max(150, Console().width), highlight=False)


@dataclass
class AuditConfig:
    """The root of this command's configuration."""

    claim: Any = "all"
    """One id, a list of ids, or all; only all of them write the table."""
    offline: bool = False
    """Read what is downloaded already, and never ask the package index."""
    packages: str = ".cache/toolchains/packages"
    """Folder of the downloaded archives."""
    folder: str = "results"
    """Gets `tables/toolchain_audit.csv` and `.md`."""


ConfigStore.instance().store(name="base_audit", node=AuditConfig)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="audit")
@refusing(console)
def job(config: DictConfig) -> None:
    """Download, inspect, print, write."""
    wanted = [] if config.claim == "all" else [config.claim] if isinstance(config.claim, str) else list(config.claim)
    questions = asked(load(), wanted)
    claims = ledger.chosen(ledger.load(), [c for question in questions for c in question.claims])
    frame = report.table(questions, _ask(questions, Packages(config.packages, config.offline)))
    shown = frame[frame["claim"].isin(wanted)] if wanted else frame
    console.print(_counts(shown).to_string() if not wanted else shown.to_string(index=False), markup=False)
    if not wanted:
        paths = report.write(frame, {key: claim.sentence for key, claim in claims.items()}, Path(config.folder))
        console.print(f"wrote {' and '.join(map(str, paths))}", markup=False)


def _ask(questions: list[Question], packages: Packages) -> dict[tuple[Question, str], Answer]:
    def opened(source: Source) -> Contents:
        return archives.read(packages.archive(*source))

    total, began = len(report.sources(questions)), time.perf_counter()
    given: dict[tuple[Question, str], Answer] = {}
    for number, ((package, version, _), found) in enumerate(report.answers(questions, opened), 1):
        given |= {(question, version): answer for question, answer in found.items()}
        reasons = {answer.evidence for answer in found.values() if answer.holds is None}
        told = "; ".join(reasons) or f"{len(found)} questions"
        seconds = time.perf_counter() - began
        console.print(f"[{number}/{total}] {package} {version}: {told} ({seconds:.0f} s)", markup=False)
    return given


def _counts(frame: pd.DataFrame) -> pd.DataFrame:
    """How often each verdict was given, a claim a row; versions left out."""
    verdict = frame["verdict"].str.replace(r" since .*", "", regex=True)
    return pd.crosstab(frame["claim"], verdict)


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("harness.audit").setLevel(logging.INFO)
    return status(job, console, AuditConfig)


if __name__ == "__main__":
    sys.exit(main())
