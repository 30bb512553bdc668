"""Where documents come from, and which split each belongs to: `test`, `scoring` or `calibration`.

A source is a function of an optional path that returns the documents of each split; `SOURCES` names them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import corpus

log = logging.getLogger(__name__)

Documents = dict[str, list[str]]
"""Split to its documents."""

SPLITS = ("test", "scoring", "calibration")
TINY_FACTS = Path(__file__).parent / "assets" / "tiny" / "training.json"
# First bucket out of 100 that no longer belongs to the split, for files that have no splits of their own.
FILE_SPLIT_ENDS = {"test": 45, "scoring": 55, "calibration": 100}
# Documents of a C4 shard that are read: about 2 M tokens, many times what calibration takes.
C4_DOCUMENTS = 4000


def pydocs(path: str | None) -> Documents:
    """The embedded corpus, by its own splits. Warns if it is not the one that published numbers were computed on."""
    _refuse(path, "pydocs")
    documents = corpus.core_documents()
    recorded = json.loads(TINY_FACTS.read_text())
    if corpus.digest(documents) != recorded["core_sha256"]:
        log.warning(
            "the standard library of this Python %s differs from that of Python %s, with which published numbers "
            "were computed: perplexities on data=pydocs are not comparable with them",
            corpus.python_version(),
            recorded["python"],
        )
    return {split: [d.text for d in documents if d.split == split] for split in SPLITS}


def text(path: str | None) -> Documents:
    """A file: the paragraphs of a .txt or the "text" of a .jsonl's lines, each put into a split by its hash."""
    if path is None:
        raise ValueError("data=text needs data.path=FILE, a .txt or .jsonl file")
    file = Path(path)
    if file.suffix not in READERS:
        raise ValueError(f"data.path={path} is neither .txt nor .jsonl; convert it to one of them")
    if not file.is_file():
        raise ValueError(f"data.path={path} does not exist; name an existing .txt or .jsonl file")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path={path} is not UTF-8; convert it") from error
    splits: Documents = {split: [] for split in SPLITS}
    for document in READERS[file.suffix](content):
        bucket = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) % 100
        splits[next(split for split, end in FILE_SPLIT_ENDS.items() if bucket < end)].append(document)
    return splits


def _paragraphs(content: str) -> Iterator[str]:
    return (paragraph.strip() for paragraph in re.split(r"\n\s*\n", content) if paragraph.strip())


def _json_lines(content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"].strip()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f'line {number} of data.path is not a JSON object with a string "text"; correct or remove it'
            ) from error
        if document:
            yield document


def wikitext2(path: str | None) -> Documents:
    """The protocol of GPTQ (Frantar et al. 2023): lines joined with two newlines and tokenized as one document."""
    _refuse(path, "wikitext2")
    official = {"test": "test", "scoring": "validation", "calibration": "train"}
    return {
        split: ["\n\n".join(_hub("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=theirs))]
        for split, theirs in official.items()
    }


def c4(path: str | None) -> Documents:
    """Test text from the first validation shard, the rest from the first training shard."""
    _refuse(path, "c4")
    shards = {split: f"en/c4-{split}.00000-of-{n:05d}.json.gz" for split, n in (("train", 1024), ("validation", 8))}
    train, validation = (
        _hub("c4", "allenai/c4", data_files={split: shard}, split=f"{split}[:{C4_DOCUMENTS}]")
        for split, shard in shards.items()
    )
    return {
        "test": validation,
        "scoring": train[::8],
        "calibration": [d for i, d in enumerate(train) if i % 8],
    }


def _hub(name: str, *args: Any, **options: Any) -> list[str]:
    """The texts of a data set of the Hugging Face hub, or of its local cache."""
    import datasets

    try:
        return datasets.load_dataset(*args, **options)["text"][:]
    except OSError as error:
        raise ValueError(
            f"data={name} is neither cached nor reachable ({error}); take data=pydocs, which is embedded, or "
            "data=text data.path=FILE"
        ) from error


def _refuse(path: str | None, name: str) -> None:
    if path is not None:
        raise ValueError(f"data.path={path} has no meaning for data={name}; use data=text to read a file")


SOURCES: dict[str, Callable[[str | None], Documents]] = {
    "pydocs": pydocs,
    "text": text,
    "wikitext2": wikitext2,
    "c4": c4,
}
READERS: dict[str, Callable[[str], Iterator[str]]] = {".txt": _paragraphs, ".jsonl": _json_lines}
