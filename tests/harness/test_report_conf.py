"""Tests of conf/table: descriptions are typed and complete, and committed CSV files become tables as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from harness.report import builder, frame, spec, tables
from harness.report.sources import Material

CONF = spec.FOLDER.parent


def test_every_description_is_read_and_says_where_it_comes_from() -> None:
    assert {"comparison", "activations", "mixed", "cost", "kernels", "toolchains", "reported"} <= {*spec.names()}
    for name in spec.names():
        assert spec.load(name).title


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("title: x\ncolums: []", "colums"),
        ("title: x\nfigures: 1", "wrong.yaml: Invalid value assigned"),
        ("title: x\nsource: disk", "source=disk is none of records"),
        ("title: x\nvalues: [{head: a, value: b, form: roman}]", "form=roman is none of"),
    ],
)
def test_a_wrong_description_is_one_sentence(content: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(ValueError, match=error):
        spec.load("wrong", tmp_path)
    with pytest.raises(ValueError, match="table=other is none of wrong"):
        spec.load("other", tmp_path)


def test_a_description_starts_from_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("title: a\nlegend: b\nwhere: {method: x, seed: 0}")
    (tmp_path / "own.yaml").write_text("defaults: [base, _self_]\ntitle: c\nwhere: {method: y}")
    own = spec.load("own", tmp_path)
    assert (own.title, own.legend, own.where) == ("c", "b", {"method": "y", "seed": 0})


def test_the_comparison_shows_what_its_experiment_runs() -> None:
    from hydra import compose, initialize_config_dir

    from harness.config import named_budgets, register_configs, to_cell

    register_configs()
    params = yaml.safe_load((CONF / "experiment" / "default.yaml").read_text())["hydra"]["sweeper"]["params"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        methods = [to_cell(compose("config", [f"method={m}"])).labels["method"] for m in params["method"].split(",")]
    budgets = [named_budgets()[name].name for name in params["budget"].split(",")]
    where = spec.load("comparison").where
    assert sorted(where["method"]) == sorted(set(methods) - {"fp16"})
    assert sorted(where["budget"]) == sorted(budgets)
    lengths = {yaml.safe_load(path.read_text()).get("calibration_sequences", 64) for path in CONF.glob("data/*.yaml")}
    assert lengths <= {*where["data.calibration_sequences"]}


def test_csv_files_become_tables_as_they_are(tmp_path: Path) -> None:
    material = Material(frame.tidy([]), tmp_path)
    audit = spec.load("toolchains")
    assert "no file toolchain_audit.csv" in tables.markdown(builder.build(audit, material))
    assert "Not run." in tables.markdown(builder.build(audit, material))
    (tmp_path / "toolchain_audit.csv").write_text("# a chip\nname,µs,ok\na#b,1.25,True\nc,,False\n")
    table = builder.build(audit, material)
    assert (table.displays[0].title, table.displays[0].heads) == ("toolchain_audit", ["name", "µs", "ok"])
    assert table.displays[0].cells == [["a#b", "1.250", "True"], ["c", "", "False"]]
    (tmp_path / "toolchain_audit.csv").write_text("")
    with pytest.raises(ValueError, match="is no table"):
        builder.build(audit, material)


def test_costs_by_size_have_a_column_a_size(tmp_path: Path) -> None:
    rows = "row,length,size,seconds,extra_bytes\nrtn,128,1M,0.5,2e6\nrtn,128,4M,1.5,\ngptq,128,1M,,\n"
    (tmp_path / "bench_quantize.csv").write_text(f"# chip\n{rows}")
    table = builder.build(spec.load("cost_by_size"), Material(frame.tidy([]), tmp_path))
    (shown,) = table.displays
    assert (shown.title, shown.groups) == ("bench_quantize, length 128", ["", "1M", "1M", "4M", "4M"])
    assert shown.cells == [["rtn", "0.500", "2.0", "1.500", "–"], ["gptq", "–", "–", "–", "–"]]


def test_no_table_overwrites_what_another_reads() -> None:
    read = {pattern for name in spec.names() for pattern in spec.load(name).options.get("files", [])}
    assert not [name for name in spec.names() for pattern in read if Path(f"{name}.csv").match(pattern)]
