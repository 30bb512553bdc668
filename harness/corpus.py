"""The embedded corpus: text that every CPython installation carries.

Standard-library sources and the `pydoc_data` topics (what `help("FLOAT")` prints) need no download and no
licence of ours. Documents are whole files; a fixed hash of the *path* puts each into one split, so that
training, calibration, scoring and test text never share a file, whatever the Python version.

The text differs between Python versions, and perplexities with it: `digest` identifies it.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

# Linux distributions split these packages off, so they cannot be part of "what every CPython carries".
# They still serve as additional *training* text where they exist (see `harness.train_tiny`).
OPTIONAL = ("distutils", "idlelib", "test", "tkinter", "turtledemo")
# Installed packages, bundled wheels, near-copies of other files (lib2to3), and tables of numbers (encodings).
EXCLUDED = ("__phello__", "encodings", "ensurepip", "lib2to3", "pydoc_data", "site-packages", "dist-packages")
# First bucket out of 100 that no longer belongs to the split; the rest is for training.
SPLIT_ENDS = {"test": 6, "scoring": 12, "calibration": 17, "train": 100}


@dataclass(frozen=True)
class Document:
    """One file or topic: its path relative to the standard library, and its text."""

    path: str
    text: str

    @property
    def split(self) -> str:
        """`test`, `scoring`, `calibration` or `train`, from the SHA-256 of the path alone."""
        bucket = int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:4], "big") % 100
        return next(name for name, end in SPLIT_ENDS.items() if bucket < end)


def core_documents(split: str | None = None) -> list[Document]:
    """The documents that every CPython carries, sorted by path; of one `split`, or of all."""
    documents = [*_sources(optional=False), *_topics()]
    return sorted((d for d in documents if split in (None, d.split)), key=lambda d: d.path)


def optional_documents() -> list[Document]:
    """Additional training text: standard-library packages that this installation has but another may not."""
    return sorted(_sources(optional=True), key=lambda d: d.path)


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 over paths and texts, in order: the identity of a corpus."""
    sha = hashlib.sha256()
    for document in documents:
        sha.update(f"{document.path}\0{len(document.text)}\0{document.text}".encode())
    return sha.hexdigest()


def _topics() -> Iterator[Document]:
    for name, text in topics.topics.items():
        yield Document(f"pydoc_data/topics/{name}", text.strip() + "\n")


def _sources(*, optional: bool) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).parts
        if parts[0] in EXCLUDED or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        if optional != (parts[0] in OPTIONAL or bool({"test", "tests"} & set(parts[:-1]))):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test fixtures are deliberately not UTF-8
            continue
        if text.strip():
            yield Document("/".join(parts), text)


def python_version() -> str:
    """The interpreter's version, such as `3.11.7`: the corpus differs between versions."""
    return platform.python_version()
