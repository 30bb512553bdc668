"""The library on first use: without a compiler, and by several processes at once. A stand-in compiles in no time."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.cpu import build, library, linear
from kernels.dispatch import multiply
from kernels.packed import PackedInteger
from kernels.packing import pack

COMPILER = """#!/bin/sh
for last; do :; done
case "$1" in --version) echo stand-in; exit 0;; esac
echo called >> "$COUNT"
echo "$@" > "$last"
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes its arguments into its output, which it is told last, and counts its calls."""
    script = tmp_path / "compiler"
    script.write_text(COMPILER)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("HAWQ_KERNEL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_built_once_and_kept(stand_in: Path) -> None:
    path = build.library()
    calls = (stand_in / "count").read_text()
    assert build.library() == path
    assert path.parent == stand_in / "cache"
    assert (stand_in / "count").read_text() == calls
    assert [left.name for left in path.parent.iterdir()] == [path.name]


def test_another_source_is_another_library(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library()
    monkeypatch.setattr(build, "FLAGS", f"{build.FLAGS} -DOTHER")
    assert build.library() != path


def test_processes_build_at_once(stand_in: Path) -> None:
    code = "from kernels.cpu.build import library; print(library())"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(printed) == 1
    assert [str(left) for left in (stand_in / "cache").iterdir()] == list(printed)


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such thing >&2; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("HAWQ_KERNEL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="no such thing"):
        build.library()
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_torch_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library.load.cache_clear()
    try:
        codes = torch.randint(16, (8, 128))
        packed = PackedInteger(pack(codes, 4), torch.ones(8, 1).half(), None, bits=4, shape=(8, 128), group_size=128)
        with caplog.at_level(logging.WARNING):
            products = [multiply(packed, torch.eye(128)) for _ in range(3)]
        assert torch.equal(products[0].T, codes - 8.0)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "no C++ compiler" in caplog.text
        assert linear.refuses(packed) == "the library cannot be built"
    finally:
        library.load.cache_clear()
