"""Packages as published: downloaded once, then read in memory; never unpacked, installed or imported."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from harness.toolchains.environments import last_lines

log = logging.getLogger(__name__)

BACKEND = Path(__file__).parent / "backend"
PYTHON = "3.11"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_24_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64")
MINUTES = 4.0

WHEEL, SDIST = "wheel", "sdist"
KINDS = {
    WHEEL: ["--only-binary=:all:", "--python-version", PYTHON, *(f"--platform={p}" for p in PLATFORMS)],
    SDIST: ["--no-binary=:all:", "--no-build-isolation", "--use-pep517", "--ignore-requires-python"],
}
"""pip's options: wheels for one platform whatever machine asks, so that all machines audit the same files."""


class Unavailable(Exception):
    """A package that cannot be had; the reason in one line."""


class Packages:
    """A folder of downloaded archives, `NAME/VERSION/ARCHIVE`.

    Attributes:
        offline: never ask the index.
    """

    def __init__(self, folder: Path | str, offline: bool = False) -> None:
        self.folder = Path(folder).resolve()
        self.offline = offline

    def archive(self, name: str, version: str, kind: str) -> Path:
        """The wheel or sdist of this version, downloaded if need be.

        Raises:
            Unavailable: pip does not deliver it within the time limit.
        """
        home = self.folder / name / version
        if not (found := _archives(home)):
            if self.offline:
                raise Unavailable("not downloaded yet, and this run is offline")
            home.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(home.parent / f".{version}.lock"):
                if not _archives(home):
                    self._download(name, version, kind, home)
            found = _archives(home)
        if len(found) != 1:
            raise Unavailable(f"the cache holds {len(found)} archives of {name} {version}; remove them")
        return found[0]

    def _download(self, name: str, version: str, kind: str, home: Path) -> None:
        log.info("downloading %s %s", name, version)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".partial-") as partial:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *KINDS[kind]]
            _call([*command, "--dest", partial, f"{name}=={version}"])
            if len(_archives(Path(partial))) != 1:
                raise Unavailable("pip downloaded nothing")
            Path(partial).rename(home)
            Path(partial).mkdir()  # what the context manager removes


def _archives(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.endswith((".whl", ".tar.gz", ".zip")))


def _call(command: Sequence[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(BACKEND)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, env=environment)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"no download within {MINUTES:g} minutes") from error
    if done.returncode:
        raise Unavailable(f"pip: {_errors(done.stderr)}")


def _errors(log: str) -> str:
    """pip's errors in one line, without its warnings, which are about this machine."""
    told = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    errors = [re.sub(r" \(from versions: .*\)", "", line) for line in told]
    return last_lines("\n".join(errors)) or "no archive for this version"
