"""The ledger with its verdicts: `claims.md`, tables as CSV, one figure a claim."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from harness.claims.analysis import Analysis
from harness.claims.ledger import Claim
from harness.claims.verdicts import NOT_RUN, PARTLY, SUPPORTED, VERDICTS, Case, Region
from harness.records import write_atomically
from harness.report.tables import markdown_text

LEGEND = (
    "Each claim of the survey has a hypothesis, a rule in words, and tests with regions (`conf/claims`), of which "
    "the regions decide; where they were mended after results had been seen, the note of the claim says so. "
    "A test supports its claim where its 95 % interval lies inside the region of the rule, its "
    "p-value stays below 0.05 after Holm's correction over the tests of the claim, and the effect is large enough; "
    "it refutes it where the interval lies in the opposite region; between them it is inconclusive. Statements hold "
    "for the model, text and formats tested, not for larger models: what needs those is marked not run."
)
"""What every reader of the ledger must know."""


@dataclass(frozen=True)
class Finding:
    """What one part of a claim came to."""

    part: Analysis
    cases: tuple[Case, ...]
    verdict: str


@dataclass(frozen=True)
class Verdict:
    """What a claim came to: by what this machine can decide, and what larger ones would have to."""

    claim: Claim
    findings: tuple[Finding, ...]
    verdict: str


def rows(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """A row a claim, with the effect of its first decided test: what tables, the page and wandb show."""
    return pd.DataFrame([_row(verdict) for verdict in verdicts])


def _row(verdict: Verdict) -> dict[str, object]:
    claim = verdict.claim
    lead = next((c for f in verdict.findings for c in f.cases if not c.missing and c.verdict == verdict.verdict), None)
    lead = lead or next((c for f in verdict.findings for c in f.cases if not c.missing), None)
    return {
        "id": claim.id,
        "section": claim.section,
        "sentence": claim.sentence,
        "kind": claim.kind,
        "hypothesis": claim.hypothesis,
        "verdict": verdict.verdict,
        "effect": lead.effect if lead else math.nan,
        "low": lead.low if lead else math.nan,
        "high": lead.high if lead else math.nan,
        "unit": lead.unit if lead else "",
        "test": lead.test if lead else "",
        "reason": reason(verdict),
        "figure": f"claims/{claim.id}" if any(not c.missing for f in verdict.findings for c in f.cases) else "",
    }


def cases(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """A row a test of every claim."""
    return pd.DataFrame(
        [
            {
                "id": v.claim.id,
                "part": f.part.says,
                "scale": f.part.scale,
                "label": c.label,
                "effect": c.effect,
                "low": c.low,
                "high": c.high,
                "unit": c.unit,
                "p": c.p,
                "verdict": c.verdict,
                "test": c.test,
                "missing": c.missing,
            }
            for v in verdicts
            for f in v.findings
            for c in f.cases
        ]
    )


def reason(verdict: Verdict) -> str:
    """The verdict in one line: what each part came to, or what is missing."""
    if verdict.claim.untestable:
        return verdict.claim.untestable
    told = []
    for finding in verdict.findings:
        missing = next((case.missing for case in finding.cases if case.missing), "")
        counts = Counter(case.verdict for case in finding.cases)
        agreeing = counts[SUPPORTED if finding.verdict == PARTLY else finding.verdict]
        share = f" ({agreeing} of {len(finding.cases)})" if len(finding.cases) > 1 else ""
        why = f": {missing}" if finding.verdict == NOT_RUN and missing != NOT_RUN else ""
        told.append(f"{finding.part.says}: {finding.verdict}{share}{why}")
    return "; ".join(told)


def markdown(verdicts: Sequence[Verdict], made: str) -> str:
    """The whole ledger: counts, a table, and each claim with its tests."""
    counts = Counter(v.verdict for v in verdicts)
    summary = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])
    table = pd.DataFrame(
        [
            {"Claim": f"[{v.claim.id}](#{v.claim.id.lower()})", "§": v.claim.section, "Survey": _text(v.claim.sentence)}
            | {"Verdict": f"**{v.verdict}**" if v.verdict != NOT_RUN else v.verdict, "Because": _text(reason(v))}
            for v in verdicts
        ]
    )
    parts = [f"<!-- {made} -->", "# The survey's claims", LEGEND, f"{len(verdicts)} entries: {summary}."]
    parts.append(table.to_markdown(index=False, disable_numparse=True))
    parts += [_section(verdict) for verdict in verdicts]
    return "\n\n".join(parts) + "\n"


def _section(verdict: Verdict) -> str:
    claim = verdict.claim
    lines = [
        f'<a id="{claim.id.lower()}"></a>',
        f"## {claim.id}: {_text(claim.sentence)}",
        f"Section {_text(claim.section)}, {claim.kind}. Hypothesis: {_text(claim.hypothesis)}",
        f"Rule: {_text(claim.rule)}",
        f"Verdict: **{verdict.verdict}**" + (f" ({_text(claim.untestable)})" if claim.untestable else ""),
    ]
    lines += [f"- {_text(finding.part.says)}: {_text(applied(finding.part))}" for finding in verdict.findings]
    table = _cases_table(verdict.findings)
    return "\n\n".join(line for line in (*lines, table, _text(claim.note)) if line)


def _cases_table(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    table = [
        {
            "Test": _text(finding.part.says),
            "Where": _text(case.label),
            "Effect [95 %]": _text(effect(case)),
            "p (Holm)": "" if case.p is None else f"{case.p:.2g}",
            "Verdict": case.verdict,
            "How": _text(case.missing or case.test),
        }
        for finding in findings
        for case in finding.cases
    ]
    return pd.DataFrame(table).to_markdown(index=False, disable_numparse=True)


def applied(part: Analysis) -> str:
    """The rule that decided a part, in words."""
    rule = part.rule
    least = f" and at least {rule.floor:g} from 0" if rule.floor else ""
    opposed = "outside of it" if rule.refuted is None else f"within {_region(rule.refuted)}"
    return (
        f"{part.name}; supports within {_region(rule.supported)}{least}, refutes {opposed}; {part.share:.0%} of cases"
    )


def _region(region: Region) -> str:
    return f"{region[0]:g} to {region[1]:g}".replace("-inf", "−∞").replace("inf", "∞").replace("-", "−")


def effect(case: Case) -> str:
    """The effect with its interval and unit, as text."""
    if case.missing:
        return ""
    exact = case.low == case.effect == case.high
    interval = "" if exact else f" [{case.low:+.3g}, {case.high:+.3g}]"
    return f"{case.effect:{'' if exact else '+'}.3g}{interval} {case.unit}".strip()


def _text(text: str) -> str:
    return markdown_text(" ".join(text.split()))


def summary(verdicts: Sequence[Verdict]) -> Table:
    """The ledger for the terminal: a row a claim."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("Claim", "§", "Survey", "Verdict", "Because"):
        table.add_column(head, no_wrap=head in ("Claim", "Verdict"))
    for v in verdicts:
        told = (v.claim.id, v.claim.section, v.claim.sentence, v.verdict, reason(v))
        table.add_row(*(escape(" ".join(text.split())) for text in told))
    return table


def write(verdicts: Sequence[Verdict], folder: Path, made: str) -> list[Path]:
    """`claims.md`, `tables/claims.csv`, `tables/claims_tests.csv` and `figures/claims/ID.svg`."""
    from harness.claims import figures  # matplotlib takes a while to import

    contents = {
        folder / "claims.md": markdown(verdicts, made),
        folder / "tables" / "claims.csv": rows(verdicts).to_csv(index=False, lineterminator="\n"),
        folder / "tables" / "claims_tests.csv": cases(verdicts).to_csv(index=False, lineterminator="\n"),
    }
    for path, content in contents.items():
        write_atomically(path, content)
    return [*contents, *figures.write(cases(verdicts), folder / "figures" / "claims")]
