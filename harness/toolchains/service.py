"""Runs a tool's program on a model in a process of its own, and brings back what it made of the weights."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.toolchains.environments import Environments, last_lines
from methods.network import Network
from methods.toolchains.process import Answer

log = logging.getLogger(__name__)

RUNNER = Path(__file__).with_name("runner.py")
ROOT = Path(__file__).parents[2]
PARAMETER = "parameters/"


@dataclass(frozen=True)
class ToolRunner:
    """See `methods.toolchains.process.Tools`.

    Attributes:
        environments: where tools are installed.
        network: the full-precision model.
        tokenizer: handed over with it.
        tokens: int64 [sequences, length], the calibration text.
        minutes: after which a tool is stopped.
    """

    environments: Environments
    network: Network
    tokenizer: Any
    tokens: Tensor
    minutes: float = 60.0

    def __call__(self, module: str, requirements: Sequence[str], settings: Mapping[str, Any]) -> Answer:
        name = module.rsplit(".", 1)[1]
        python = self.environments.python(name, requirements)
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            job = Path(folder)
            self._hand_over(job, module, settings)
            self._run(python, job, name)
            return _answer(job, name)

    def _hand_over(self, job: Path, module: str, settings: Mapping[str, Any]) -> None:
        model: Any = self.network.model
        model.save_pretrained(job / "model")
        self.tokenizer.save_pretrained(job / "model")
        save_file({"tokens": self.tokens.cpu().contiguous()}, job / "tokens.safetensors")
        task = {
            "module": module,
            "settings": dict(settings),
            "linears": list(self.network.linears),
            "threads": torch.get_num_threads(),
            "worker": os.getpid(),
        }
        (job / "job.json").write_text(json.dumps(task))

    def _run(self, python: Path, job: Path, name: str) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment = os.environ | offline | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [str(python), str(RUNNER), str(job)]
        with (job / "log.txt").open("w+") as output:
            try:
                code = subprocess.run(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    timeout=60 * self.minutes,
                    cwd=job,  # tools leave logs where they run
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise ValueError(
                    f"{name} was stopped after {self.minutes:g} minutes; its last lines: {_tail(output)}"
                ) from error
            if code:
                raise ValueError(f"{name} ended with code {code}; its last lines: {_tail(output)}")


def _tail(output: Any) -> str:
    output.seek(0)
    return last_lines(output.read())


def _answer(job: Path, name: str) -> Answer:
    try:
        tensors = load_file(job / "answer.safetensors")
        told = json.loads((job / "answer.json").read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{name} ended well but left no readable answer: {error}") from error
    return Answer(
        tensors={key: tensor for key, tensor in tensors.items() if not key.startswith(PARAMETER)},
        parameters={key.removeprefix(PARAMETER): t for key, t in tensors.items() if key.startswith(PARAMETER)},
        seconds=told["seconds"],
        peak_bytes=told["peak_bytes"],
    )
