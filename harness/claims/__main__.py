"""Put the survey's claims to the test: run what the records lack, analyse, write the ledger.

python -m harness.claims
python -m harness.claims claim=C46
python -m harness.claims claim=[C16,C38] model=opt-125m data=wikitext2 run=gpu
python -m harness.claims compute=false
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig
from rich.console import Console

from harness.claims import ledger, report, runner, verdicts
from harness.claims.analysis import Analysis
from harness.claims.evidence import Evidence, Missing
from harness.claims.ledger import Claim
from harness.claims.report import Finding, Verdict
from harness.claims.studies import Study
from harness.config import RunConfig, part, register_configs, to_cell
from harness.environment import describe
from harness.messages import refusing, status
from harness.records import Store

console = Console(width=max(150, Console().width), highlight=False)
GROUPS = ("model", "data", "eval")


@dataclass
class ClaimsConfig:
    """The root of this command's configuration."""

    model: Any = MISSING
    data: Any = MISSING
    eval: Any = MISSING
    run: Any = MISSING
    claim: Any = "all"
    """One id, a list of ids, or all."""
    scale: str = "cpu"
    """`gpu` adds the parts of claims that need larger models than the embedded one."""
    compute: bool = True
    """Run cells that have no record yet; without, analyse what is there."""
    jobs: int = 2
    """Cells at a time."""
    group_size: int = 128
    """Of the study that ranks linears."""
    folder: str = "results"
    """Gets `claims.md`, `tables/` and `figures/claims/`; holds the tables of benchmarks."""


ConfigStore.instance().store(name="base_claims", node=ClaimsConfig)
register_configs()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="claims")
@refusing(console)
def job(config: DictConfig) -> None:
    """Compute, judge, print, write."""
    settings = part(RunConfig, config.run, "run")
    wanted = [] if config.claim == "all" else [config.claim] if isinstance(config.claim, str) else list(config.claim)
    claims = ledger.chosen(ledger.load(), wanted)
    base, store, folder = _base(), Store(settings.results), Path(config.folder)
    study = Study(to_cell(compose("config", overrides=base)), store.folder / "studies", config.group_size)
    evidence = Evidence(base, store, folder, study)
    if config.compute:
        _compute(claims, evidence, settings, config)
    found = [judge(claim, evidence, config.scale) for claim in claims.values()]
    git = describe()["git"]
    made = f"Made by python -m harness.claims from the records of {' '.join(base)}; git {git or 'unknown'}."
    if wanted:
        console.print(report.markdown(found, made), markup=False)
        return
    paths = report.write(found, folder, made)
    console.print(report.summary(found))
    console.print(
        f"Wrote {folder}/claims.md and {len(paths) - 1} files in {folder}/tables and {folder}/figures/claims."
    )


def _base() -> list[str]:
    """What all cells share: this command's model, data and evaluation."""
    chosen = HydraConfig.get().runtime.choices
    options = [o for o in HydraConfig.get().overrides.task if o.split(".")[0] in GROUPS and "." in o.split("=")[0]]
    return [*(f"{group}={chosen[group]}" for group in GROUPS), *options]


def _compute(claims: dict[str, Claim], evidence: Evidence, settings: RunConfig, config: DictConfig) -> None:
    parts = [p for claim in claims.values() for p in claim.parts if p.scale == "cpu" or config.scale == "gpu"]
    began = time.perf_counter()
    with console.status("which cells are missing?"):
        cells = runner.lacking(evidence, (need for p in parts for need in p.needs()), evidence.store)
    studies = [evidence.study.run] if any(p.uses_study for p in parts) and evidence.study.read() is None else []
    console.print(f"{len(cells)} cells to run" + (", and every sensitivity metric on the base model" * len(studies)))
    runner.run(cells, settings, config.jobs, console, studies)
    console.print(f"took {(time.perf_counter() - began) / 60:.1f} minutes")


def judge(claim: Claim, evidence: Evidence, scale: str) -> Verdict:
    """The verdict of a claim, from what is there."""
    families = [_cases(p, evidence, scale) for p in claim.parts]
    findings = []
    for p, cases in zip(claim.parts, verdicts.corrected(families), strict=True):
        told = verdicts.judged(cases, p.rule)
        findings.append(Finding(p, tuple(told), verdicts.of_part(told, p.share)))
    decided = [f.verdict for f in findings if f.part.scale == "cpu" or scale == "gpu"]
    return Verdict(claim, tuple(findings), verdicts.of_claim(decided))


def _cases(p: Analysis, evidence: Evidence, scale: str) -> Sequence[verdicts.Case]:
    if p.scale == "gpu" and scale == "cpu":
        return [verdicts.Case("larger models", missing="not run: needs scale=gpu and another model")]
    try:
        return p.cases(evidence)
    except Missing as reason:
        return [verdicts.Case(p.says, missing=str(reason))]


def main() -> int:
    """Exit status: 0 when done, 2 for bad input."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    return status(job, console, ClaimsConfig)


if __name__ == "__main__":
    sys.exit(main())
