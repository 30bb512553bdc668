"""Tests of the general building blocks: forest, scatter, curves and roofline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from harness.report import roofline, style
from harness.report.forest import forest
from tests.harness.test_figures import HOSTILE, clashes, look, texts

assert look  # a fixture


def cases(count: int) -> pd.DataFrame:
    """Cases of three units in parts of nine, with every verdict."""
    rng = np.random.default_rng(0)
    verdicts = list(style.VERDICTS)
    rows = []
    for i in range(count):
        verdict = verdicts[i % len(verdicts)]
        effect = rng.normal(0, 0.05) if not verdict.startswith("not") else math.nan
        rows.append(
            {
                "part": f"{i // 9}: {HOSTILE}",
                "label": f"C{i:02} {'a word ' * (i % 9)}{HOSTILE}",
                "effect": effect,
                "low": effect - 0.03,
                "high": effect + 0.02,
                "unit": ("Δ ln perplexity, nats per token", "Spearman’s ρ", "slope")[i % 3 if count > 1 else 0],
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("count", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_a_forest_plot_is_readable_for_few_and_many_rows(count: int) -> None:
    figure = forest(cases(count), "a title of some length " * 8)
    assert clashes(figure) == []
    told = " ".join(" ".join(text.get_text().split()) for text in texts(figure))
    assert all(f"C{i:02}" in told for i in range(count))
    assert [axis.get_xlabel() for axis in figure.axes] == list(dict.fromkeys(cases(count)["unit"]))


def test_a_forest_plot_draws_effects_intervals_verdicts_and_regions() -> None:
    table = pd.DataFrame(
        [
            ("A", "one", 0.5, 0.25, 1.0, "nats", "supported", -0.1, 0.2),
            ("A", "two", -0.5, -0.75, -0.25, "nats", "refuted", -math.inf, 0.0),
            ("B", "three", math.nan, math.nan, math.nan, "nats", "not run", -0.1, 0.2),
            ("B", "four", 0.0, -0.5, 0.5, "nats", "inconclusive", math.nan, math.nan),
        ],
        columns=["part", "label", "effect", "low", "high", "unit", "verdict", "region_low", "region_high"],
    )
    (axis,) = forest(table, "title").axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["A", "one", "two", "B", "three", "four"]
    assert [tick.get_fontweight() for tick in axis.get_yticklabels()] == ["bold", "normal", "normal"] * 2
    points = {line.get_xdata()[0]: line for line in axis.lines if len(line.get_xdata()) == 1}
    assert list(points) == [0.5, -0.5, 0.0]
    for effect, verdict in ((0.5, "supported"), (-0.5, "refuted"), (0.0, "inconclusive")):
        assert points[effect].get_color() == style.VERDICTS[verdict].color
        assert points[effect].get_marker() == style.VERDICTS[verdict].marker
    whiskers = [tuple(line.get_xdata()) for line in axis.lines if line.get_marker() == "|"]
    assert whiskers == [(0.25, 1.0), (-0.75, -0.25), (-0.5, 0.5)]
    assert [tuple(points[x].get_ydata()) for x in points] == [(1.5,), (2.5,), (5.5,)]
    bands = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    left = axis.get_xlim()[0]
    spans = [[b.get_x(), b.get_x() + b.get_width()] for b in bands]
    assert np.array(spans) == pytest.approx(np.array([[-0.1, 0.2], [left, 0.0], [-0.1, 0.2]]))
    shown = [text.get_text() for text in axis.texts]
    assert shown == ["0.50 [0.25, 1.00]", "−0.50 [−0.75, −0.25]", "not run", "0.0 [−0.5, 0.5]"]
    assert any(list(line.get_xdata()) == [0, 0] for line in axis.lines)


def test_a_forest_of_what_was_not_run_shows_no_effect() -> None:
    table = cases(6).query("verdict == 'not run'").assign(unit=None)
    (axis,) = forest(table, "title").axes
    assert [text.get_text() for text in axis.texts] == ["not run"]
    assert len(axis.lines) == 1  # zero


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "verdict 'maybe' is none of supported"),
        ({"low": 9.0}, "give finite ends, "),
        ({"high": math.inf}, "give finite ends"),
    ],
)
def test_a_forest_plot_refuses_nonsense(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forest(cases(1).assign(**change), "title")
    with pytest.raises(ValueError, match="lack effect"):
        forest(cases(1).drop(columns="effect"), "title")
    with pytest.raises(ValueError, match="has no cases"):
        forest(cases(1).iloc[:0], "title")


def kernels() -> pd.DataFrame:
    rows = [
        (name, peer, intensity, share * min(2e12 * intensity, 4e14))
        for name, peer, share in (("w4 linear", "", 0.8), ("w4 linear", "other", 0.5), (HOSTILE, None, 0.9))
        for intensity in (1.0, 16.0, 1024.0)
    ]
    table = pd.DataFrame(rows, columns=["kernel", "peer", "intensity", "flops"])
    ceilings = {"ceiling_read": 2e12, "ceiling_flops_bf16": 4e14, "ceiling_flops_int8": 8e14}
    return table.assign(bandwidth=table["flops"] / table["intensity"], **ceilings)


def test_a_roofline_has_its_ridges_where_bandwidth_and_peak_meet() -> None:
    table = kernels()
    figure = roofline.roofline(table, roofline.ceilings(table), "title")
    assert clashes(figure) == []
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    for name, peak in (("peak bf16: 400 TFLOP/s", 400), ("peak int8: 800 TFLOP/s", 800)):
        assert lines[name].get_xdata()[0] == pytest.approx(peak / 2)
        assert list(lines[name].get_ydata()) == pytest.approx([peak, peak])
    slope = lines["read: 2000 GB/s"]
    assert slope.get_ydata() / slope.get_xdata() == pytest.approx([2, 2])
    assert slope.get_xdata()[1] == pytest.approx(400)
    own, peer = lines["w4 linear (80%)"], lines["w4 linear, other (50%)"]
    assert own.get_ydata() == pytest.approx([1.6, 25.6, 320])
    assert own.get_color() == peer.get_color()
    assert peer.get_markerfacecolor() == "white" != own.get_markerfacecolor()
    for line in (own, peer):
        assert all(line.get_ydata() <= np.minimum(2 * line.get_xdata(), 400))


def test_rooflines_are_drawn_where_kernels_were_measured(tmp_path: Path) -> None:
    assert roofline.write(tmp_path, tmp_path) == []
    (tmp_path / "kernels_latency.csv").write_text("kernel,seconds\na,1\n")
    assert roofline.write(tmp_path, tmp_path) == []
    (tmp_path / "kernels_device.csv").write_text("# a machine\n" + kernels().to_csv(index=False))
    assert [path.name for path in roofline.write(tmp_path, tmp_path)] == [
        f"roofline_device.{end}" for end in ("png", "svg", "pdf")
    ]


def test_a_roofline_refuses_what_it_cannot_draw() -> None:
    table = kernels()
    with pytest.raises(ValueError, match="needs the columns ceiling_read"):
        roofline.ceilings(table.drop(columns="ceiling_read"))
    with pytest.raises(ValueError, match="flops is not there"):
        roofline.roofline(table.drop(columns="flops"), roofline.ceilings(table), "title")
    with pytest.raises(ValueError, match="not positive"):
        roofline.roofline(table.assign(intensity=0.0), roofline.ceilings(table), "title")
