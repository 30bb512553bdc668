"""Texts, and how they become windows of tokens.

Three texts that share no document: `calibration` for the statistics that methods quantize with, `scoring` for
sensitivities and hyper-parameter choices, `test` for the reported numbers. A source gives documents; documents of a
split are joined, each after a beginning-of-sequence token, and cut into windows of equal length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.sources import SOURCES, SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
            raise ValueError(f"data.length={self.length} leaves no token to predict; take 2 or more, such as 512")
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
            raise ValueError(f"{one} and {other} text share {shared} documents; leave each in one of them only")


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
            f"data.length={config.length} is longer than the model's context, so set data.length={context} or less"
        )
    check_disjoint(texts)
    calibration, scoring, test = (
        _cut(split, getattr(texts, split), tokenizer, config) for split in ("calibration", "scoring", "test")
    )
    count = config.test_sequences or len(test)
    test = test[torch.arange(count) * len(test) // count]
    decoded = tokenizer.batch_decode(test[:, 1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Windows(
        _draw(calibration, config.calibration_sequences, config.seed),
        _draw(scoring, config.scoring_sequences, config.seed),
        test,
        words=sum(len(text.split()) for text in decoded),
    )


def _draw(rows: Tensor, count: int, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def _cut(split: str, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Tensor:
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


def _sha256(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()
