"""The process in which a tool works: python runner.py FOLDER

It runs in the tool's own environment, where of this project only `methods` and `kernels` may be imported.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KIB = 1024


def main(job: Path) -> None:
    task = json.loads((job / "job.json").read_text())
    threading.Thread(target=_end_with, args=(task["worker"],), daemon=True).start()
    torch.set_num_threads(task["threads"])
    program: Any = importlib.import_module(task["module"])
    for name in program.IMPORTS:  # what a tool takes to import says nothing about how fast it quantizes
        importlib.import_module(name)
    work_type: Any = importlib.import_module("methods.toolchains.base").Work
    model = _load(job / "model")
    tokens = load_file(job / "tokens.safetensors")["tokens"]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not _quantized(name, task)}
    began = time.perf_counter()
    tensors = program.run(model, work_type(str(job / "model"), tokens, task["linears"]), task["settings"])
    seconds = time.perf_counter() - began
    tensors |= _changed(model, before)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, job / "answer.safetensors")
    told = {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB}
    (job / "answer.json").write_text(json.dumps(told))


def _end_with(worker: int) -> None:
    """A worker that is killed at its cell's time limit cannot stop its tool, which would go on for hours."""
    while os.getppid() == worker:
        time.sleep(1)
    os._exit(1)


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _quantized(name: str, task: dict[str, Any]) -> bool:
    return name.removesuffix(".weight") in task["linears"]


def _changed(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other parameters with new values, such as norm gains into which scales were folded."""
    after = dict(model.named_parameters())
    return {
        f"parameters/{name}": after[name].float()
        for name, value in before.items()
        if name in after and not torch.equal(after[name].float(), value.float())
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
