"""Texts, and how they become windows of tokens.

Three texts that share no document: `calibration` for the statistics that methods quantize with, `scoring` for
sensitivities and hyper-parameter choices, `test` for the reported numbers. A source gives documents; documents of a
split are joined, each after a beginning-of-sequence token, and cut into windows of equal length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SPLITS = ("test", "scoring", "calibration")
TINY_FACTS = Path(__file__).parent / "assets" / "tiny" / "training.json"
# First bucket out of 100 that no longer belongs to the split, for files that come without splits of their own.
FILE_SPLIT_ENDS = {"test": 45, "scoring": 55, "calibration": 100}
# Documents of a C4 shard that are read: about 2 M tokens, many times what calibration takes.
C4_DOCUMENTS = 4000

Documents = dict[str, list[str]]
"""Split to its documents."""


@dataclass
class DataConfig:
    """Which text, and how much of it. Every field is part of every perplexity."""

    name: str = "pydocs"
    """`pydocs` (embedded), `text` (a file), `wikitext2` or `c4`."""
    path: str | None = None
    """The file of `text`: .txt, whose documents are paragraphs, or .jsonl, whose lines are objects with "text"."""
    length: int = 512
    """Tokens a window."""
    calibration_sequences: int = 64
    scoring_sequences: int = 8
    test_sequences: int = 64
    """Test windows, spread evenly over the test text; 0 means all."""
    seed: int = 0
    """Chooses the calibration and scoring windows, and not the test windows."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(
                f"data.length={self.length} leaves no token to predict; take 2 or more, such as 512"
            )
        for option in ("calibration_sequences", "scoring_sequences"):
            if getattr(self, option) < 1:
                raise ValueError(f"data.{option}={getattr(self, option)} is not positive; take 1 or more")
        if self.test_sequences < 0 or self.test_sequences == 1:
            raise ValueError(
                f"data.test_sequences={self.test_sequences} gives no interval; take 2 or more, or 0 for all"
            )


@dataclass(frozen=True)
class Texts:
    """Documents of the three splits."""

    calibration: tuple[str, ...]
    scoring: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Windows:
    """Tokens, int64 [windows, length].

    Attributes:
        words: whitespace-separated words in the decoded test tokens that are predicted (all but each window's
            first), the denominator of `ppl_word`.
    """

    calibration: Tensor
    scoring: Tensor
    test: Tensor
    words: int


def load_texts(config: DataConfig) -> Texts:
    """The documents of `config.name`, without duplicates within and across splits.

    Raises:
        ValueError: the source is unknown, unreachable, missing, empty or malformed.
    """
    return _load(config.name, config.path)


def texts_digest(config: DataConfig) -> str:
    """SHA-256 of all that determines the token windows except the tokenizer: the texts and the settings."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("name", "path")}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for split, documents in vars(load_texts(config)).items():
        for document in documents:
            sha.update(f"{split}\0{len(document)}\0{document}".encode())
    return sha.hexdigest()


def check_disjoint(texts: Texts) -> None:
    """Raise ValueError if two splits share a document."""
    hashes = {split: {_sha256(d) for d in documents} for split, documents in vars(texts).items()}
    for one, other in combinations(hashes, 2):
        if shared := len(hashes[one] & hashes[other]):
            raise ValueError(
                f"{one} and {other} text share {shared} documents; leave each in one of them only"
            )


def windows(texts: Texts, tokenizer: PreTrainedTokenizerBase, config: DataConfig, context: int) -> Windows:
    """Tokenize, cut and choose.

    Calibration and scoring windows are drawn at random without overlap, from `config.seed`. Test windows are spread
    evenly over the text, so that none of its documents weighs more than another.

    Args:
        context: tokens that the model accepts.

    Raises:
        ValueError: windows longer than the context, or too little text.
    """
    if config.length > context:
        raise ValueError(
            f"data.length={config.length} is longer than the model's context; set data.length={context} or less"
        )
    check_disjoint(texts)
    calibration, scoring, test = (
        _cut(split, getattr(texts, split), tokenizer, config) for split in ("calibration", "scoring", "test")
    )
    count = config.test_sequences or len(test)
    test = test[torch.arange(count) * len(test) // count]
    decoded = tokenizer.batch_decode(
        test[:, 1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Windows(
        _draw(calibration, config.calibration_sequences, config.seed),
        _draw(scoring, config.scoring_sequences, config.seed),
        test,
        words=sum(len(text.split()) for text in decoded),
    )


def _draw(rows: Tensor, count: int, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def _cut(
    split: str, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Tensor:
    """All windows of the split, in order: int64 [windows, length]; the tail is dropped."""
    tokens = torch.tensor(list(_tokens(documents, tokenizer)), dtype=torch.int64)
    option = f"{split}_sequences"
    count, wanted = len(tokens) // config.length, getattr(config, option)
    if count < max(wanted, 2 if split == "test" else 1):
        smaller = f"data.{option}={count} or a smaller data.length" if count > 1 else "a smaller data.length"
        raise ValueError(
            f"the {split} text has {len(tokens)} tokens, {count} windows of {config.length}, too few for "
            f"data.{option}={wanted}; take more text, or set {smaller}"
        )
    return tokens[: count * config.length].view(count, config.length)


def _tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    if not documents:
        return
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # Not verbose: documents longer than the context are expected here, and cut.
    for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        yield from start
        yield from ids


@lru_cache(maxsize=4)
def _load(name: str, path: str | None) -> Texts:
    if name not in SOURCES:
        raise ValueError(f"unknown data.name={name}: there are {', '.join(SOURCES)}")
    owner: dict[str, str] = {}
    for split, documents in SOURCES[name](path).items():
        for document in documents:
            owner.setdefault(document, split)
    if not owner:
        raise ValueError(f"data={name}{f' data.path={path}' if path else ''} has no text; name another file")
    return Texts(**{split: tuple(d for d, s in owner.items() if s == split) for split in SPLITS})


def _pydocs(path: str | None) -> Documents:
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


def _text(path: str | None) -> Documents:
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
    for document in READERS[file.suffix](content, path):
        bucket = int(_sha256(document)[:8], 16) % 100
        splits[next(split for split, end in FILE_SPLIT_ENDS.items() if bucket < end)].append(document)
    return splits


def _paragraphs(content: str, path: str) -> Iterator[str]:
    del path
    return (paragraph.strip() for paragraph in re.split(r"\n\s*\n", content) if paragraph.strip())


def _json_lines(content: str, path: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"].strip()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f'line {number} of {path} is not a JSON object with a string "text"; correct or remove it'
            ) from error
        if text:
            yield text


def _wikitext2(path: str | None) -> Documents:
    """The protocol of GPTQ (Frantar et al. 2023): lines joined with two newlines and tokenized as one document."""
    _refuse(path, "wikitext2")
    official = {"test": "test", "scoring": "validation", "calibration": "train"}
    return {
        split: ["\n\n".join(_hub("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=theirs))]
        for split, theirs in official.items()
    }


def _c4(path: str | None) -> Documents:
    """Test text from the first validation shard, the rest from the first training shard."""
    _refuse(path, "c4")
    shards = {
        split: f"en/c4-{split}.00000-of-{n:05d}.json.gz" for split, n in (("train", 1024), ("validation", 8))
    }
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


def _sha256(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()


SOURCES: dict[str, Callable[[str | None], Documents]] = {
    "pydocs": _pydocs,
    "text": _text,
    "wikitext2": _wikitext2,
    "c4": _c4,
}
READERS: dict[str, Callable[[str, str], Iterator[str]]] = {".txt": _paragraphs, ".jsonl": _json_lines}
