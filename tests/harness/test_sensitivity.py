"""The sensitivity study: correlations against scipy, and a study of a small model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy.stats import kendalltau, spearmanr

from harness.calibration import as_statistics, collect
from harness.memory import MemoryMeter
from harness.sensitivity import report, study
from harness.sensitivity.__main__ import chosen
from harness.sensitivity.correlation import kendall, spearman
from methods.base import no_memo
from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.base import METRICS
from methods.sensitivity.measured import Measured

FORMATS = (Integer(2, 32), Integer(4, 32))


@pytest.mark.parametrize(("ours", "theirs"), [(spearman, spearmanr), (kendall, kendalltau)])
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_and_their_intervals_are_scipys(
    ours: Callable[..., Any], theirs: Callable[..., Any], ties: bool
) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(4, size=20).astype(float) if ties else rng.normal(size=20)
    y = x + rng.normal(size=20)
    found = ours(x, y, resamples=200)
    assert found.value == pytest.approx(theirs(x, y).statistic)
    rows = np.random.default_rng(0).integers(20, size=(200, 20))
    drawn = [theirs(x[row], y[row]).statistic for row in rows]
    assert (found.low, found.high) == pytest.approx(tuple(np.nanquantile(drawn, [0.025, 0.975])))


def test_a_constant_ranking_has_no_correlation() -> None:
    found = spearman(np.ones(8), np.arange(8.0), resamples=50)
    assert np.isnan([found.value, found.low, found.high]).all()
    with pytest.raises(ValueError, match="at least 4"):
        kendall(np.arange(3.0), np.arange(3.0))


@pytest.fixture
def session(small_llama: Callable[..., Network]) -> Any:
    network = small_llama()
    generator = torch.Generator().manual_seed(0)
    texts = {name: torch.randint(96, (6, 16), generator=generator) for name in ("calibration", "scoring", "test")}
    return SimpleNamespace(
        network=network,
        windows=SimpleNamespace(**texts),
        device="cpu",
        meter=MemoryMeter(),
        statistics=lambda stats, clock: as_statistics(network, collect(network, texts["calibration"], stats)),
        memo=lambda tokens, clock, phase: no_memo,
    )


def run(session: Any, *names: str) -> tuple[study.Study, list[str]]:
    told: list[str] = []
    metrics, truth = chosen(list(names), {"truth": {"sequences": 6}, "hutchinson": {"max_probes": 2}})
    found = study.run(session, metrics, truth, FORMATS, announce=lambda name, _: told.append(name))
    return found, told


def test_the_truth_is_measured_on_text_that_no_metric_saw(session: Any) -> None:
    found, told = run(session, "measured", "output_mse")
    assert told == ["truth", "measured", "output_mse"]
    scores = found.scores.set_index(["metric", "linear", "format"])["value"]
    direct = Measured(sequences=6, context=256)
    subject = study.subject(session, FORMATS, frozenset(), 0)
    for metric, text in (("truth", session.windows.test), ("measured", session.windows.scoring)):
        values = direct(replace(subject, tokens=text)).values
        for linear in session.network.linears:
            assert scores[metric, linear, "int2-g32"] == pytest.approx(values[f"{linear} int2-g32"])


def test_scores_come_with_what_allocation_makes_of_them_unless_another_metric_says_the_same(session: Any) -> None:
    found, _ = run(session, "gauss_newton", "hutchinson", "hawq_v2", "nncf_weight_error")
    names = set(found.scores["metric"])
    # HAWQ-V2's Ω is that of Hutchinson's trace; NNCF orders by the score itself.
    assert names == {"truth", "gauss_newton", "gauss_newton Ω", "hutchinson", "hawq_v2", "nncf_weight_error"}
    agreed = study.agreement(found.scores)
    assert set(agreed["metric"]) == names - {"truth"}
    assert len(agreed) == 5 * len(FORMATS)
    wide = found.scores[found.scores["format"] == "int2-g32"].pivot(index="linear", columns="metric", values="value")
    row = agreed.set_index(["metric", "format"]).loc[("hawq_v2", "int2-g32")]
    assert row["spearman"] == pytest.approx(spearmanr(wide["hawq_v2"], wide["truth"]).statistic)
    assert study.matrix(found.scores, "int2-g32").loc["truth", "hawq_v2"] == pytest.approx(row["spearman"])


def test_a_metric_that_the_model_does_not_allow_is_left_out_with_its_reason(session: Any) -> None:
    session.network.model.to(torch.bfloat16)
    found, told = run(session, "eigenvalue", "output_mse")
    assert told == ["truth", "eigenvalue", "output_mse"]
    assert set(found.scores["metric"]) == {"truth", "output_mse"}
    reason = found.costs.set_index("metric").loc["eigenvalue", "reason"]
    assert "take a metric of first derivatives such as gauss_newton" in str(reason)


def test_tables_and_heat_maps_are_written(session: Any, tmp_path: Path) -> None:
    found, _ = run(session, "gauss_newton", "output_mse")
    paths = report.write(found, "a|model on text", tmp_path)
    assert all(path.exists() for path in paths)
    assert {path.suffix for path in paths} == {".csv", ".md", ".png", ".svg", ".pdf"}
    text = (tmp_path / "tables/agreement_a-model.md").read_text()
    assert r"a\|model" in text
    assert "gauss\\_newton Ω" in text
    written = pd.read_csv(tmp_path / "tables/sensitivity_a-model.csv")
    assert len(written) == len(found.scores)
    console = Console(record=True, width=150)
    report.show(console, found)
    assert "output_mse" in console.export_text()


def test_wrong_names_and_options_are_refused() -> None:
    assert {metric.name for metric in chosen("all", {})[0]} == set(METRICS)
    with pytest.raises(ValueError, match="did you mean hutchinson"):
        chosen("hutchinsen", {})
    with pytest.raises(ValueError, match=r"unknown metric options\.hutchinsen: did you mean hutchinson"):
        chosen("all", {"hutchinsen": {}})
    with pytest.raises(ValueError, match=r"unknown option options\.kfac\.sequence: did you mean sequences"):
        chosen("all", {"kfac": {"sequence": 1}})
