"""What a test says, and the rules that turn it into a verdict. The rules are fixed before anything is measured.

A *case* is one comparison (one model at one budget): an effect with its interval. It supports its claim where the
interval lies inside the region that the rule names, refutes it where it lies inside the opposite region, and is
inconclusive between. Where cases have p-values, these are corrected by Holm over all cases of the claim.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"
PARTLY, NOT_TESTABLE, NOT_RUN = "partly supported", "not testable", "not run"
VERDICTS = (SUPPORTED, PARTLY, INCONCLUSIVE, REFUTED, NOT_TESTABLE, NOT_RUN)

LEVEL = 0.05
"""Of a family of tests, after Holm's correction."""

Region = tuple[float, float]


@dataclass(frozen=True)
class Rule:
    """When a case supports its claim, and when it refutes it.

    Attributes:
        supported: the interval must lie inside, and its p-value, if it has one, below 0.05 after correction.
        refuted: the interval must lie inside; by default it must not meet the region that supports.
        floor: least absolute effect that supports.
    """

    supported: Region
    refuted: Region | None = None
    floor: float = 0.0

    def judge(self, case: Case) -> str:
        """The verdict of one case."""
        if case.missing:
            return NOT_RUN
        certain = case.p is None or case.p < LEVEL
        if _inside(case, self.supported) and abs(case.effect) >= self.floor and certain:
            return SUPPORTED
        if self.refuted is None:
            opposed = case.high < self.supported[0] or case.low > self.supported[1]
        else:
            opposed = _inside(case, self.refuted)
        return REFUTED if opposed else INCONCLUSIVE


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        label: what was compared where, such as `w3g128`.
        effect, low, high: the effect and its 95 % interval; three times the same where it is exact.
        unit: of the effect.
        p: two-sided p-value; None for exact facts and for equivalence, which the interval decides.
        test: what gave the interval, in a few words.
        missing: why there are no numbers; empty where there are.
        verdict: filled in by `judged`.
    """

    label: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    p: float | None = None
    test: str = ""
    missing: str = ""
    verdict: str = ""


def _inside(case: Case, region: Region) -> bool:
    return region[0] <= case.low and case.high <= region[1]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values after Holm's step-down correction (Scandinavian Journal of Statistics 1979); None stays None."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = list(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def corrected(families: Sequence[Sequence[Case]]) -> list[list[Case]]:
    """The cases of a claim's parts, their p-values corrected over all of them together."""
    flat = [case for cases in families for case in cases]
    p_values = iter(holm([case.p for case in flat]))
    return [[replace(case, p=next(p_values)) for case in cases] for cases in families]


def judged(cases: Sequence[Case], rule: Rule) -> list[Case]:
    """The cases with their verdicts."""
    return [replace(case, verdict=rule.judge(case)) for case in cases]


def of_part(cases: Sequence[Case], share: float) -> str:
    """The verdict of a part from those of its cases: none where a case has not been run.

    The share of the cases must support, while none refutes; or refute, while none supports.

    Facts of which some support and some refute make a part partly right; tests that do, leave it open.
    """
    counts = Counter(case.verdict for case in cases)
    if counts[NOT_RUN] or not cases:
        return NOT_RUN
    enough = math.ceil(share * len(cases) - 1e-9)
    if counts[SUPPORTED] >= enough and not counts[REFUTED]:
        return SUPPORTED
    if counts[REFUTED] >= enough and not counts[SUPPORTED]:
        return REFUTED
    if counts[SUPPORTED] and counts[REFUTED] and all(case.low == case.high for case in cases):
        return PARTLY
    return INCONCLUSIVE


def of_claim(parts: Sequence[str]) -> str:
    """The verdict of a claim from those of its parts; parts that cannot be tested do not count beside others."""
    told = set(parts) - {NOT_TESTABLE}
    if not told:
        return NOT_TESTABLE
    if NOT_RUN in told:
        return NOT_RUN
    if len(told) == 1:
        return told.pop()
    return PARTLY if told & {SUPPORTED, PARTLY} else INCONCLUSIVE
