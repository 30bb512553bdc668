"""The ledger's entries, the cells they ask for, and what is told of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from harness.cell import make_record
from harness.claims import ledger, report
from harness.claims.__main__ import judge
from harness.claims.analyses.documents import Citation, Documented, Fact, Published
from harness.claims.analyses.paired import Paired
from harness.claims.analyses.tabulated import Tabulated
from harness.claims.evidence import Evidence, Missing, grid
from harness.claims.ledger import Claim
from harness.claims.runner import lacking
from harness.claims.studies import Study
from harness.claims.verdicts import INCONCLUSIVE, NOT_RUN, NOT_TESTABLE, REFUTED, SUPPORTED
from harness.config import register_configs, to_cell
from harness.records import DONE, FAILED, SKIPPED, Store

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture
def hydra() -> Iterator[None]:
    register_configs()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def evidence(tmp_path: Path, hydra: None) -> Evidence:
    base = ["model=tiny", "data=pydocs", "eval=quick"]
    store = Store(tmp_path / "runs")
    study = Study(None, tmp_path / "studies")  # type: ignore[arg-type]
    return Evidence(base, store, tmp_path, study)


def entry(tmp_path: Path, text: str) -> dict[str, Claim]:
    (tmp_path / "a.yaml").write_text(text)
    return ledger.load(tmp_path)


WHOLE = """
X1:
  section: '1'
  sentence: one
  kind: empirical
  hypothesis: two
  rule: three
  parts:
  - {says: better, analysis: paired, first: method=gptq, second: method=rtn, over: 'budget=w3g128,w4g128', seeds: 2}
"""


def test_the_ledger_has_every_claim_and_every_slip() -> None:
    claims = ledger.load()
    assert [key for key in claims if key.startswith("C")] != []
    assert {f"C{i:02}" for i in range(1, 71)} | {f"S{i:02}" for i in range(1, 25)} == set(claims)
    assert all(claim.sentence and claim.hypothesis and claim.rule for claim in claims.values())


def test_every_cell_of_the_ledger_can_be_composed(evidence: Evidence) -> None:
    needs = {need for claim in ledger.load().values() for part in claim.parts for need in part.needs()}
    plain = {tuple(o for o in need if not o.startswith(("budget", "data.seed", "seed"))): need for need in needs}
    for overrides in plain.values():
        evidence.cell(overrides)
    assert len(plain) > 60


def test_seeds_are_set_as_hydra_would(evidence: Evidence) -> None:
    overrides = ("method=gptq", "data.seed=3", "seed=5")
    assert evidence.cell(overrides) == to_cell(compose("config", overrides=[*evidence.base, *overrides]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("analysis: paired", "analysis: pared"), r"X1.parts\[0\]: unknown analysis 'pared': did you mean paired"),
        (("seeds: 2", "seed: 2"), r"unknown option X1.parts\[0\].seed: did you mean seeds"),
        (("rule: three", "rules: three"), "unknown entry 'rules' in claim X1: did you mean rule"),
        (("  rule: three\n", ""), "claim X1 is incomplete: .*rule"),
        (("  rule: three\n", "  rule: three\n  untestable: so\n"), "either parts or a reason"),
        (("seeds: 2", "scale: gpus"), "scale=gpus is not one of cpu, gpu"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        entry(tmp_path, WHOLE.replace(*change))


def test_an_unknown_claim_is_named() -> None:
    with pytest.raises(ValueError, match="unknown claim 'C7x'"):
        ledger.chosen(ledger.load(), ["C7x"])


def test_a_grid_is_the_product_of_its_axes() -> None:
    points = grid("method=rtn,gptq budget=w3g128 seed=range(0,2) method.formats=[nvfp4,fp8]")
    assert len(points) == 4
    assert points[0] == ("method=rtn", "budget=w3g128", "seed=0", "method.formats=[nvfp4,fp8]")
    assert len(set(points)) == 4


def test_missing_cells_are_each_run_once_and_failures_again(tmp_path: Path, evidence: Evidence) -> None:
    (claim,) = entry(tmp_path, WHOLE).values()
    needs = [need for part in claim.parts for need in part.needs()] * 2
    assert len(lacking(evidence, needs, evidence.store)) == 8
    first, second, third = (evidence.cell(need) for need in needs[:3])
    evidence.store.write(make_record(first, DONE, None, result={"nll": [1.0]}))
    evidence.store.write(make_record(second, FAILED, "it broke"))
    evidence.store.write(make_record(third, SKIPPED, "it cannot"))
    assert {cell.key for cell in lacking(evidence, needs, evidence.store)} == {
        evidence.cell(need).key for need in needs
    } - {first.key, third.key}


def put(evidence: Evidence, overrides: tuple[str, ...], nll: np.ndarray) -> None:
    result = {"nll": nll.tolist(), "effective_bits": 3.0}
    evidence.store.write(make_record(evidence.cell(overrides), DONE, None, result=result))


def test_a_difference_is_paired_over_windows_and_texts(evidence: Evidence) -> None:
    """Windows differ by far more than the methods do: only a paired test can see a hundredth."""
    windows = np.random.default_rng(0).normal(2.5, 0.5, size=64)
    for seed in range(2):
        put(evidence, ("budget=w3g128", "method=gptq", f"data.seed={seed}"), windows - 0.01)
        put(evidence, ("budget=w3g128", "method=rtn", f"data.seed={seed}"), windows)
    part = Paired(says="", first="method=gptq", second="method=rtn", over="budget=w3g128,w4g128", seeds=2)
    near, absent = part.cases(evidence)
    assert (near.effect, near.low, near.high) == pytest.approx((-0.01, -0.01, -0.01))
    assert near.label == "w3g128" and "2 calibration texts × 64 windows" in near.test
    assert absent.missing == "not run"
    assert part.rule.judge(near) == SUPPORTED


def test_a_skipped_cell_tells_why(evidence: Evidence) -> None:
    overrides = ("budget=b3.25", "method=rtn", "data.seed=0")
    evidence.store.write(make_record(evidence.cell(overrides), SKIPPED, "no such width"))
    with pytest.raises(Missing, match="skipped: no such width"):
        evidence.record(overrides)


def test_documents_citations_and_published_figures(tmp_path: Path, evidence: Evidence) -> None:
    (tmp_path / "bibliography.csv").write_text("paper,arxiv,venue,source\nGPTQ,2210.17323,ICLR,its page\n")
    (tmp_path / "reported.csv").write_text("paper,model,method,value\nA,LLaMA-7B,GPTQ,5.8\nA,LLaMA-7B,RTN,6.2\n")
    right, wrong = Citation(says="", paper="GPTQ", stated={"venue": "ICLR", "arxiv": "1"}).cases(evidence)
    assert (right.effect, wrong.effect) == (1.0, 0.0) and wrong.test == "its page"
    with pytest.raises(ValueError, match="0 entries for 'AWQ'"):
        Citation(says="", paper="AWQ", stated={"year": "2024"}).cases(evidence)
    (half,) = Published(says="", papers=["A"], methods="GPTQ").cases(evidence)
    assert half.effect == 0.5
    with pytest.raises(Missing, match="no figures of B"):
        Published(says="", papers=["B"]).cases(evidence)
    facts = [Fact("so it is", "a page", True), Fact("not so", "another", False)]
    documented = Documented(says="", facts=facts)
    assert [documented.rule.judge(case) for case in documented.cases(evidence)] == [SUPPORTED, REFUTED]


def test_a_table_of_another_command_is_read_with_its_intervals(tmp_path: Path, evidence: Evidence) -> None:
    part = Tabulated(says="", table="t", made_by="make t", value="d", label=["m", "b"], where={"m": "cnn", "b": "3"})
    with pytest.raises(Missing, match="not run: make t"):
        part.cases(evidence)
    (tmp_path / "tables").mkdir()
    table = pd.DataFrame(
        {"m": ["cnn", "cnn"], "b": [3, 4], "d": [-0.2, 0.1], "d_low": [-0.3, 0.0], "d_high": [-0.1, 0.2]}
    )
    (tmp_path / "tables" / "t.csv").write_text("# a machine\n" + table.to_csv(index=False))
    (case,) = part.cases(evidence)
    assert (case.label, case.effect, case.low, case.high) == ("cnn 3", -0.2, -0.3, -0.1)


def verdict_of(evidence: Evidence, agrees: list[bool], **changes: str) -> report.Verdict:
    parts = tuple(Documented(says=f"part {i}", facts=[Fact("f", "s", a)]) for i, a in enumerate(agrees))
    text = {"sentence": "a | <b>", "hypothesis": "h", "rule": "r", "section": "1", "kind": "empirical"} | changes
    return judge(Claim("X1", parts=parts, **text), evidence, "cpu")


def test_the_report_tells_verdicts_reasons_and_escapes(evidence: Evidence) -> None:
    mixed, never = verdict_of(evidence, [True, False]), verdict_of(evidence, [], untestable="nobody can")
    assert (mixed.verdict, never.verdict) == ("partly supported", NOT_TESTABLE)
    assert report.reason(mixed) == "part 0: supported; part 1: refuted"
    page = report.markdown([mixed, never], "made")
    assert "2 entries: 1 partly supported, 1 not testable." in page
    assert "a \\| &lt;b&gt;" in page and "<b>" not in page and "nobody can" in page
    assert "- part 0: documented; supports within 1 to 1, refutes within 0 to 0; 67% of cases" in page
    rows = report.rows([mixed, never])
    assert rows["verdict"].tolist() == ["partly supported", NOT_TESTABLE]
    assert rows["figure"].tolist() == ["claims/X1", ""]


def test_larger_models_are_listed_and_do_not_decide(evidence: Evidence) -> None:
    small = Documented(says="here", facts=[Fact("f", "s", True)])
    large = Paired(says="there", scale="gpu", first="method=gptq", second="method=rtn", over="budget=w3g128")
    claim = Claim("X1", "1", "s", "empirical", "h", "r", (small, large))
    told = judge(claim, evidence, "cpu")
    assert told.verdict == SUPPORTED
    assert [f.verdict for f in told.findings] == [SUPPORTED, NOT_RUN]
    assert judge(claim, evidence, "gpu").verdict == NOT_RUN
    assert INCONCLUSIVE not in report.reason(told)
