"""Isolated environments for other projects' tools, made on first use.

An environment lies on top of this project's own: what both agree on (torch, transformers) is shared, what the tool
wants otherwise is installed into its environment alone and hides ours. Nothing reaches the environment below.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)

LAST_LINES = 8
READY = "requirements.json"
MINUTES = 30.0


class Environments:
    """A folder of environments."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).resolve()

    def python(self, name: str, requirements: Sequence[str]) -> Path:
        """The interpreter of the environment `name` with these requirements, made or made anew if need be.

        Raises:
            ValueError: pip cannot install them; with its last lines.
        """
        home = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{name}.lock"):
            if _installed(home) != list(requirements):
                self._make(home, requirements)
        return home / "bin" / "python"

    def _make(self, home: Path, requirements: Sequence[str]) -> None:
        log.warning("making an environment for %s with %s", home.name, " ".join(requirements))
        shutil.rmtree(home, ignore_errors=True)
        _call([sys.executable, "-m", "venv", "--without-pip", str(home)], f"an environment for {home.name}")
        own = home / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        (own / "below.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # pip is found there too
        if requirements:
            command = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
            _call(command, " ".join(requirements))
        (home / READY).write_text(json.dumps(list(requirements)))


def _installed(home: Path) -> list[str] | None:
    path = home / READY
    return json.loads(path.read_text()) if path.exists() else None


def _call(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{what} could not be installed within {MINUTES:g} minutes") from error
    if done.returncode:
        raise ValueError(f"{what} cannot be installed here: {last_lines(done.stdout + done.stderr)}")


def last_lines(text: str) -> str:
    """The end of a log, in one line."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-LAST_LINES:] if line.strip())
