"""Effects that another command measured and committed as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.claims.analysis import ANALYSES, Analysis
from harness.claims.evidence import Evidence, Missing
from harness.claims.verdicts import Case


@ANALYSES.register("tabulated")
@dataclass(frozen=True, kw_only=True)
class Tabulated(Analysis):
    """Rows of `tables/TABLE.csv`, each a case: a value with the ends of its interval.

    Attributes:
        table: its name.
        made_by: the command that makes it.
        where: values of columns that choose rows, as text.
        value: column of the effect; `value_low` and `value_high` hold its interval.
        label: columns that name a row.
        unit: of the effect.
        test: what gave the interval, in a few words.
    """

    table: str
    made_by: str
    value: str
    label: list[str]
    where: dict[str, str] = field(default_factory=dict)
    unit: str = ""
    test: str = ""

    def cases(self, evidence: Evidence) -> list[Case]:
        rows = evidence.table(self.table, self.made_by)
        for column, value in self.where.items():
            rows = rows[rows[column].astype(str) == value]
        if rows.empty:
            chosen = ", ".join(f"{column} {value}" for column, value in self.where.items())
            raise Missing(f"not run: tables/{self.table}.csv has no row with {chosen}; {self.made_by}")
        return [
            Case(
                " ".join(str(row[column]) for column in self.label),
                float(row[self.value]),
                float(row[f"{self.value}_low"]),
                float(row[f"{self.value}_high"]),
                self.unit,
                test=self.test,
            )
            for _, row in rows.iterrows()
        ]
