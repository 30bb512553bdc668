"""Windows, the disjointness of splits, and their identity."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness import corpus, data, sources
from harness.data import DataConfig, Texts, check_disjoint, load_texts, texts_digest, windows

BOS = "<s>"


def byte_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, so that windows can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": BOS} if bos else {}))


def config(**options: Any) -> DataConfig:
    small: dict[str, Any] = {
        "length": 8,
        "calibration_sequences": 3,
        "scoring_sequences": 2,
        "test_sequences": 4,
    }
    return DataConfig(**{**small, **options})


def documents(prefix: str, count: int = 20) -> tuple[str, ...]:
    return tuple(f"{prefix} document {i:02d}" for i in range(count))


@pytest.fixture
def texts() -> Texts:
    return Texts(documents("calibration"), documents("scoring"), documents("test"))


@pytest.fixture(autouse=True)
def forget() -> None:
    data._load.cache_clear()


def write_lines(path: Path, count: int = 300) -> Path:
    path.write_text("".join(json.dumps({"text": f"story {i}: " + "word " * (i % 7)}) + "\n" for i in range(count)))
    return path


def test_documents_follow_a_bos_and_are_cut_without_overlap(texts: Texts) -> None:
    everything = windows(texts, byte_tokenizer(), config(test_sequences=0), context=8).test
    joined = "".join(f"{BOS}{d}" for d in texts.test)
    stream = byte_tokenizer()(joined, add_special_tokens=False)["input_ids"]
    assert everything.dtype == torch.int64
    assert everything.flatten().tolist() == stream[: len(stream) // 8 * 8]


def test_without_a_bos_documents_are_joined_directly(texts: Texts) -> None:
    tokenizer = byte_tokenizer(bos=False)
    everything = windows(texts, tokenizer, config(test_sequences=0), context=8).test
    assert tokenizer.decode(everything.flatten()) == "".join(texts.test)[: everything.numel()]


def test_test_windows_are_spread_evenly(texts: Texts) -> None:
    tokenizer = byte_tokenizer()
    everything = windows(texts, tokenizer, config(test_sequences=0), context=8).test
    few = windows(texts, tokenizer, config(test_sequences=4), context=8).test
    where = [next(i for i, row in enumerate(everything) if torch.equal(row, w)) for w in few]
    assert where == [i * len(everything) // 4 for i in range(4)]


def test_drawn_windows_do_not_repeat_and_follow_the_seed() -> None:
    texts = Texts(tuple(f"{i:07d}" for i in range(50)), documents("scoring"), documents("test"))
    tokenizer = byte_tokenizer()  # a document and its BOS are a window
    first, again, other = (windows(texts, tokenizer, config(seed=s, calibration_sequences=40), 8) for s in (1, 1, 2))
    assert len({tuple(row.tolist()) for row in first.calibration}) == 40
    assert torch.equal(first.calibration, again.calibration) and torch.equal(first.scoring, again.scoring)
    assert not torch.equal(first.calibration, other.calibration)
    assert torch.equal(first.test, other.test)


def test_words_are_those_of_the_predicted_tokens() -> None:
    texts = Texts(documents("a"), documents("b"), ("x yz bcd", "wx de fg"))
    result = windows(texts, byte_tokenizer(bos=False), config(length=8, test_sequences=2), context=8)
    assert result.words == 2 + 3  # a window's first token, "x" or "w", is given: " yz bcd" and "x de fg" remain


def test_windows_longer_than_the_context(texts: Texts) -> None:
    with pytest.raises(ValueError, match=r"data\.length=8 is longer than the model's context, so set data\.length=6"):
        windows(texts, byte_tokenizer(), config(), context=6)


def test_too_little_text_says_how_much_there_is(texts: Texts) -> None:
    with pytest.raises(ValueError, match=r"has 480 tokens, 60 windows of 8.*set data.calibration_sequences=60"):
        windows(texts, byte_tokenizer(), config(calibration_sequences=61), context=8)
    with pytest.raises(ValueError, match="the scoring text has 0 tokens"):
        windows(replace(texts, scoring=()), byte_tokenizer(), config(), context=8)
    with pytest.raises(ValueError, match="the test text has 5 tokens"):
        windows(replace(texts, test=("four",)), byte_tokenizer(), config(test_sequences=0), context=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "data.length=1"),
        ({"calibration_sequences": 0}, "data.calibration_sequences=0"),
        ({"scoring_sequences": -1}, "data.scoring_sequences=-1"),
        ({"test_sequences": 1}, "data.test_sequences=1"),
    ],
)
def test_settings_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_shared_documents_are_found() -> None:
    check_disjoint(Texts(("a",), ("b",), ("c",)))
    with pytest.raises(ValueError, match="calibration and test text share 1 documents"):
        check_disjoint(Texts(("a", "b"), ("c",), ("d", "b")))


def test_windows_refuse_overlapping_texts(texts: Texts) -> None:
    with pytest.raises(ValueError, match="share 20 documents"):
        windows(replace(texts, scoring=texts.test), byte_tokenizer(), config(), context=8)


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    path.write_text(path.read_text() * 2)
    assert sum(len(d) for d in vars(load_texts(config(name="text", path=str(path)))).values()) == 300


def test_a_document_of_two_official_splits_stays_in_the_test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sources.SOURCES,
        "fake",
        lambda _: {"test": ["a", "b"], "scoring": ["b", "c"], "calibration": ["a", "c", "d"]},
    )
    assert load_texts(config(name="fake")) == Texts(calibration=("d",), scoring=("c",), test=("a", "b"))


def test_embedded_texts_are_the_corpus_splits() -> None:
    texts = load_texts(DataConfig())
    for one, other in combinations(vars(texts).values(), 2):
        assert not set(one) & set(other)
    assert texts.test == tuple(dict.fromkeys(d.text for d in corpus.core_documents("test")))
    assert all(len("".join(documents)) > 100_000 for documents in vars(texts).values())


def test_digest_follows_texts_and_settings_only(tmp_path: Path) -> None:
    base = config(name="text", path=str(write_lines(tmp_path / "a.jsonl")))
    copy = replace(base, path=str(write_lines(tmp_path / "b.jsonl")))
    longer = replace(base, path=str(write_lines(tmp_path / "c.jsonl", 301)))
    assert texts_digest(base) == texts_digest(copy)
    changed = [longer, replace(base, length=9), replace(base, seed=1), replace(base, test_sequences=5)]
    assert len({texts_digest(c) for c in (base, *changed)}) == 5


def test_an_unknown_source() -> None:
    with pytest.raises(ValueError, match="there are pydocs, text, wikitext2, c4"):
        load_texts(config(name="pydoc"))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_empty_text(tmp_path: Path, content: str, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match="has no text"):
        load_texts(config(name="text", path=str(path)))
