"""Tests of the figures' content: what is drawn where, in which color, and that no text covers another."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from harness.bench import figures as bench
from harness.records import Record, digest
from harness.report import dose, figures, frame, layout, pareto, strips, style
from harness.report.style import COLORS, FAINT, INK

HOSTILE = r"a_b $x^2$ & 50% {y} \z <b>"
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS = 3


@pytest.fixture(autouse=True)
def look() -> Iterator[None]:
    with matplotlib.rc_context(style.FIGURE):
        yield


def texts(figure: Figure) -> list[Text]:
    """What is drawn: an axis keeps texts for ticks that nobody sees."""
    drawn: list[Text] = []
    draw = Text.draw

    def record(text: Text, renderer: Any) -> None:
        drawn.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def clashes(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes overlap, texts beyond the figure's edge, and legends over axes."""
    found = []
    drawn = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in texts(figure)]
    for (a, first), (b, second) in itertools.combinations(drawn, 2):
        if first.overlaps(second):
            found.append((a, b))
    edge = figure.bbox.padded(1)
    found += [(a, "edge") for a, box in drawn if not (edge.contains(*box.min) and edge.contains(*box.max))]
    for legend, axis in itertools.product(figure.legends, figure.axes):
        if axis.get_visible() and legend.get_window_extent().overlaps(axis.get_window_extent()):
            found.append(("legend", axis.get_title()))
    return found


def make(method: str, budget: str = "w4g128", loss: float = 0.0, **settings_of_model: Any) -> Record:
    """A record of a method that loses `loss` nats in every sequence."""
    name = method.split()[0]
    bits = {"w2g128": 2.0, "w3g128": 3.0, "w4g128": 4.0, "w8channel": 8.0, "b2.5g128": 2.5, "b3g128": 3.0}[budget]
    model = {"name": "tiny", "outliers": {"channels": 0, "scale": 128.0, "seed": 0}} | settings_of_model
    cell = {
        "model": model,
        "data": {"name": "pydocs", "seed": 0},
        "method": {"name": name},
        "budget": {"name": budget, "bits": bits},
        "evaluation": {},
        "seed": 0,
    }
    nll = np.random.default_rng(7).normal(2.5, 0.3, 64) + loss
    nll += 0.01 * np.random.default_rng(len(method)).normal(size=64) * (name != "fp16")
    value = float(np.exp(nll.mean()))
    result = {
        "perplexity": {"value": value, "low": value * 0.9, "high": value * 1.1},
        "kl": {"value": loss + 1e-4, "low": (loss + 1e-4) * 0.9, "high": (loss + 1e-4) * 1.1},
        "nll": nll.tolist(),
        "tokens": 64,
        "length": 512,
        "effective_bits": 16.0 if name == "fp16" else bits + 0.15,
        "layers": layers(bits) if "mixed" in method or "hawq" in method else [],
    }
    labels = {"model": model["name"], "data": "pydocs", "method": method, "budget": "–" if name == "fp16" else budget}
    return Record(digest([cell, method]), "done", cell, labels, result=result, created="2026-01-01")


def layers(bits: float) -> list[dict[str, Any]]:
    """Sensitivity 10^block, in units of the place of the type; widths that differ by block."""
    return [
        {
            "name": f"model.layers.{block}.mlp.{kind}",
            "bits": int(bits) + block,
            "sensitivity": 10.0**block * (i + 1),
            "output_error": 0.1,
        }
        for block in range(BLOCKS)
        for i, kind in enumerate(TYPES)
    ]


def tidy(records: Iterable[Record]) -> tuple[pd.DataFrame, dict[str, style.Look]]:
    table = frame.build(records)
    looks = style.looks(dict(zip(table["method"], table["method_name"], strict=True)))
    return table[table["status"] == "done"], looks


def crowd(count: int) -> list[Record]:
    """As many methods, with long and hostile labels among them."""
    names = [*style.SEATS, *(f"mixed solver={i} metric=kfac rounding=gptq {HOSTILE}" for i in range(count))][:count]
    records = [make("fp16")]
    for i, name in enumerate(names):
        records += [make(name, b, loss) for b, loss in (("w2g128", 2 + i / 10), ("w3g128", 0.2), ("w4g128", 0.03))]
    return records


@pytest.mark.parametrize("count", [2, 30, pytest.param(60, marks=pytest.mark.slow)])
def test_no_text_covers_another_however_many_methods(count: int) -> None:
    table, looks = tidy(crowd(count))
    for draw in (pareto.pareto, pareto.divergence):
        figure = draw("a title that is long enough to need more than one line of the figure " * 2, table, looks)
        assert figure is not None
        assert clashes(figure) == []
        shown = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
        assert shown[:count] == [" ".join(name.split()) for name in looks]
        assert min(axis.get_window_extent().width for axis in figure.axes) > 300


def test_a_clash_is_seen() -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    assert clashes(figure) == []
    figure.text(0.5, 0.505, "other")
    assert clashes(figure) == [("one", "other")]
    figure.text(0.97, 0.1, "beyond the edge")
    assert ("beyond the edge", "edge") in clashes(figure)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(40, 160), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_undercuts(points: list[tuple[int, int]]) -> None:
    table = pd.DataFrame([(bits / 20, float(value)) for bits, value in points], columns=["effective_bits", "value"])
    found = set(pareto.front(table).itertuples(index=False, name=None))

    def beaten(bits: float, value: float) -> bool:
        return any(
            (v < value and b <= 1.025 * bits) or (v == value and b < bits)  # up to 2.5 % more bits compete
            for b, v in table.to_numpy()
        )

    assert found == {(b, v) for b, v in table.to_numpy() if not beaten(b, v)}


def test_a_group_index_decides_no_comparison() -> None:
    table = pd.DataFrame({"effective_bits": [4.125, 4.15625], "value": [11.0, 10.0]})
    assert list(pareto.front(table)["value"]) == [10.0]


def test_the_pareto_figure_draws_points_intervals_front_and_reference() -> None:
    table, looks = tidy([make("fp16"), make("rtn", "w3g128", 0.3), make("rtn", loss=0.1), make("gptq", loss=0.05)])
    figure = pareto.pareto("tiny", table, looks)
    assert figure is not None
    (axis,) = figure.axes
    reference, rows = table[table["reference"]].iloc[0], table[~table["reference"]].set_index(["method", "budget"])
    dotted = [line for line in axis.lines if line.get_label() == f"fp16 ({reference['perplexity']:.2f})"]
    assert list(dotted[0].get_ydata()) == pytest.approx([reference["perplexity"]] * 2)
    steps = next(line for line in axis.lines if line.get_drawstyle() == "steps-post")
    best = [rows.loc[("rtn", "w3g128"), "perplexity"], *[rows.loc[("gptq", "w4g128"), "perplexity"]] * 2]
    assert list(steps.get_ydata()) == pytest.approx(best)
    whiskers = [segment for c in axis.containers for line in c.lines[2] for segment in line.get_segments()]
    ends = np.sort([[low[1], high[1]] for low, high in whiskers], axis=0)
    expected = rows[["delta_low", "delta_high"]] + reference["perplexity"]
    assert ends == pytest.approx(np.sort(expected, axis=0))
    assert {line.get_color() for line in axis.lines} <= {*COLORS, INK, FAINT}


def test_heat_strips_show_each_sensitivity_above_its_bits() -> None:
    table, looks = tidy([make("fp16"), make("mixed", "b2.5g128"), make("mixed", "b3g128"), make("hawq_v2", "b3g128")])
    figure = strips.bits("tiny", table, looks)
    assert figure is not None
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["sensitivity", "b3g128", "sensitivity", "b2.5g128", "b3g128"]  # hawq_v2, then mixed
    assert [label.get_text() for label in axis.get_xticklabels()] == list(TYPES)
    meshes = [mesh for mesh in axis.collections if isinstance(mesh, QuadMesh)]
    assert len(meshes) == len(labels) * len(TYPES)
    first = [np.asarray(mesh.get_array()).ravel() for mesh in meshes[: len(labels)]]  # of q_proj
    assert first[0] == pytest.approx([1, 10, 100])
    assert first[1] == pytest.approx([3, 4, 5])
    assert first[3] == pytest.approx([2, 3, 4])
    tops = [mesh.get_coordinates()[0, 0, 1] for mesh in meshes[: len(labels)]]
    assert list(np.diff(tops)) == pytest.approx([1, 1 + strips.HEAD + strips.GAP, 1, 1])
    assert clashes(figure) == []


def test_sensitivity_is_colored_by_its_logarithm() -> None:
    table, looks = tidy([make("mixed", "b2.5g128")])
    figure = strips.bits("tiny", table, looks)
    assert figure is not None
    heat = figure.axes[0].collections[0]
    places = np.asarray(heat.norm([1.0, 10.0, 100.0]))  # of 1 … 700
    assert np.diff(places) == pytest.approx([1 / np.log10(700)] * 2, rel=1e-3)


def test_equal_widths_have_equal_colors_in_all_strips_and_the_legend() -> None:
    table, looks = tidy([make("mixed", "b2.5g128"), make("mixed", "b3g128")])
    figure = strips.bits("tiny", table, looks)
    assert figure is not None
    legend = figure.legends[0]
    entries = zip(legend.get_texts(), legend.get_patches(), strict=True)
    colors = {text.get_text(): to_hex(patch.get_facecolor()) for text, patch in entries}
    assert list(colors) == ["2 bits", "3 bits", "4 bits", "5 bits", "least sensitive", "most sensitive"]
    for mesh in figure.axes[0].collections:
        if mesh.cmap is not strips.HEAT:
            mesh.update_scalarmappable()
            shades = [to_hex(color) for color in mesh.get_facecolor()]
            assert shades == [colors[f"{width:g} bits"] for width in np.asarray(mesh.get_array()).ravel()]


def test_sensitivities_that_are_not_positive_stay_blank() -> None:
    record = make("mixed", "b3g128")
    for layer, value in zip(record.result["layers"], [-1.0, 0.0, None], strict=False):
        layer["sensitivity"] = value
    table, looks = tidy([record])
    figure = strips.bits("tiny", table, looks)
    assert figure is not None
    for mesh in figure.axes[0].collections[:6:2]:  # q, k and v: sensitivity, then bits
        mesh.update_scalarmappable()
        opacity = mesh.get_facecolor()[:, 3]
        assert list(opacity) == [0, 1, 1]


def test_without_sensitivities_there_are_bits_alone() -> None:
    record = make("mixed", "b3g128")
    for layer in record.result["layers"]:
        layer["sensitivity"] = None
    table, looks = tidy([record])
    figure = strips.bits("tiny", table, looks)
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["b3g128"]
    assert not any("sensitive" in text.get_text() for text in figure.legends[0].get_texts())


def planted(scale: float, name: str = "tiny_outliers", channels: int = 4) -> dict[str, Any]:
    return {"name": name, "outliers": {"channels": channels, "scale": scale, "seed": 0}}


def doses(budgets: Iterable[str] = ("w8channel",)) -> list[Record]:
    """Losses proportional to the magnitude; scale 128 without channels is magnitude 1."""
    records = []
    for magnitude in (1, 16, 128):
        model = planted(float(magnitude)) if magnitude > 1 else {}
        records.append(make("fp16", "w8channel", **model))
        for method, factor in (("rtn inputs=int8-token", 0.01), ("llm_int8", 0.001)):
            records += [make(method, budget, factor * magnitude, **model) for budget in budgets]
    return records


def test_dose_response_takes_the_magnitude_from_the_cell() -> None:
    table, looks = tidy(doses())
    ((section, figure),) = dose.dose_responses(table, looks)
    assert section == "tiny_outliers on pydocs with model.outliers.scale=16.0"
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "16", "128"]
    points = {container.lines[0].get_color(): container.lines[0].get_xydata() for container in axis.containers}
    for method, factor in (("rtn inputs=int8-token", 0.01), ("llm_int8", 0.001)):
        xy = points[looks[method].color]
        assert xy[:, 0] == pytest.approx([1, 16, 128], rel=dose.ASIDE)
        assert xy[:, 1] == pytest.approx([factor, 16 * factor, 128 * factor], abs=0.004)
    low, high = axis.get_ylim()
    assert low < 0 < 1.28 < high
    assert clashes(figure) == []


def test_dose_response_draws_intervals_and_a_panel_a_budget() -> None:
    table, looks = tidy(doses(("w4g128", "w8channel", "w2g128", "w3g128")))
    ((_, figure),) = dose.dose_responses(table, looks)
    shown = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert shown == ["w2g128", "w3g128", "w4g128", "w8channel"]
    rows = table[(table["budget"] == "w2g128") & (table["method"] == "llm_int8")]
    segments = figure.axes[0].containers[1].lines[2][0].get_segments()
    ends = np.sort([[low[1], high[1]] for low, high in segments], axis=0)
    assert ends == pytest.approx(np.sort(rows[["delta_nll_low", "delta_nll_high"]], axis=0))
    assert clashes(figure) == []


def test_dose_response_needs_two_magnitudes_of_one_model() -> None:
    table, looks = tidy([make("fp16", **planted(64.0)), make("rtn", **planted(64.0))])
    assert list(dose.dose_responses(table, looks)) == []
    other = planted(64.0, "tiny_outliers") | {"path": "elsewhere"}
    table, looks = tidy([make("fp16"), make("rtn"), make("fp16", **other), make("rtn", **other)])
    assert list(dose.dose_responses(table, looks)) == []


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = [make("fp16"), make("mixed", "b3g128", 0.1), make("gptq", "w4g128", 0.05)]
    first = figures.write(tidy(records)[0], tmp_path / "a")
    second = figures.write(tidy(reversed(records))[0], tmp_path / "b")
    kinds = ("pareto", "kl", "bits")
    assert [path.name for path in first] == [f"{kind}_tiny.{end}" for kind in kinds for end in ("png", "svg", "pdf")]
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()


def test_doses_are_written_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stems: list[str] = []
    monkeypatch.setattr(figures, "save", lambda figure, stem: stems.append(stem.name) or [stem])
    figures.write(tidy(doses())[0], Path("folder"), "x_")
    assert [stem for stem in stems if "dose" in stem] == ["x_dose_tiny_outliers"]


def test_only_figures_of_the_kinds_asked_for_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    stems: list[str] = []
    monkeypatch.setattr(figures, "save", lambda figure, stem: stems.append(stem.name) or [stem])
    figures.write(tidy(doses())[0], Path("folder"), kinds=["dose"])
    assert stems == ["dose_tiny_outliers"]
    with pytest.raises(ValueError, match="there is no figure 'pie'"):
        figures.write(tidy(doses())[0], Path("folder"), kinds=["pie"])


def test_a_legend_names_each_label_once() -> None:
    figure = Figure()
    axis = figure.add_subplot()
    handles = [axis.plot([0], [i])[0] for i in range(3)]
    layout.legend(figure, handles, ["b", "a", "b"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a"]
    empty = Figure()
    layout.legend(empty, [], [])
    assert empty.legends == []


def test_many_variants_of_one_method_look_different() -> None:
    labels = {f"mixed solver={i}": "mixed" for i in range(12)} | {f"hawq_v2 {i}": "hawq_v2" for i in range(8)}
    labels |= {f"teq {i}": "teq" for i in range(8)}  # whose seat has the color of hawq_v2
    found = style.looks(labels)
    assert len(set(found.values())) == len(labels)
    assert len({found[f"mixed solver={i}"].color for i in range(12)}) == len(COLORS)
    huge = style.looks({f"mixed {i}": "mixed" for i in range(style.WAYS + 5)})
    assert len(huge) == style.WAYS + 5


def lightness(color: str) -> float:
    """Of a pixel, 0 to 1, by the sRGB definition."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colors_are_those_that_color_blind_readers_tell_apart() -> None:
    okabe_ito = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"}
    assert set(COLORS) <= okabe_ito
    assert {look.color for look in style.VERDICTS.values()} <= okabe_ito | {FAINT}
    assert len({(look.marker, look.filled) for look in style.VERDICTS.values()}) == len(style.VERDICTS)
    assert lightness(INK) < lightness(FAINT) < 0.5


def test_labels_break_and_take_columns() -> None:
    assert layout.broken("a" * 90, 40).split("\n") == ["a" * 40, "a" * 40, "a" * 10]
    one, many = layout.legend_room(["label"] * 10), layout.legend_room(["label"] * 100)
    assert many[0] == pytest.approx(3 * one[0])
    assert layout.legend_room([]) == (0, 0)


def test_cost_scaling_is_log_log_with_a_slope_of_one_beside_it() -> None:
    sizes = {"1M": 1e6, "4M": 4e6, "16M": 16e6}
    rows = [
        {
            "row": name,
            "length": length,
            "size": size,
            "parameters": parameters,
            "status": "measured",
            "seconds": factor * (parameters / 1e6) ** power,
            "seconds_low": 0.9 * factor * (parameters / 1e6) ** power,
            "seconds_high": 1.2 * factor * (parameters / 1e6) ** power,
            "extra_bytes": parameters * 8,
        }
        for name, factor, power in (("forward", 0.1, 1.3), ("gptq", 1.0, 1.0), ("a_metric_of_a_long_name", 3.0, 2.0))
        for length in (128, 512)
        for size, parameters in sizes.items()
    ]
    figure = bench.cost_against_size(pd.DataFrame(rows), "Costs: " + json.dumps(HOSTILE))
    assert {(axis.get_xscale(), axis.get_yscale()) for axis in figure.axes} == {("log", "log")}
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    slope = {name: np.polyfit(*np.log(lines[name].get_xydata().T), 1)[0] for name in (bench.PROPORTIONAL, "gptq")}
    assert slope == pytest.approx({bench.PROPORTIONAL: 1.0, "gptq": 1.0})
    assert lines[bench.PROPORTIONAL].get_ydata()[0] == pytest.approx(0.1)
    assert lines["gptq"].get_color() == style.looks({"gptq": "gptq"})["gptq"].color
    assert clashes(figure) == []
