"""The main job as a user sees it: sweeps resume, faults become records, and equal cells give equal numbers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.cell import Cell
from harness.config import RunConfig
from harness.data import DataConfig
from harness.evaluate import EvalConfig
from harness.models import ModelConfig
from harness.records import DONE, FAILED, SKIPPED, Store
from harness.worker import Runner
from harness.workers import Worker
from methods.base import METHODS, Budget, discover

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama and a text."""
    path = tmp_path_factory.mktemp("model")
    sentences = [f"the {a} number {i} is {b} than the {a} number {i + 1}." for i in range(400) for a, b in _WORDS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in sentences))
    return path


_WORDS = [("odd", "smaller"), ("even", "greater")]


def make_cell(folder: Path, method: str = "rtn", **options: object) -> Cell:
    discover()
    return Cell(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(
            name="text",
            path=str(folder / "text.jsonl"),
            length=32,
            calibration_sequences=4,
            scoring_sequences=2,
            test_sequences=4,
        ),
        method=METHODS[method](**options),
        budget=Budget(bits=4, group_size=16),
        evaluation=EvalConfig(),
    )


def run_config(tmp_path: Path, **options: object) -> RunConfig:
    return RunConfig(results=str(tmp_path / "runs"), cache=str(tmp_path / "cache"), **options)


def arguments(folder: Path, tmp_path: Path) -> list[str]:
    return [
        "model=local",
        f"model.path={folder}",
        "data=text",
        f"data.path={folder}/text.jsonl",
        "data.length=32",
        "data.calibration_sequences=4",
        "data.scoring_sequences=2",
        "data.test_sequences=4",
        f"run.results={tmp_path}/runs",
        f"run.cache={tmp_path}/cache",
        "tracking=disabled",
    ]


def harness(*arguments: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        **options,
    )


def test_a_cell_gives_one_complete_record(folder, tmp_path):
    record = Runner().run(make_cell(folder), run_config(tmp_path))
    assert record.status == DONE, record.reason
    assert Store(tmp_path / "runs").read(record.key) == record
    result = record.result
    assert result["perplexity"]["low"] < result["perplexity"]["value"] < result["perplexity"]["high"]
    assert 4 < result["effective_bits"] < 6
    assert len(result["layers"]) == 14
    assert all(0 < layer["output_error"] < 0.1 for layer in result["layers"])
    assert set(record.cost["seconds"]) == {"load", "statistics", "quantize", "evaluate", "total"}
    assert record.cost["peak_bytes"] > 10**7
    assert record.environment["packages"]["torch"]


def test_the_same_cell_gives_the_same_numbers_with_and_without_cache(folder, tmp_path):
    """Everything but the cost and the time is equal; also between a warm session and a new one."""
    cell, runner = make_cell(folder, "gptq"), Runner()
    first = runner.run(cell, run_config(tmp_path / "a"))
    warm = runner.run(cell, run_config(tmp_path / "a"))
    fresh = Runner().run(cell, run_config(tmp_path / "b"))
    assert first.status == DONE, first.reason
    assert first.result == warm.result == fresh.result
    assert first.key == fresh.key


def test_what_determines_numbers_determines_the_key(folder):
    cell = make_cell(folder)
    others = [
        make_cell(folder, clip=True),
        make_cell(folder, "gptq"),
        Cell(**{**vars(make_cell(folder)), "seed": 1}),
        Cell(**{**vars(make_cell(folder)), "budget": Budget(bits=3, group_size=16)}),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 5
    assert cell.key == make_cell(folder).key
    assert "budget" in cell.labels and make_cell(folder, "fp16").labels["budget"] == "–"


def test_a_refusal_is_a_skipped_record_with_the_reason(folder, tmp_path):
    cell = Cell(**{**vars(make_cell(folder)), "budget": Budget(effective_bits=3.5, group_size=16)})
    record = Runner().run(cell, run_config(tmp_path))
    assert record.status == SKIPPED
    assert "uniform widths cannot meet a bound of 3.5 effective bits" in str(record.reason)


def test_only_a_method_that_chooses_widths_must_keep_its_budget(folder, tmp_path, monkeypatch):
    """GPTQ's group index is more than the format stores: said in a note. A plan over its budget is a failure."""
    record = Runner().run(make_cell(folder, "gptq", act_order=True), run_config(tmp_path))
    assert record.status == DONE
    assert "over the" in record.result["notes"][0]

    def spend_more(self, ctx):
        return METHODS["rtn"]().quantize(dataclasses.replace(ctx, budget=Budget(bits=8, group_size=16)))

    monkeypatch.setattr(METHODS["hawq_v2"], "quantize", spend_more)
    record = Runner().run(make_cell(folder, "hawq_v2"), run_config(tmp_path))
    assert record.status == FAILED
    assert "over the" in str(record.reason)


def test_a_fault_in_a_cell_is_a_failed_record_and_the_next_cell_runs(folder, tmp_path, monkeypatch):
    runner = Runner()
    monkeypatch.setattr(METHODS["rtn"], "quantize", lambda self, ctx: 1 / 0)
    record = runner.run(make_cell(folder), run_config(tmp_path))
    assert (record.status, record.reason) == (FAILED, "ZeroDivisionError: division by zero")
    assert runner.run(make_cell(folder, "fp16"), run_config(tmp_path)).status == DONE


def test_a_killed_worker_is_a_failed_record_and_the_next_cell_runs(folder, tmp_path):
    worker = Worker()

    def kill(event: dict) -> None:
        if event.get("phase") == "quantize":
            os.kill(worker._process.pid, signal.SIGKILL)

    record = worker.run(make_cell(folder), run_config(tmp_path), kill)
    assert record.status == FAILED
    assert "worker ended with code -9" in str(record.reason)
    assert worker.run(make_cell(folder), run_config(tmp_path)).status == DONE
    worker.close()


def test_a_hanging_worker_is_stopped_at_the_time_limit(folder, tmp_path):
    worker = Worker()
    record = worker.run(make_cell(folder), run_config(tmp_path, time_limit=0.0001))
    assert record.status == FAILED
    assert "time limit" in str(record.reason)
    assert worker._process is None


def test_a_sweep_resumes_and_one_failure_does_not_end_it(folder, tmp_path):
    options = [*arguments(folder, tmp_path), "budget=w3g16,w4g16"]
    first = harness("-m", "method=rtn", *options)
    assert first.returncode == 0, first.stderr
    assert "2 cells: 2 done" in first.stderr
    second = harness("-m", "method=rtn,gptq", *options)
    assert "4 cells: 4 done (2 were there already)" in second.stderr
    # A torn record is computed again.
    victim = sorted((tmp_path / "runs").glob("*.json"))[0]
    victim.write_text(victim.read_text()[:100])
    third = harness("-m", "method=rtn,gptq", *options)
    assert "unreadable" in third.stderr
    assert "4 cells: 4 done (3 were there already)" in third.stderr


def test_failures_are_all_listed_and_retried(folder, tmp_path):
    options = ["-m", *arguments(folder, tmp_path), "method=rtn,fp16", "budget=w4g16"]
    failing = harness(*options, "run.time_limit=0.0001")
    assert failing.returncode == 1
    assert failing.stderr.count("time limit") >= 4  # each failure where it happens and again in the summary
    assert "2 cells: 2 failed" in failing.stderr
    assert harness(*options).returncode == 0


def test_a_killed_sweep_loses_no_finished_cell(folder, tmp_path):
    options = ["-m", *arguments(folder, tmp_path), "method=rtn,gptq", "budget=w2g16,w3g16,w4g16,w8g16"]
    store = Store(tmp_path / "runs")
    sweep = subprocess.Popen([sys.executable, "-m", "harness", *options], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while len(store.all()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    finished = {record.key: record for record in store.all()}
    assert 3 <= len(finished) < 8
    again = harness(*options)
    assert "8 cells: 8 done" in again.stderr
    assert int(again.stderr.split("done (")[1].split(" were")[0]) >= len(finished)
    assert all(store.read(key) == record for key, record in finished.items())


def test_force_computes_again(folder, tmp_path):
    options = [*arguments(folder, tmp_path), "method=rtn", "budget=w4g16"]
    harness(*options)
    assert "had it" in harness(*options).stderr
    assert "had it" not in harness(*options, "force=true").stderr
