"""The texts of a wheel or an sdist, read in memory. Archives are untrusted: nothing is written, run or imported."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness.audit.packages import Unavailable

DOCUMENTS = {"md", "rst", "txt", "yaml", "yml", "toml", "cfg"}
SOURCES = {"py", "pyi", "sh", "c", "cc", "cpp", "h", "hpp", "cu", "cuh", "m", "metal", "comp"}
METADATA = ("METADATA", "PKG-INFO")
MAX_MEMBERS = 200_000
MAX_FILE = 8 * 2**20
MAX_TOTAL = 512 * 2**20
MAX_UNPACKED = 8 * 2**30


@dataclass(frozen=True)
class Contents:
    """What an archive holds.

    Attributes:
        paths: of all files, inside the package.
        texts: path to text, of sources, documents and configurations.
    """

    paths: tuple[str, ...]
    texts: dict[str, str]

    def metadata(self, field: str) -> Iterator[tuple[str, int, str]]:
        """Path, line and value of a header of the package's metadata."""
        for path in (p for p in self.texts if p.rpartition("/")[2] in METADATA):
            for number, line in enumerate(self.texts[path].splitlines(), 1):
                if not line:
                    break  # the description follows
                if line.lower().startswith(f"{field.lower()}:"):
                    yield path, number, line.partition(":")[2].strip()


def read(archive: Path) -> Contents:
    """Every path, and the texts.

    Raises:
        Unavailable: the file is no archive, or larger inside than any package should be.
    """
    paths, texts, total = [], {}, 0
    try:
        for path, member in _members(archive):
            paths.append(path)
            if len(paths) > MAX_MEMBERS:
                raise Unavailable(f"{archive.name} holds more than {MAX_MEMBERS} files")
            if not _is_text(path):
                continue
            data = member.read(MAX_FILE + 1)  # what a header says of sizes may be false
            total += len(data)
            if len(data) > MAX_FILE:
                raise Unavailable(f"{path} in {archive.name} is longer than {MAX_FILE >> 20} MiB")
            if total > MAX_TOTAL:
                raise Unavailable(f"{archive.name} holds more than {MAX_TOTAL >> 20} MiB of text")
            texts[path] = data.decode("utf-8", errors="replace")
    except (OSError, EOFError, RuntimeError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{archive.name} cannot be read: {error}") from error
    return Contents(tuple(sorted(paths)), dict(sorted(texts.items())))


def _is_text(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in METADATA or name.rpartition(".")[2].lower() in DOCUMENTS | SOURCES


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Path inside the package and open file, of each regular file."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.offset_data + member.size > MAX_UNPACKED:  # to skip it is to unpack it
                    raise Unavailable(f"{archive.name} unpacks to more than {MAX_UNPACKED >> 30} GiB")
                if member.isfile() and (file := tar.extractfile(member)):
                    yield member.name.partition("/")[2], file  # without NAME-VERSION/
    else:
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    with wheel.open(entry) as file:
                        yield entry.filename, file
