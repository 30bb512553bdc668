"""Does a score rank linears as the measured loss does? Better than another score? Spearman's ρ over linears."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.claims import ranks
from harness.claims.analysis import ANALYSES, SIDE, Analysis
from harness.claims.evidence import Evidence, Missing
from harness.claims.scores import FORMATS, TRUTH, errors, scores, types
from harness.claims.statistics import RESAMPLES, Floats, from_resamples
from harness.claims.verdicts import Case, Rule

FLOOR = 0.05
"""Of a difference in ρ: what is smaller has no practical meaning here."""


@dataclass(frozen=True, kw_only=True)
class Ranked(Analysis):
    """What analyses of rankings share: each format is a case, and linears are its samples.

    Attributes:
        against: what a score should rank as: the measured loss, or another score.
        formats: of the study.
        partial: scores or controls held fixed: `weights` (as good as their logarithm: ranks count) and
            `squared_error`; see `harness.claims.scores`.
        within_types: compare linears of the same type only (query projections with query projections), since types
            alone can make a correlation.
    """

    against: str = TRUTH
    formats: tuple[str, ...] = FORMATS
    partial: tuple[str, ...] = ()
    within_types: bool = False

    @property
    def uses_study(self) -> bool:
        return True

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, fmt) for fmt in self.formats]

    def _case(self, evidence: Evidence, fmt: str) -> Case:
        try:
            return self.compare(evidence, fmt)
        except Missing as reason:
            return Case(fmt, missing=str(reason))

    @abstractmethod
    def compare(self, evidence: Evidence, fmt: str) -> Case:
        """The case of one format. May raise Missing."""

    def sample(self, evidence: Evidence, fmt: str, names: Sequence[str]) -> tuple[Floats, ranks.Rows]:
        """The columns `names`, `against` and the controls: [k, linears]; and the stratum of each linear."""
        wanted = [*names, self.against, *self.partial]
        table = scores(evidence, fmt, wanted)
        if len(table) < ranks.LEAST:
            raise Missing(f"{len(table)} linears are too few to rank")
        strata = types(table.index.astype(str)) if self.within_types else np.zeros(len(table), dtype=np.int64)
        order = np.argsort(strata, kind="stable")
        return table[wanted].to_numpy(float).T[:, order], strata[order]

    def how(self, strata: ranks.Rows) -> str:
        """Samples and controls in words."""
        within = f" within {len(np.unique(strata))} types" if self.within_types else ""
        given = f", {' and '.join(self.partial)} held fixed" if self.partial else ""
        return f"{len(strata)} linears{within}{given}, {RESAMPLES:,} resamples"


@ANALYSES.register("rank")
@dataclass(frozen=True, kw_only=True)
class Rank(Ranked):
    """Spearman's ρ between a score and the measured loss, a bootstrap interval over linears and a permutation test.

    By default the claim is that the score ranks well: it is supported where ρ is at least 0.5 and above 0 with
    confidence, refuted where the interval ends below 0.3.

    Attributes:
        score: a metric of the study, or a control.
    """

    score: str

    default: ClassVar[Rule] = Rule((0.0, 1.0), (-1.0, 0.3), 0.5)

    def compare(self, evidence: Evidence, fmt: str) -> Case:
        columns, strata = self.sample(evidence, fmt, [self.score])
        rho = float(ranks.correlation(columns, strata))
        if not np.isfinite(rho):
            raise Missing(f"{self.score} or {self.against} does not differ between linears")
        drawn = ranks.bootstrap(columns, strata, ranks.resampled(strata))
        effect = from_resamples(rho, drawn[np.isfinite(drawn)])
        p = ranks.permutation_p(columns, strata)
        test = f"Spearman, {self.how(strata)} and permutations{self._ceiling(evidence, fmt)}"
        return Case(fmt, rho, effect.low, effect.high, "Spearman ρ", p, test)

    def _ceiling(self, evidence: Evidence, fmt: str) -> str:
        """What noise in the measured loss leaves to a perfect score, over all linears."""
        if self.against != TRUTH:
            return ""
        truth, error = scores(evidence, fmt, [TRUTH])[TRUTH], errors(evidence, fmt)
        highest = ranks.ceiling(np.asarray(truth, np.float64), np.asarray(error[truth.index], np.float64))
        return f"; noise ceiling over all linears {highest:.2f}"


@ANALYSES.register("rank_difference")
@dataclass(frozen=True, kw_only=True)
class RankDifference(Ranked):
    """Spearman's ρ of `first` minus that of `second` on the same linears, with a bootstrap interval.

    By default the claim is that the first ranks better: it is supported where the interval lies above zero and the
    difference is 0.05 at least, refuted where the interval lies below 0.05.

    Attributes:
        first, second: metrics of the study, or controls.
    """

    first: str
    second: str

    default: ClassVar[Rule] = Rule((0.0, SIDE), (-SIDE, FLOOR), FLOOR)

    def compare(self, evidence: Evidence, fmt: str) -> Case:
        columns, strata = self.sample(evidence, fmt, [self.first, self.second])
        pairs = [np.delete(columns, other, axis=0) for other in (1, 0)]
        value = float(ranks.correlation(pairs[0], strata) - ranks.correlation(pairs[1], strata))
        if not np.isfinite(value):
            raise Missing(f"{self.first}, {self.second} or {self.against} does not differ between linears")
        rows = ranks.resampled(strata)
        first, second = (ranks.bootstrap(pair, strata, rows) for pair in pairs)
        defined = np.isfinite(first) & np.isfinite(second)
        effect = from_resamples(value, (first - second)[defined])
        return Case(
            fmt, value, effect.low, effect.high, "Δ Spearman ρ", effect.p, f"paired bootstrap, {self.how(strata)}"
        )
