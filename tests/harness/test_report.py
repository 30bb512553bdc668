"""Tests of harness.report on synthetic records whose differences are known."""

from __future__ import annotations

import io
import itertools
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness.records import Record, Store, digest
from harness.report import builder, figures, forms, frame, spec, standing, style, terminal
from harness.report import report as write_report
from harness.report.__main__ import ReportConfig, main
from harness.report.sources import Material

BEST, TIED = standing.BEST, standing.TIED
HOSTILE = r"a_b $x^2$ & 50% #1 {y} \z ~ <b>|*c*|</b> [l](u) `d`"
LAYERS = [f"model.layers.{i}.{kind}" for i in range(8) for kind in ("self_attn.q_proj", "mlp.up_proj")]
BITS = {"w2g128": 2, "w3g128": 3, "w4g128": 4, "w8g128": 8, "b3.25g128": 3.25}
# Nats that a method loses at a width of b bits: factor * 4^-b.
FACTOR = {
    "rtn": 40.0,
    "gptq": 9.0,
    "awq": 10.0,
    "hawq_v1": 34.0,
    "hawq_v2": 30.0,
    "hawq_v2 rounding=gptq": 6.0,
}


def make(
    method: str = "rtn",
    budget: str = "w4g128",
    status: str = "done",
    loss: float = 0.0,
    noise: float = 0.001,
    reason: str | None = None,
    model: str = "tiny",
    seed: int = 0,
    created: str = "2026-01-01T00:00:00+00:00",
    **data: Any,
) -> Record:
    """A record whose sequences lose `loss` nats against fp16, with `noise` from sequence to sequence."""
    name = method.split()[0]
    bits = BITS.get(budget, 16)
    cell = {
        "model": {"name": model, "path": None},
        "data": {"name": "pydocs", "length": 512, "calibration_sequences": 64, "seed": seed, **data},
        "method": {"name": name},
        "budget": {"name": budget, "bits": bits if budget.startswith("w") else None, "effective_bits": bits},
        "evaluation": {"tasks": [], "kl": True},
        "seed": seed,
    }
    labels = {"model": model, "data": "pydocs", "method": method, "budget": "–" if name == "fp16" else budget}
    record = Record(
        digest([cell, method, created]),
        status,
        cell,
        labels,
        reason,
        created=created,
        environment={"git": "abc123"},
    )
    return replace(record, result=result(method, bits, loss, noise), cost=COST) if status == "done" else record


COST = {
    "seconds": {"load": 1.0, "statistics": 2.0, "quantize": 3.25, "evaluate": 4.0, "total": 10.0},
    "peak_bytes": 2**30,
}


def result(method: str, bits: float, loss: float, noise: float) -> dict[str, Any]:
    common = np.random.default_rng(7).normal(2.5, 0.3, 64)
    own = np.random.default_rng(sum(method.encode()) + int(bits * 100)).normal(0, 1, 64)
    nll = common + loss + noise * (own - own.mean())
    value = math.exp(nll.mean())
    kl = max(loss, 1e-6) * 0.8
    mixed = bits != int(bits)
    return {
        "perplexity": {"value": value, "low": value * 0.93, "high": value * 1.07},
        "word_perplexity": value**2,
        "kl": None if method == "fp16" else {"value": kl, "low": kl * 0.9, "high": kl * 1.1},
        "top1": None if method == "fp16" else {"value": 0.9, "low": 0.88, "high": 0.92},
        "nll": nll.tolist(),
        "tokens": 64 * 511,
        "length": 512,
        "effective_bits": bits if method == "fp16" or mixed else bits + 0.25,
        "linear_bytes": int(bits * 1e6),
        "model_bytes": int(bits * 1e6) + 10**6,
        "embedding_bytes": 10**6,
        "head_bytes": 0,
        "layers": [
            {
                "name": n,
                "bits": (2 if i % 3 else 8) if mixed else bits,
                "effective_bits": bits,
                "output_error": 0.01,
                "sensitivity": None,
            }
            for i, n in enumerate(LAYERS)
        ],
        "tasks": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.01}},
        "notes": [],
    }


@pytest.fixture(scope="module")
def sweep() -> list[Record]:
    """A full sweep: methods × budgets, with one failure, skips for the mixed budget, and a gap."""
    records = [make("fp16", "–")]
    for method, factor in FACTOR.items():
        for budget, bits in BITS.items():
            if budget == "b3.25g128" and not method.startswith("hawq"):
                records.append(make(method, budget, "skipped", reason="uniform widths cannot meet a bound"))
            elif (method, budget) == ("hawq_v1", "w2g128"):
                records.append(make(method, budget, "failed", reason=f"the Hessian of\n{HOSTILE} is singular"))
            elif (method, budget) != ("hawq_v1", "w8g128"):
                records.append(make(method, budget, loss=factor * 4.0**-bits))
    return records


@pytest.fixture(scope="module")
def tidy(sweep: list[Record]) -> pd.DataFrame:
    return frame.build(sweep)


def comparison(records: list[Record]) -> builder.Built:
    """The main comparison, of all these records."""
    table = replace(spec.load("comparison"), where={})
    return builder.build(table, Material(frame.tidy(records)))


def calibrated(record: Record, seed: int) -> Record:
    """The record as it were with other calibration text."""
    cell = {**record.cell, "data": {**record.cell["data"], "seed": seed}}
    return replace(record, cell=cell, key=digest([record.key, seed]))


def pick(table: pd.DataFrame, method: str, budget: str) -> pd.Series:
    (row,) = (r for _, r in table.iterrows() if (r["method"], r["budget"]) == (method, budget))
    return row


def test_every_record_is_a_row_and_gaps_are_typed(tidy: pd.DataFrame) -> None:
    assert tidy["status"].value_counts().to_dict() == {"done": 26, "skipped": 3, "failed": 1, "not run": 1}
    assert pick(tidy, "hawq_v1", "w8g128")["status"] == frame.NOT_RUN
    assert tidy["method"].iloc[0] == "fp16"
    assert list(tidy["nominal_bits"])[1:] == sorted(tidy["nominal_bits"][1:])


def test_the_latest_record_counts() -> None:
    old = make("rtn", loss=1.0)
    new = make("rtn", status="failed", reason="out of memory", created="2026-02-01T00:00:00+00:00")
    for records in ([old, new], [new, old]):
        (row,) = frame.build(records).to_dict("records")
        assert (row["status"], row["reason"]) == ("failed", "out of memory")


def test_a_failed_reference_does_not_replace_one_that_is_done() -> None:
    done, later = make("fp16", "w4g128"), make("fp16", "w2g128", "failed", reason="x", created="2027", seed=1)
    (row,) = frame.build([later, done]).to_dict("records")
    assert row["status"] == "done"


def test_seeds_stay_apart_and_are_not_sections() -> None:
    table = frame.build([make("rtn", seed=seed) for seed in range(3)])
    assert list(table["seed"]) == [0, 1, 2]
    assert table["section"].nunique() == 1
    assert "Seed" in comparison([make("rtn", seed=seed) for seed in range(3)]).displays[0].heads


def test_calibration_seeds_stay_apart() -> None:
    """Records that differ in the calibration text alone do not replace one another."""
    records = [calibrated(make("rtn"), seed) for seed in (2, 0, 1)]
    table = frame.build(records)
    assert list(table["data_seed"]) == [0, 1, 2]
    shown = comparison(records).displays[0]
    assert [row[shown.heads.index("Text seed")] for row in shown.cells] == ["0", "1", "2"]


def test_cells_of_other_windows_stand_in_another_section() -> None:
    table = frame.build([make("rtn"), make("rtn", length=256), make("rtn", model="other")])
    assert sorted(table["section"]) == [
        "other on pydocs",
        "tiny on pydocs with data.length=256",
        "tiny on pydocs with data.length=512",
    ]
    assert len(set(frame.slugs(table).values())) == 3


def test_slugs_of_different_models_differ_and_are_file_names() -> None:
    slugs = frame.slugs(frame.build([make(model=name) for name in ("a/b", "a b", "../x", HOSTILE, "///")]))
    assert len(set(slugs.values())) == 5
    assert all(re.fullmatch(r"[\w.-]+", slug) and not slug.startswith(".") for slug in slugs.values())


def test_delta_is_the_paired_difference_from_fp16(tidy: pd.DataFrame) -> None:
    reference, row = tidy.iloc[0], pick(tidy, "gptq", "w4g128")
    loss = 9.0 * 4.0**-4
    assert row["delta_nll"] == pytest.approx(loss)
    assert row["delta"] == pytest.approx(row["perplexity"] - reference["perplexity"])
    # Paired, the interval is that of the noise of 0.001 nats; unpaired, that of the 0.3 between sequences.
    half = (row["delta_nll_high"] - row["delta_nll_low"]) / 2
    assert half == pytest.approx(1.96 * 0.001 / 8, rel=0.35)
    assert math.isnan(reference["delta"])


def test_other_sequences_are_not_compared() -> None:
    short = make("rtn", loss=0.1)
    short = replace(short, result={**short.result, "nll": short.result["nll"][:10], "tokens": 10 * 511})
    table = frame.build([make("fp16"), short, make("gptq", loss=0.2)])
    assert math.isnan(pick(table, "rtn", "w4g128")["delta"])
    assert set(table["standing"]) == {""}


def test_best_and_tied_rest_on_paired_intervals() -> None:
    records = [
        make("rtn", loss=0.1),
        make("gptq", loss=0.05, noise=0.01),
        make("awq", loss=0.0501, noise=0.01),
    ]
    table = frame.build(records)
    standing = dict(zip(table["method"], table["standing"], strict=True))
    assert standing == {"rtn": "", "gptq": BEST, "awq": TIED}
    alone = frame.build(records[:1])
    assert list(alone["standing"]) == [""]


def test_who_stores_more_than_the_budget_does_not_compete() -> None:
    def stored(method: str, loss: float, bits: float) -> Record:
        record = make(method, loss=loss)
        return replace(record, result={**record.result, "effective_bits": bits, "limit_bits": 4.0})

    records = [stored("rtn", 0.1, 4.0), stored("gptq", 0.05, 4.09), stored("awq", 0.01, 4.11)]
    table = frame.build(records)
    standing = dict(zip(table["method"], table["standing"], strict=True))
    assert standing == {"rtn": "", "gptq": BEST, "awq": ""}


def test_no_records_is_an_error() -> None:
    with pytest.raises(ValueError, match="no records"):
        frame.build([])


def show(built: builder.Built, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    terminal.show(built, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_table_fits_and_says_what_failed(sweep: list[Record]) -> None:
    built = comparison(sweep)
    text = show(built)
    assert max(map(len, text.splitlines())) <= 120
    (shown,) = built.displays
    assert all(cell in text for row in shown.cells for cell in row[shown.keys :])  # no number is cut or wrapped
    lines = [line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0] in BITS]
    assert lines == ["w2g128", "w3g128", "b3.25g128", "w4g128", "w8g128"]  # each names its block once
    sentence = " ".join(text.split())
    assert f"hawq_v1 at w2g128 failed: the Hessian of {HOSTILE} is singular" in sentence
    assert "rtn, gptq, awq at b3.25g128 skipped: uniform widths cannot meet a bound" in sentence
    assert "26 done, 3 skipped, 1 failed, 1 not run" in sentence


def test_the_terminal_table_fits_with_seeds_and_huge_numbers() -> None:
    records = [make("fp16", model=HOSTILE)]
    records += [make("hawq_v2 rounding=gptq", loss=loss, seed=i, model=HOSTILE) for i, loss in enumerate((0.0, 5, 9))]
    built = comparison(records)
    text = show(built)
    assert max(map(len, text.splitlines())) <= 125  # with two columns of seeds and one of a task
    assert all(cell in text for row in built.displays[0].cells for cell in row[built.displays[0].keys :])
    assert f"{11.415056 * math.exp(9):.0f} ± " in text
    assert HOSTILE in text


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [
        (11.4151, 0.8, "11.42 ± 0.80"),
        (127.649, 0.048, "127.65 ± 0.05"),
        (4.1, 0.2, "4.100 ± 0.200"),
        (23456.7, 89.0, "23457 ± 89"),
        (1234567.0, 1e5, "1.2e6 ± 1.0e5"),
        (0.0, 0.0, "0.000 ± 0.000"),
    ],
)
def test_value_and_half_width_have_the_same_digits(value: float, half: float, expected: str) -> None:
    row = {"perplexity": value, "perplexity_low": value - half, "perplexity_high": value + half}
    assert forms.FORMS["interval"].text(row, "perplexity") == expected


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures() -> Iterator[None]:
    """A twentieth of the pixels, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.FIGURE, "savefig.dpi", 45)
        yield


@pytest.fixture(scope="module")
def written(sweep: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    hostile = [make("fp16", model=HOSTILE), make("rtn", model=HOSTILE, loss=0.1)]
    paths = write_report([*sweep, *hostile], folder, Console(file=io.StringIO()))
    assert all(path.is_file() for path in paths)
    return folder


def test_the_same_records_give_the_same_bytes(sweep: list[Record], written: Path, tmp_path: Path) -> None:
    hostile = [make("rtn", model=HOSTILE, loss=0.1), make("fp16", model=HOSTILE)]
    again = write_report([*hostile, *reversed(sweep)], tmp_path, Console(file=io.StringIO()))
    names = {path.name for path in again if path.suffix in (".md", ".tex", ".csv")}
    assert names == {f"{name}.{end}" for name in ("comparison", "failures") for end in ("md", "tex", "csv")}
    for path in again:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes(), path.name


def test_a_part_of_the_records_has_tables_of_its_own(sweep: list[Record], tmp_path: Path) -> None:
    labels = {"method": "r*", "budget": "w3*"}
    paths = write_report(sweep, tmp_path, Console(file=io.StringIO()), "part", labels)
    assert {path.name for path in paths if path.suffix == ".md"} == {"part.md", "part_failures.md"}
    assert all(path.name.startswith("part") for path in paths)
    rows = [line for line in (tmp_path / "tables/part.md").read_text().splitlines() if line.startswith("| ")]
    assert all("fp16" in row or "w3g128" in row for row in rows[1:])
    assert {row.split("|")[2].strip() for row in rows[1:]} == {"fp16", "rtn"}


def test_markdown_marks_the_best_and_escapes(written: Path) -> None:
    text = (written / "tables/comparison.md").read_text()
    assert text.startswith("<!-- Made by python -m harness.report from 32 records; newest 2026-01-01")
    assert "git abc123" in text
    rows = [line for line in text.splitlines() if line.startswith("| w3g128")]
    assert len(rows) == 6
    assert ["**" in row for row in rows] == [False] * 5 + [True]
    assert "<b>" not in text
    # Every row of a table has the same number of cells, whatever stands in it.
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_csv_has_every_row_in_full_precision(written: Path, tidy: pd.DataFrame) -> None:
    table = pd.read_csv(written / "tables/comparison.csv", keep_default_na=False)
    table = table[table["model"] == "tiny"]
    assert len(table) == len(tidy)
    row, known = pick(table, "gptq", "w4g128"), pick(tidy, "gptq", "w4g128")
    for name in ("perplexity", "perplexity_low", "delta_nll_high", "arc_easy.acc"):
        assert float(row[name]) == pytest.approx(known[name], rel=1e-14)
    assert (row["key"], row["status"]) == (known["key"], "done")
    assert "singular" in pick(table, "hawq_v1", "w2g128")["reason"]


def test_latex_is_balanced_and_escaped(written: Path) -> None:
    text = (written / "tables/comparison.tex").read_text()
    assert text.isascii()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 3  # two sections and one of notes
    bare = re.sub(r"\\[\\{}$&#%_]", "", body)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[#_^~]", re.sub(r"\\(begin|end)\{.*", "", bare))
    (first,) = (part for part in body.split(r"\end{tabular}") if "tiny on pydocs" in part)
    for line in (line for line in first.splitlines() if line.endswith(r"\\")):
        width = sum(int(n) - 1 for n in re.findall(r"multicolumn\{(\d+)\}", line))
        assert len(re.findall(r"(?<!\\)&", line)) + width == 11
    assert first.count(r"\midrule") == 6  # after the head, after fp16, and between five budgets
    assert "cline" not in text
    assert r"\textbf{\underline{" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(written: Path, tmp_path: Path) -> None:
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}\small"
    table = (written / "tables/comparison.tex").read_text()
    (tmp_path / "page.tex").write_text(f"{head}\n{table}\n\\end{{document}}\n")
    run = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_failures_are_listed(written: Path, tmp_path: Path) -> None:
    failures = pd.read_csv(written / "tables/failures.csv")
    assert list(failures["method"]) == ["hawq_v1"]
    assert "singular" in (written / "tables/failures.md").read_text()
    write_report([make(), make("fp16")], tmp_path, Console(file=io.StringIO()))
    assert "No cell failed." in (tmp_path / "tables/failures.md").read_text()


def test_figures_are_large_enough_and_carry_text(written: Path) -> None:
    names = {path.name for path in (written / "figures").iterdir()}
    assert {f"{kind}_tiny.{end}" for kind in ("pareto", "kl", "bits") for end in ("png", "svg")} <= names
    svg = (written / "figures/pareto_tiny.svg").read_text()
    assert ">hawq_v2 rounding=gptq</text>" in svg
    assert "<dc:date>" not in svg
    (hostile,) = (written / "figures").glob("pareto_a_b*.svg")
    assert "a_b $x^2$ &amp; 50% #1" in hostile.read_text()


def shown_points(figure: Any) -> list[tuple[Any, float]]:
    """Each finite value that an error bar marks, with the axes in whose limits it lies."""
    found = []
    for axis in figure.axes:
        low, high = axis.get_ylim()
        for container in axis.containers:
            found += [(axis, y) for y in np.atleast_1d(container.lines[0].get_ydata()) if low <= y <= high]
    return found


@pytest.mark.parametrize("worst", [0.5, 2.0, 5.0, 14.0])
def test_the_pareto_plot_shows_every_point_and_keeps_the_good_ones_apart(worst: float) -> None:
    records = [make("fp16"), make("rtn", "w2g128", loss=worst), make("gptq", "w2g128", loss=worst / 2)]
    records += [make("rtn", "w4g128", loss=0.05), make("gptq", "w4g128", loss=0.02)]
    table = frame.build(records)
    looks = style.looks({"rtn": "rtn", "gptq": "gptq"})
    figure = figures.pareto("tiny", table[table["status"] == "done"], looks)
    assert figure is not None
    points = shown_points(figure)
    assert sorted(y for _, y in points) == pytest.approx(sorted(table["perplexity"][1:]))
    low, high = figure.axes[-1].get_ylim()
    assert high / low < 8  # the panel in which methods are compared spans less than a decade
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["rtn", "gptq", "fp16 (11.42)"]


def test_a_legend_covers_no_axes(tidy: pd.DataFrame) -> None:
    looks = style.looks(dict(zip(tidy["method"], tidy["method_name"], strict=True)))
    with matplotlib.rc_context(style.FIGURE):
        for draw in (figures.pareto, figures.divergence, figures.bits):
            figure = draw("a title", tidy[tidy["status"] == "done"], looks)
            assert figure is not None
            figure.savefig(io.BytesIO(), format="png")
            legend = figure.legends[0].get_window_extent()
            assert not any(legend.overlaps(axis.get_window_extent()) for axis in figure.axes)
            boxes = [text.get_window_extent() for axis in figure.axes for text in axis.get_xticklabels()]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_looks_are_stable_and_distinct() -> None:
    few = style.looks({"gptq": "gptq", "fp16": "fp16"})
    many = style.looks({name: name.split()[0] for name in (*FACTOR, "aaa", "zzz", "hawq_v2 act_order")})
    assert few["gptq"] == many["gptq"]
    assert len(set(many.values())) == len(many)
    assert many["hawq_v2"].color == many["hawq_v2 rounding=gptq"].color
    names = [f"m{i:02}" for i in range(42)]
    assert len(set(style.looks({n: n for n in names}).values())) == 42


def test_layers_are_grouped_by_type() -> None:
    assert list(figures.by_type(LAYERS)) == ["q_proj", "up_proj"]
    gpt2 = [f"transformer.h.{i}.{kind}" for i in range(2) for kind in ("attn.c_proj", "mlp.c_proj")]
    assert figures.by_type(gpt2) == {"attn.c_proj": gpt2[::2], "mlp.c_proj": gpt2[1::2]}


def test_the_command_reports_a_store_with_failures_and_succeeds(sweep: list[Record], tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for record in sweep[:8]:
        store.write(record)
    command = [sys.executable, "-m", "harness.report", f"records={store.folder}", f"folder={tmp_path}/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "11.42 ± 0.80" in done.stdout
    assert (tmp_path / "out/tables/comparison.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}  # Hydra leaves nothing behind


def test_an_empty_store_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no records"):
        main(ReportConfig(records=str(tmp_path), folder=str(tmp_path)))
