"""Tests of harness.tracking: offline runs are read back from wandb's own files."""

from __future__ import annotations

import json
import logging
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from harness import tracking
from harness.records import Record, Store
from harness.tracking import ledger
from harness.tracking.__main__ import SyncConfig, sync

HEADER, BLOCK, CHUNK_HEADER = 7, 32768, 7
"""Bytes that name the file's kind, of a block, and before each chunk in it."""
WHOLE, LAST = 1, 4
"""Kinds of chunk that end a record."""


def make(status: str = "done", reason: str | None = None, key: str = "ab" * 32) -> Record:
    labels = {"model": "tiny", "data": "pydocs", "method": "hawq_v2 rounding=gptq", "budget": "w4g128"}
    cell = {
        "model": {"name": "tiny", "path": None},
        "data": {"name": "pydocs", "length": 512},
        "method": {"name": "hawq_v2", "rounding": "gptq"},
        "budget": {"name": "w4g128", "bits": 4},
        "evaluation": {"tasks": []},
        "seed": 3,
    }
    layers = [
        {"name": f"model.layers.{i}.mlp.up_proj", "bits": 4, "output_error": 0.25, "sensitivity": None}
        for i in range(1000)
    ]
    result = {
        "perplexity": {"value": 12.5, "low": 12.0, "high": 13.0},
        "kl": {"value": 0.125, "low": 0.1, "high": 0.15},
        "effective_bits": 4.25,
        "layers": layers,
        "tasks": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.25}},
    }
    cost = {"seconds": {"quantize": 1.5}, "peak_bytes": 1000}
    return Record(key, status, cell, labels, reason, result if status == "done" else {}, cost)


def read(folder: Path, identity: str = "*") -> list[Any]:
    """Every protobuf record of the one offline run in `folder`, which wandb's service writes in its own time."""
    (file,) = folder.glob(f"wandb/offline-run-*/run-{identity}.wandb")
    for _ in range(600):
        records = list(parse(file.read_bytes()))
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} was not finished within a minute")


def parse(data: bytes) -> Iterator[Any]:
    """The records in LevelDB's log format: blocks of chunks, each with a checksum, a size and a kind."""
    position, parts = HEADER, b""
    while position + CHUNK_HEADER <= len(data):
        if BLOCK - position % BLOCK < CHUNK_HEADER:  # the tail of a block, too short for a chunk, is padding
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        position += CHUNK_HEADER + size
        parts += data[position - size : position]
        if kind in (WHOLE, LAST) and position <= len(data):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def updates(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def summary(records: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records:
        found |= updates(record.summary.update)
    return found


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """wandb keeps staged tables in the user's folders unless told otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    assert tracking.log_record(make(), mode="offline", group="default", directory=folder)
    return folder


def test_the_offline_run_is_the_record(run: Path) -> None:
    records = read(run)
    (started,) = (record.run for record in records if record.HasField("run"))
    assert started.run_id == "ab" * 32
    assert (started.project, started.run_group, started.job_type) == ("hawq-bench", "default", "cell")
    assert started.display_name == "tiny/hawq_v2 rounding=gptq/w4g128"
    assert set(started.tags) == {"tiny", "hawq_v2 rounding=gptq", "w4g128"}
    config = updates(started.config.update)
    assert (config["method.rounding"], config["method_label"]) == ("gptq", "hawq_v2 rounding=gptq")
    assert (config["budget.bits"], config["data.length"], config["seed"]) == (4, 512, 3)


def test_the_summary_has_metrics_bits_and_cost(run: Path) -> None:
    found = summary(read(run))
    expected = {
        "status": "done",
        "perplexity": 12.5,
        "perplexity_low": 12.0,
        "kl": 0.125,
        "effective_bits": 4.25,
        "arc_easy.acc": 0.5,
        "arc_easy.acc_stderr": 0.25,
        "seconds_quantize": 1.5,
        "peak_bytes": 1000,
    }
    assert {name: found[name] for name in expected} == expected
    assert "top1" not in found


def test_the_layer_table_has_every_layer(run: Path) -> None:
    assert summary(read(run))["layers.nrows"] == 1000
    (file,) = run.glob("wandb/offline-run-*/files/media/table/*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["name", "bits", "output_error", "sensitivity"]
    assert table["data"][7] == ["model.layers.7.mlp.up_proj", 4, 0.25, None]


def test_nothing_personal_is_logged(run: Path) -> None:
    records = read(run)
    text = "".join(str(record.run) + str(record.environment) for record in records)
    assert f'host: "{socket.gethostname()}"' not in text
    assert str(Path(__file__).parents[2]) not in text


def test_a_failed_cell_is_a_failed_run(tmp_path: Path) -> None:
    assert tracking.log_record(make("failed", "out of memory"), mode="offline", group="g", directory=tmp_path)
    records = read(tmp_path)
    found = summary(records)
    assert (found["status"], found["reason"]) == ("failed", "out of memory")
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


def test_pictures_and_tables_of_a_report_are_one_run(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    picture, table, other = tmp_path / "pareto.png", tmp_path / "comparison.csv", tmp_path / "pareto.svg"
    Figure(figsize=(1, 1)).savefig(picture)
    table.write_text("method,perplexity,reason\nrtn,12.5,\ngptq,,singular\n")
    assert tracking.log_figures([picture, table, other], mode="offline", group="g", directory=tmp_path)
    records = read(tmp_path)
    (started,) = (record.run for record in records if record.HasField("run"))
    assert (started.job_type, started.display_name) == ("report", "g/report")
    found = summary(records)
    assert found["pareto._type"] == "image-file"
    assert (found["comparison._type"], found["comparison.nrows"]) == ("table-file", 2)
    assert tracking.log_figures([table, picture], mode="offline", group="g", directory=tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def artifacts(records: list[Any]) -> dict[tuple[str, str], dict[str, bytes]]:
    """The files of every artifact that a run logged, by the artifact's type and name."""
    logged = [record.request.log_artifact.artifact for record in records if record.HasField("request")]
    logged += [record.artifact for record in records if record.HasField("artifact")]
    return {
        (one.type, one.name): {entry.path: Path(entry.local_path).read_bytes() for entry in one.manifest.contents}
        for one in logged
        if one.type != "run_table"  # what wandb itself makes of each table
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two records, of which one was mirrored before, and of results; both mirrored by `sync`."""
    from matplotlib.figure import Figure

    records, folder = tmp_path_factory.mktemp("records"), tmp_path_factory.mktemp("results")
    for record in (make(), make("failed", "out of memory", "cd" * 32)):
        Store(records).write(record)
    ledger.note(records, "ab" * 32, "allocators", None)
    for part in ("tables", "figures"):
        (folder / part).mkdir()
    Figure(figsize=(1, 1)).savefig(folder / "figures" / "pareto.png")
    (folder / "figures" / "pareto.svg").write_text("<svg/>")
    (folder / "tables" / "comparison.csv").write_text("method,perplexity\nrtn,12.5\n")
    (folder / "tables" / "comparison.tex").write_text("rtn & 12.5")
    (folder / "tables" / "claims.csv").write_text("claim,verdict,effect\nC1,holds,1.5\nC2,not run,\n")
    assert sync(SyncConfig(records=str(records), folder=str(folder), group="my results", mode="offline")) == (2, 2)
    return records, folder


def report_of(records: Path) -> list[Any]:
    cells = {"ab" * 32, "cd" * 32}
    (identity,) = {path.stem for path in (records / "wandb" / "ledger").glob("*.json")} - cells
    return read(records, identity)


def test_every_cell_is_a_run_in_the_group_of_its_sweep(results: tuple[Path, Path]) -> None:
    records, _ = results
    started = {key: next(r.run for r in read(records, key) if r.HasField("run")) for key in ("ab" * 32, "cd" * 32)}
    assert {key: run.run_group for key, run in started.items()} == {"ab" * 32: "allocators", "cd" * 32: "my results"}
    assert {run.job_type for run in started.values()} == {"cell"}


def test_claims_and_figures_are_tables_and_media(results: tuple[Path, Path]) -> None:
    records, folder = results
    found = summary(report_of(records))
    assert (found["claims._type"], found["claims.nrows"]) == ("table-file", 2)
    assert (found["comparison._type"], found["pareto._type"]) == ("table-file", "image-file")
    (claims,) = records.glob("wandb/offline-run-*/files/media/table/claims_*.json")
    assert json.loads(claims.read_text())["columns"] == ["claim", "verdict", "effect"]
    assert json.loads(claims.read_text())["data"] == [["C1", "holds", 1.5], ["C2", "not run", None]]
    (picture,) = records.glob("wandb/offline-run-*/files/media/images/pareto_*.png")
    assert picture.read_bytes() == (folder / "figures" / "pareto.png").read_bytes()


def test_tables_and_records_are_artifacts(results: tuple[Path, Path]) -> None:
    records, folder = results
    found = artifacts(report_of(records))
    assert set(found) == {("tables", "tables"), ("records", "records-my-results")}
    assert found["tables", "tables"] == {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
    assert found["records", "records-my-results"] == {path.name: path.read_bytes() for path in records.glob("*.json")}


def test_the_claims_beside_a_reports_tables_are_shown(tmp_path: Path, results: tuple[Path, Path]) -> None:
    _, folder = results
    page = tmp_path / "index.html"
    page.write_text("<p>page</p>")
    paths = [folder / "tables" / "comparison.csv", page]
    assert tracking.log_figures(paths, mode="offline", group="g", directory=tmp_path)
    found = summary(read(tmp_path))
    assert (found["claims._type"], found["index._type"]) == ("table-file", "html-file")


class Server:
    """Stands in for wandb online: what would have been sent."""

    def __init__(self, refuse: str | None = None) -> None:
        self.runs: list[tuple[str, str]] = []
        self.refuse = refuse

    def init(self, **options: Any) -> Any:
        if options["id"] == self.refuse:
            raise wandb.errors.UsageError("no key")
        self.runs.append((options["id"][:2], options["group"]))
        return MagicMock()


def test_what_the_server_has_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SyncConfig(records=str(tmp_path), folder=str(tmp_path / "results"), group="late")
    table = tmp_path / "results" / "tables" / "comparison.csv"
    table.parent.mkdir(parents=True)
    table.write_text("method\nrtn\n")
    store = Store(tmp_path)
    for key in ("aa", "bb"):
        store.write(make(key=key * 32))
    ledger.note(tmp_path, "bb" * 32, "early", None)  # a sweep mirrored it offline

    def send(server: Server) -> tuple[int, int]:
        monkeypatch.setattr(wandb, "init", server.init)
        return sync(config)

    refusing = Server(refuse="bb" * 32)
    with pytest.raises(ValueError, match="log in with `wandb login`, and call this again"):
        send(refusing)
    assert refusing.runs == [("aa", "late")]
    first, again, changed = Server(), Server(), Server()
    assert send(first) == (1, 2)
    assert first.runs[0] == ("bb", "early") and [group for _, group in first.runs] == ["early", "late"]
    assert send(again) == (0, 2)
    assert again.runs == []
    store.write(replace(make(key="bb" * 32), cost={"seconds": {"quantize": 2.5}}))
    assert send(changed) == (1, 2)
    assert changed.runs[0] == ("bb", "early")


@pytest.mark.parametrize("error", [wandb.errors.CommError("no route"), OSError("disk full")])
def test_a_failing_wandb_is_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        assert not tracking.log_record(make(), mode="offline", group="g", directory=tmp_path)
    assert str(error) in caplog.text


def test_disabled_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", None)
    assert tracking.log_record(make(), mode="disabled", group="g", directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()
