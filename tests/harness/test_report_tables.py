"""Tests of the tables that conf/table describes: what they select, take together and mark; and of their files."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness.intervals import paired_difference
from harness.records import Record, digest
from harness.report import builder, frame, report_all, selection, spec, standing
from harness.report.sources import REPORTED, Material

HOSTILE = r"a_b $x^2$ & 50% #1 {y} \z ~ <b>|*c*|</b> [l](u) `d` ½µ"

QUICK = {"kl": False}


def make(
    method: str = "rtn",
    budget: str = "w4g128",
    loss: float = 0.1,
    seed: int = 0,
    data_seed: int = 0,
    evaluation: dict[str, Any] | None = None,
    tasks: dict[str, Any] | None = None,
    layers: list[dict[str, Any]] | None = None,
    model: str = "tiny",
    **options: Any,
) -> Record:
    """A record of 32 windows that lose `loss` nats and noise of 0.02 against fp16."""
    name, bits = method.split()[0], float(budget[1 : budget.index("g")])
    reference = name == "fp16"
    noise = np.random.default_rng(sum(f"{method}{seed}{data_seed}".encode())).normal(0, 0 if reference else 0.02, 32)
    nll = np.linspace(2, 3, 32) + (0 if reference else loss) + noise - noise.mean()
    uniform = budget.startswith("w")
    cell = {
        "model": {"name": model},
        "data": {"name": "pydocs", "length": 512, "calibration_sequences": 32, "seed": data_seed},
        "method": {"name": name, **options},
        "budget": {"bits": int(bits) if uniform else None, "effective_bits": None if uniform else bits,
                   "group_size": 128},
        "evaluation": {"kl": True, "tasks": [], **(evaluation or {})},
        "seed": seed,
    }  # fmt: skip
    value = math.exp(nll.mean())
    result = {
        "perplexity": {"value": value, "low": value - 1, "high": value + 1},
        "nll": nll.tolist(),
        "tokens": 32 * 511,
        "length": 512,
        "effective_bits": 16.0 if reference else bits + 0.125,
        "tasks": tasks or {},
        "layers": layers or [],
    }
    labels = {"model": model, "data": "pydocs", "method": method, "budget": "–" if reference else budget}
    cost = {"seconds": {"quantize": 2.0 * bits}, "peak_bytes": int(1e9 * bits)}
    return Record(
        digest([cell, method]), "done", cell, labels, None, result, cost, {"git": "abc"}, "2026-01-01T00:00:00"
    )


def built(name: str, records: list[Record], **changes: Any) -> builder.Built:
    return builder.build(replace(spec.load(name), **changes), Material(frame.tidy(records)))


def column(table: builder.Built, head: str, section: int = 0) -> list[str]:
    shown = table.displays[section]
    return [row[shown.heads.index(head)] for row in shown.cells]


def test_another_table_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nkeys: [{head: M, value: method}]\nvalues: [{head: P, value: perplexity, form: figures}]"
    )
    table = builder.build(spec.load("mine", tmp_path), Material(frame.tidy([make("fp16"), make("rtn", loss=1.0)])))
    assert column(table, "M") == ["fp16", "rtn"]
    assert column(table, "P") == [f"{math.exp(2.5):.2f}", f"{math.exp(3.5):.2f}"]


def test_the_comparison_leaves_out_other_seeds_evaluations_and_plans() -> None:
    plans = [make("mixed solver=random", "b3.25g128", seed=i, solver="random") for i in range(5)]
    quick = make("gptq", evaluation={"kl": False})
    seeds = [make("rtn", seed=1), make("rtn", data_seed=1), make("gptq", data_seed=2)]
    table = built("comparison", [make("fp16"), make("rtn"), make("gptq"), quick, *plans, *seeds])
    assert len(table.displays) == 1
    assert column(table, "Method") == ["fp16", "rtn", "gptq"]


def test_conditions_are_patterns_values_lists_and_exclusions() -> None:
    table = frame.tidy([make("rtn", seed=i) for i in range(4)] + [make("gptq inputs=int8-token", inputs="int8-token")])

    def seeds(**where: Any) -> list[int]:
        return sorted(selection.select(table, where)["seed"])

    assert seeds(method="rtn") == [0, 1, 2, 3]
    assert seeds(seed=[1, 3]) == [1, 3]
    assert seeds(**{"method.inputs": None}) == [0, 1, 2, 3]
    assert seeds(inputs="?*") == [0]
    assert seeds(method=["*", "!gptq*"], seed=0) == [0]
    assert seeds(**{"evaluation.kl": False}) == []
    with pytest.raises(ValueError, match="metod"):
        selection.select(table, {"metod": "rtn"})


def test_vectorized_intervals_are_those_of_the_harness() -> None:
    rows = np.random.default_rng(3).normal(0.1, 1, (700, 20))  # more than one chunk
    found = standing.paired(rows)
    for i in (0, 511, 512, 699):
        known = paired_difference(rows[i].tolist(), np.zeros(20).tolist())
        assert found[i] == pytest.approx([known.value, known.low, known.high], rel=1e-12)


def test_seeds_are_taken_together() -> None:
    records = [
        make("mixed solver=random", "b3g128", 0.1 * i, i, evaluation=QUICK, solver="random", metric="kfac")
        for i in range(3)
    ]
    table = built("mixed", [make("fp16", evaluation=QUICK), *records])
    values = np.exp(2.5 + 0.1 * np.arange(3))
    assert column(table, "Perplexity ↓") == [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"]
    assert table.displays[0].title == f"tiny on pydocs (fp16: {math.exp(2.5):.2f} ± 1.00)"
    (row,) = table.rows[~table.rows["reference"]].to_dict("records")
    assert row["cells"] == 3
    assert row["delta_nll"] == pytest.approx(0.1)  # of the mean over seeds, window by window


def test_allocators_meet_metrics_at_equal_bits() -> None:
    def plan(solver: str, metric: str, loss: float, rounding: str = "nearest") -> Record:
        label = f"mixed solver={solver} metric={metric} rounding={rounding}"
        return make(label, "b3g128", loss, evaluation=QUICK, solver=solver, metric=metric, rounding=rounding)

    records = [
        plan("ilp", "kfac", 0.3),
        plan("ilp", "hawq_v2", 0.1),
        plan("greedy", "kfac", 0.5),
        plan("ilp", "kfac", 0.4, "gptq"),
    ]
    table = built("mixed", [make("fp16", evaluation=QUICK), *records])
    shown = table.displays[0]
    assert shown.groups == ["", "", "", "hawq_v2", "kfac"] or shown.groups == ["", "", "", "kfac", "hawq_v2"]
    cells = {tuple(row[:3]): dict(zip(shown.groups[3:], row[3:], strict=True)) for row in shown.cells}
    assert cells["b3g128", "greedy", "nearest"] == {"kfac": f"{math.exp(3.0):.2f} ± 1.00", "hawq_v2": "–"}
    assert cells["b3g128", "ilp", "gptq"]["kfac"].startswith(f"{math.exp(2.9):.2f}")
    best = [(row[1], group) for row, marks in zip(shown.cells, shown.marks, strict=True)
            for group, mark in zip(shown.groups, marks, strict=True) if mark]  # fmt: skip
    assert best == [("ilp", "hawq_v2")]  # one block over all columns


def test_no_row_hides_another() -> None:
    """Two methods with the same keys stand on two lines."""
    records = [make("rtn", loss=0.1), make("rtn clip=true", loss=0.2)]
    table = built("comparison", records, where={}, keys=[spec.Column("Budget", "budget")], complete=False)
    assert len(table.displays[0].cells) == 2


def test_precision_is_that_of_weights_and_inputs() -> None:
    measured = [{"input_bits": 8}, {"input_bits": None}]
    records = [
        make("rtn inputs=int8-token", "w8g128", inputs="int8-token"),
        make("rtn format=fp8 inputs=fp8-token", "w8g128", inputs="fp8-token", format="fp8"),
        make("gptq inputs=int8-token", "w4g128", inputs="int8-token"),
        make("awq inputs=fp8-static", "w4g128", inputs="fp8-static"),
        make("llm_int8", "w8g128", layers=measured),  # says it by its result alone
        make("rtn format=nvfp4 inputs=nvfp4", "w4g128", inputs="nvfp4", format="nvfp4"),
        make("rtn", "w8g128"),
    ]
    table = built("activations", [make("fp16"), *records])
    shown = dict(zip(column(table, "Method"), column(table, "Precision"), strict=True))
    assert shown == {
        "fp16": "",
        "rtn inputs=int8-token": "W8A8",
        "rtn format=fp8 inputs=fp8-token": "FP8",
        "gptq inputs=int8-token": "W4A8",
        "awq inputs=fp8-static": "W4A8",
        "llm_int8": "W8A8",
        "rtn format=nvfp4 inputs=nvfp4": "FP4",
    }


def test_tasks_have_columns_with_standard_errors() -> None:
    tasks = {"piqa": {"acc": 0.75, "acc_stderr": 0.012}, "arc_easy": {"acc": 0.5, "acc_stderr": 0.009}}
    table = built("comparison", [make("fp16", tasks=tasks), make("rtn", tasks=tasks), make("gptq")])
    assert column(table, "piqa % ↑") == ["75.0 ± 1.2", "75.0 ± 1.2", ""]
    assert column(table, "arc_easy % ↑")[1] == "50.0 ± 0.9"
    assert column(table, "Tasks % ↑")[1] == "62.5 ± 0.8"  # √(1.2² + 0.9²) / 2 = 0.75
    assert "Tasks % ↑" not in built("comparison", [make("fp16"), make("rtn")]).displays[0].heads


def test_costs_are_taken_together_over_budgets() -> None:
    records = [make("rtn", f"w{bits}g128", data_seed=seed) for bits in (2, 3, 8) for seed in (0, 1)]
    table = built("cost", [make("fp16"), *records])
    row = dict(zip(table.displays[0].heads, table.displays[0].cells[1], strict=True))
    assert row == {
        "Method": "rtn",
        "Cells": "6",
        "Median s": "6.000",
        "Least and most s": "4.000 – 16.00",
        "Peak GB": "8.00",
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tables, of hostile records and committed files alike, without figures."""
    folder = tmp_path_factory.mktemp("all")
    write_all(folder, hostile_records())
    return folder


def hostile_records() -> list[Record]:
    tasks = {HOSTILE: {"acc": 0.75, "acc_stderr": 0.01}}
    found = [make("fp16", model=HOSTILE), make("rtn", model=HOSTILE, tasks=tasks), make("gptq", model=HOSTILE)]
    found += [make(f"rtn {HOSTILE}", "w8g128", model=HOSTILE, inputs="int8-token")]
    found += [make(f"mixed solver={HOSTILE}", "b3g128", 0.1 * i, i, model=HOSTILE, solver="ilp", metric=m)
              for i in range(2) for m in ("kfac", HOSTILE)]  # fmt: skip
    failed = replace(make("awq", model=HOSTILE), status="failed", reason=f"{HOSTILE}\nline", result={})
    return [*found, failed]


KERNELS = "out,in,tokens,kernel,peer,ms,gb_per_s,of_read,error"


def write_all(folder: Path, records: list[Record]) -> list[Path]:
    (folder / "measured").mkdir()
    (folder / "measured" / "kernels_a.csv").write_text(f'{KERNELS}\n1,2,3,"{HOSTILE}",,1.5,1,1,1\n')
    material = Material(frame.tidy(records), folder / "measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.figures.write", lambda *_: [])
        return report_all(material, spec.names(), folder, Console(file=io.StringIO()))


def test_the_same_records_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = write_all(tmp_path, hostile_records()[::-1])
    assert {path.suffix for path in again} == {".md", ".tex", ".csv"}
    assert len(again) == 3 * len(spec.names())
    for path in again:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes(), path.name


def test_every_csv_is_read_again(written: Path) -> None:
    for path in (written / "tables").glob("*.csv"):
        assert len(pd.read_csv(path).columns) > 0
    assert pd.read_csv(written / "tables" / "toolchains.csv")["status"].tolist() == ["not run"]


def test_markdown_has_no_html_and_whole_rows(written: Path) -> None:
    for path in (written / "tables").glob("*.md"):
        text = path.read_text()
        assert "<b>" not in text
        for block in text.split("\n\n"):
            rows = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1, path.name


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_every_table_compiles(written: Path, tmp_path: Path) -> None:
    sources = sorted((written / "tables").glob("*.tex"))
    assert len(sources) == len(spec.names())
    for source in sources:
        assert source.read_text().isascii()
        body = source.read_text().replace("\\end{tabular}", "\\end{tabular}%")
        head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}\tiny"
        (tmp_path / source.name).write_text(f"{head}\n{body}\n\\end{{document}}\n")
        run = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", source.name]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, done.stdout[-2000:]


def test_published_figures_are_shown_and_ours_are_not_run(written: Path) -> None:
    text = (written / "tables" / "reported.md").read_text()
    assert "## llama-2-7b, dataset wikitext2/2048" in text
    assert "not run" in text
    assert REPORTED.is_file()


def test_the_first_key_is_the_block_in_which_rows_compete() -> None:
    """Two budgets of one precision."""
    records = [make("gptq", "w4g128", 0.3, inputs="int8-token"), make("awq", "w4g64", 0.1, inputs="int8-token")]
    shown = built("activations", [make("fp16"), *records]).displays[0]
    (best,) = (row for row, marks in zip(shown.cells, shown.marks, strict=True) if any(marks))
    assert best[2] == "awq"
