"""Runs the tests in `interpreted/`, which need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def test_the_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"--confcutdir={FOLDER}",
        str(FOLDER),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[3])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
