"""Cells of tools that misbehave: each fails with the reason, and the sweep goes on with the next cell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness import session
from harness.cell import Cell
from harness.config import RunConfig
from harness.data import DataConfig
from harness.evaluate import EvalConfig
from harness.models import ModelConfig
from harness.records import DONE, FAILED, Record, Store
from harness.toolchains.service import ToolRunner
from harness.worker import Runner
from methods.base import Budget, Method
from methods.network import Network
from methods.rtn import RTN
from methods.toolchains.base import Toolchain

ROOT = Path(__file__).parents[2]
LENGTH = 32

FAULTS = {
    "crash": "ended with code 1; its last lines: .*the tool fell over",
    "die": "ended with code -9",
    "leave": "ended well but left no readable answer",
    "skip": "returned nothing for .*q_proj",
    "shape": r"returned .*q_proj as \[63, 64\], not \(64, 64\)",
    "nan": "returned NaN or infinity in .*q_proj/weight",
    "scales": r"tool_faulty, .*q_proj: scales of shape \[64, 3\] are not 64 rows of 4 groups",
    "lie": "tool_faulty, .*q_proj: its weights do not lie on the 4-bit grid that it claims",
}
"""What a tool does, and what the record of its cell says."""

ADAPTER = '''
"""A tool that misbehaves when told to."""
from dataclasses import dataclass
from typing import ClassVar
from methods.base import register
from methods.toolchains.base import Toolchain

IMPORTS = ()

@register("tool_faulty")
@dataclass(frozen=True)
class Faulty(Toolchain):
    fault: str = "none"
    requirements: ClassVar[tuple[str, ...]] = ()

    def settings(self, budget):
        return {"bits": budget.bits, "group_size": budget.group_size, "fault": self.fault}

def run(model, work, settings):
    from pathlib import Path
    fault(settings["fault"], Path(work.folder).parents[1])
    weights = {name: model.get_parameter(f"{name}.weight").detach().numpy() for name in work.linears}
    import torch
    return {key: torch.from_numpy(value) for key, value in rounded(weights, settings).items()}
'''

BEHAVIOUR = '''
import os, signal, time
import numpy as np

def fault(kind, folder):
    """What goes wrong before there is an answer. A tool that hangs says in a file who it is."""
    if kind == "crash":
        raise RuntimeError("the tool fell over")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "leave":
        os._exit(0)
    if kind == "hang":
        (folder / "hanging").write_text(str(os.getpid()))
        time.sleep(300)

def rounded(weights, settings):
    """Nearest points of a symmetric grid, and what goes wrong in them."""
    answer, top, size = {}, 2 ** (settings["bits"] - 1) - 1, settings["group_size"]
    for name, weight in weights.items():
        groups = weight.reshape(len(weight), -1, size)
        scale = (np.abs(groups).max(2) / top).astype(np.float16).astype(np.float32)
        snapped = np.clip(np.rint(groups / scale[..., None]), -top, top) * scale[..., None]
        answer[f"{name}/weight"], answer[f"{name}/scale"] = snapped.reshape(weight.shape), scale
    name, kind = next(iter(weights)), settings["fault"]
    if kind == "skip":
        del answer[f"{name}/weight"]
    if kind == "shape":
        answer[f"{name}/weight"] = answer[f"{name}/weight"][1:].copy()
    if kind == "nan":
        answer[f"{name}/weight"][0, 0] = np.nan
    if kind == "scales":
        answer[f"{name}/scale"] = answer[f"{name}/scale"][:, :3].copy()
    if kind == "lie":
        answer[f"{name}/weight"] *= 1.37
    return answer
'''

INTERPRETER = f"""#!{sys.executable}
# In place of a tool's interpreter: the same files, without the seconds that torch takes to import.
{BEHAVIOUR}
import json, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file

job = Path(sys.argv[2])
task = json.loads((job / "job.json").read_text())
fault(task["settings"]["fault"], job.parent)
model = load_file(job / "model" / "model.safetensors")
answer = rounded({{name: model[name + ".weight"] for name in task["linears"]}}, task["settings"])
save_file(answer, job / "answer.safetensors")
(job / "answer.json").write_text(json.dumps({{"seconds": 1.5, "peak_bytes": 2**20}}))
"""


@dataclass(frozen=True)
class Faulty(Toolchain):
    """The adapter, where no other process must know it."""

    fault: str = "none"
    name: ClassVar[str] = "tool_faulty"
    requirements: ClassVar[tuple[str, ...]] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        return ("methods.toolchains.base",)

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {"bits": budget.bits, "group_size": budget.group_size, "fault": self.fault}


@pytest.fixture
def folder(small_llama: Callable[..., Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random Llama, a text, and an environment for the tool; temporary files beside them."""
    model: Any = small_llama(intermediate_size=128).model
    model.save_pretrained(tmp_path / "model")
    words = {"<s>": 0} | {str(i): i for i in range(1, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(tmp_path / "model")
    lines = [" ".join(str(1 + (i * j + j // 7) % 95) for j in range(40)) for i in range(1, 60)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    environment = tmp_path / "toolchains" / "faulty"
    (environment / "bin").mkdir(parents=True)
    (environment / "requirements.json").write_text("[]")
    (environment / "bin" / "python").write_text(INTERPRETER)
    (environment / "bin" / "python").chmod(0o755)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Method], Record]:
    """Runs cells one after the other as a worker does."""
    monkeypatch.setattr(Faulty, "__module__", "methods.toolchains.faulty")
    runner, settings = Runner(), RunConfig(**where(folder))
    data = DataConfig(name="text", path=str(folder / "text.jsonl"), **SIZES)
    model = ModelConfig(path=str(folder / "model"))
    return lambda method: runner.run(Cell(model, data, method, Budget(bits=4, group_size=16), EvalConfig()), settings)


SIZES: dict[str, Any] = {
    "length": LENGTH,
    "calibration_sequences": 4,
    "scoring_sequences": 2,
    "test_sequences": 4,
}


def where(folder: Path) -> dict[str, Any]:
    return {name: str(folder / name) for name in ("results", "cache", "toolchains")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_tool_is_a_failed_cell_and_the_next_one_runs(
    run: Callable[[Method], Record], folder: Path, fault: str
) -> None:
    record = run(Faulty(fault))
    assert record.status == FAILED
    assert not record.result
    assert says(record, FAULTS[fault]), record.reason
    assert "Error" not in str(record.reason).split(";")[0]  # a sentence, not an exception that nobody expected
    assert Store(folder / "results").read(record.key) == record
    assert run(RTN()).status == DONE
    assert not list((folder / "temporary").iterdir())


def test_without_fault_the_tool_is_charged_what_it_says(run: Callable[[Method], Record]) -> None:
    record = run(Faulty())
    assert record.status == DONE, record.reason
    assert record.result["effective_bits"] == 5
    assert record.cost["seconds"]["quantize"] == 1.5
    assert record.cost["quantize_peak_bytes"] == 2**20


def test_a_tool_that_hangs_is_stopped_and_the_next_cell_runs(
    run: Callable[[Method], Record], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ToolRunner", partial(ToolRunner, minutes=0.02))
    record = run(Faulty("hang"))
    assert record.status == FAILED
    assert says(record, r"faulty was stopped after 0\.02 minutes")
    assert not alive(int((folder / "temporary" / "hanging").read_text()))
    assert run(RTN()).status == DONE


def says(record: Record, pattern: str) -> bool:
    return re.search(pattern, record.reason or "") is not None


def alive(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def sweep(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m harness` in a tree of links to the project that has the tool, too."""
    project = folder / "project"
    (project / "methods").mkdir(parents=True)
    for linked in (*map(ROOT.joinpath, ("harness", "kernels", "conf")), *(ROOT / "methods").iterdir()):
        (project / linked.relative_to(ROOT)).symlink_to(linked)
    (project / "methods" / "toolchains").unlink()
    shutil.copytree(ROOT / "methods" / "toolchains", project / "methods" / "toolchains")
    (project / "methods" / "toolchains" / "faulty.py").write_text(ADAPTER + BEHAVIOUR)

    def harness(*arguments: str) -> subprocess.CompletedProcess[str]:
        options = [
            *(f"run.{name}={path}" for name, path in where(folder).items()),
            *(f"data.{name}={value}" for name, value in SIZES.items()),
            *("model=local", f"model.path={folder / 'model'}", "data=text", f"data.path={folder / 'text.jsonl'}"),
            *("budget=w4g16", "tracking=disabled", "run.threads=1"),
        ]
        command = [sys.executable, "-m", "harness", "-m", *arguments, *options]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=1800)

    return harness


def records(folder: Path) -> dict[str, Record]:
    return {str(r.cell["method"].get("fault", r.labels["method"])): r for r in Store(folder / "results").all()}


def test_a_sweep_goes_on_after_a_tool_that_fails(
    sweep: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    done = sweep("method=tool_faulty", "method.fault=crash,none")
    assert done.returncode == 1, done.stderr
    assert "2 cells: 1 done, 1 failed" in done.stderr
    assert done.stderr.count("ended with code 1") == 2  # where it happened, and in the summary
    found = records(folder)
    assert found["crash"].status == FAILED
    assert says(found["crash"], FAULTS["crash"])
    assert found["none"].status == DONE


@pytest.mark.slow
def test_every_fault_in_one_sweep_of_real_processes(
    sweep: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    shutil.rmtree(folder / "toolchains")
    done = sweep("method=tool_faulty", f"method.fault={','.join(FAULTS)},none")
    found = records(folder)
    assert done.returncode == 1, done.stderr
    assert f"{len(FAULTS) + 1} cells: 1 done, {len(FAULTS)} failed" in done.stderr
    for fault, sentence in FAULTS.items():
        assert found[fault].status == FAILED
        assert says(found[fault], sentence), found[fault].reason
    assert found["none"].status == DONE
    assert not list((folder / "temporary").iterdir())


@pytest.mark.slow
def test_a_tool_does_not_outlive_the_cell_that_its_time_limit_ends(
    sweep: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    shutil.rmtree(folder / "toolchains")
    done = sweep("method=tool_faulty", "method.fault=hang,none", "run.time_limit=1")
    found = records(folder)
    assert done.returncode == 1, done.stderr
    assert says(found["hang"], r"stopped after the time limit of 1 minutes, in phase 'quantize'")
    assert found["none"].status == DONE
    assert not alive(int((folder / "temporary" / "hanging").read_text()))
