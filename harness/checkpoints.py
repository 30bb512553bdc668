"""Checkpoints on disk: where one lies, whether it is complete, and the digest of its files.

A model of the hub is its snapshot in the local cache, downloaded as far as it is missing. Nothing here
imports torch or transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
PACKAGE = "package:"  # the path package:tiny is the directory `tiny` of ASSETS
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def locate(path: str) -> Path:
    """The directory of a checkpoint on disk; ValueError if it is none."""
    packaged = path.startswith(PACKAGE)
    directory = ASSETS / path.removeprefix(PACKAGE) if packaged else Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"model.path={path} is not a directory; name one with config.json, safetensors and a tokenizer"
        )
    if not (directory / "config.json").is_file():
        raise ValueError(f"model.path={path} has no config.json; name the directory of a Hugging Face checkpoint")
    return directory


def download(hub: str, revision: str | None, allow_pickle: bool) -> Path:
    """The local copy of a model of the hub.

    Raises:
        ValueError: it does not exist, may not be read, or is neither cached nor within reach.
    """
    from httpx import HTTPError
    from huggingface_hub import errors, is_offline_mode, snapshot_download

    def fetch(weights: str) -> Path:
        snapshot = snapshot_download(
            hub,
            revision=revision,
            allow_patterns=[weights, "*.json", "*.txt", "*.model", "*.py", "*.jinja"],
            ignore_patterns=["*/*"],  # subdirectories repeat the weights in other formats
            local_files_only=is_offline_mode(),  # without this a pinned commit asks the hub all the same
        )
        return Path(snapshot)

    try:
        directory = fetch("model*.safetensors")
        if allow_pickle and not any((directory / name).is_file() for name in SAFETENSORS):
            directory = fetch("pytorch_model*.bin")
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{hub} is gated: accept its license on huggingface.co/{hub} and run `hf auth login`, "
            "or take the embedded model=tiny"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(f"the hub has no model {hub!r}{at}; name one as ORGANIZATION/MODEL") from error
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"{hub} is not in the local cache, and the hub is out of reach or HF_HUB_OFFLINE is set; "
            "connect once to download it, or take the embedded model=tiny"
        ) from error
    return directory


def weight_files(directory: Path, allow_pickle: bool) -> list[Path]:
    """The files that transformers reads the weights from: safetensors, or pickles if there is nothing else.

    Raises:
        ValueError: there are none, some are missing, or they are pickles and those are not allowed.
    """
    for single, index in (SAFETENSORS, PICKLES) if allow_pickle else (SAFETENSORS,):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _shards(directory / index)
    if any((directory / name).is_file() for name in PICKLES):
        raise ValueError(
            f"{directory} holds its weights as a pickle, which can run code when it is read; "
            "convert it to safetensors, or set model.allow_pickle=true if you trust it"
        )
    raise ValueError(f"{directory} has neither {' nor '.join(SAFETENSORS)}; save the weights as safetensors")


def digest(directory: Path, allow_pickle: bool, code: bool) -> str:
    """SHA-256 over weights, config.json, tokenizer files and, if `code`, the checkpoint's Python files."""
    settings = [directory / name for name in SETTINGS]
    programs = sorted(directory.glob("*.py")) if code else []
    sha = hashlib.sha256()
    for file in (*weight_files(directory, allow_pickle), *filter(Path.is_file, settings), *programs):
        stat = file.stat()
        sha.update(f"{file.name}\0{_file_digest(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return sha.hexdigest()


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index} does not say which file holds which tensor; fetch it again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} lists files that are missing ({', '.join(missing)}); fetch them again")
    return [index.parent / name for name in names]


@functools.cache
def _file_digest(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file, remembered until its size or time of modification changes."""
    del size, modified
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
