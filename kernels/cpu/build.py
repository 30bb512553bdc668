"""Compiles the library on first use, in seconds, and keeps it.

It lies in a folder of the user's cache under a name that changes with the sources, the flags, the compiler and torch's
OpenMP. A build replaces it in one step, so processes may build at once: the last one wins, and all are the same.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized"  # a fault of headers of GCC 12 with AVX-512
)
LEVELS = ("any machine", "x86-64-v3", "AVX-512 with VNNI and BF16")
"""What there are kernels for; x86-64-v3 is AVX2."""


class BuildError(Exception):
    """Why there is no library."""


@dataclass(frozen=True)
class Unit:
    """A source, compiled once for one kind of machine."""

    source: str
    flags: str

    @property
    def object(self) -> str:
        """A file name."""
        return hashlib.sha256(f"{self.source} {self.flags}".encode()).hexdigest()[:16] + ".o"


ANY = (Unit("select.cpp", ""), Unit("portable.cpp", "-DENTRY(name)=plain_##name"))
WIDE = "-march=x86-64-v4 -mavx512vnni -mavx512bf16"
X86 = (
    Unit("portable.cpp", "-march=x86-64-v3 -DENTRY(name)=v3_##name"),
    Unit("avx512.cpp", f"{WIDE} -DFORM=integers"),
    Unit("avx512.cpp", f"{WIDE} -DFORM=one_term"),
    Unit("avx512.cpp", f"{WIDE} -DFORM=two_terms"),
)


def library() -> Path:
    """The compiled library, built where it is missing.

    Raises:
        BuildError: there is no C++ compiler, it fails, or the cache cannot be written.
    """
    compiler = find_compiler()
    units = ANY + (X86 if platform.machine() in ("x86_64", "AMD64") else ())
    path = cache() / f"cpu-{_digest(compiler, units)}.so"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                _build(compiler, units, Path(folder)).replace(path)
        except OSError as error:
            raise BuildError(f"{path.parent} cannot be written: {error}") from error
    return path


def cache() -> Path:
    """HAWQ_KERNEL_CACHE, or a folder of the user's cache."""
    if "HAWQ_KERNEL_CACHE" in os.environ:
        return Path(os.environ["HAWQ_KERNEL_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hawq-bench" / "kernels"


def find_compiler() -> str:
    """CXX, or the first of the usual names that is there.

    Raises:
        BuildError: there is none.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler is installed ({', '.join(wanted)})")


def _digest(compiler: str, units: Sequence[Unit]) -> str:
    version = _run([compiler, "--version"])
    parts = [version, FLAGS, *map(repr, units), *_openmp(), platform.machine()]
    parts += [path.name + path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, units: Sequence[Unit], folder: Path) -> Path:
    def compile_unit(unit: Unit) -> str:
        target = str(folder / unit.object)
        _run([compiler, *FLAGS.split(), *unit.flags.split(), "-c", str(SOURCES / unit.source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_unit, units))
    target = folder / "library.so"
    _run([compiler, "-shared", *objects, *_openmp(), "-o", str(target)])
    return target


def _openmp() -> list[str]:
    """The OpenMP that torch has loaded, so that both share one pool of threads; the compiler's where there is none."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(found[0])] if found else ["-fopenmp"]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` fails: {done.stderr.strip()[-2000:]}")
    return done.stdout
