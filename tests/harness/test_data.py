"""Sources, splits, windows, and the sentences for bad input."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness import corpus, data
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
    path.write_text(
        "".join(json.dumps({"text": f"story {i}: " + "word " * (i % 7)}) + "\n" for i in range(count))
    )
    return path


# --- windows -----------------------------------------------------------------------------------------------------


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
    first, again, other = (
        windows(texts, tokenizer, config(seed=s, calibration_sequences=40), 8) for s in (1, 1, 2)
    )
    assert len({tuple(row.tolist()) for row in first.calibration}) == 40
    assert torch.equal(first.calibration, again.calibration) and torch.equal(first.scoring, again.scoring)
    assert not torch.equal(first.calibration, other.calibration)
    assert torch.equal(first.test, other.test)


def test_words_are_those_of_the_predicted_tokens() -> None:
    texts = Texts(documents("a"), documents("b"), ("x bc def", "ghi j kl"))  # 9 tokens each with BOS
    result = windows(texts, byte_tokenizer(), config(length=9, test_sequences=2), context=9)
    assert result.words == 6  # the BOS of each window is its first token


def test_windows_longer_than_the_context(texts: Texts) -> None:
    with pytest.raises(
        ValueError, match="data.length=8 is longer than the model's context; set data.length=6"
    ):
        windows(texts, byte_tokenizer(), config(), context=6)


def test_too_little_text_says_how_much_there_is(texts: Texts) -> None:
    with pytest.raises(
        ValueError, match=r"has 480 tokens, 60 windows of 8.*set data.calibration_sequences=60"
    ):
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


# --- splits ------------------------------------------------------------------------------------------------------


def test_shared_documents_are_found() -> None:
    check_disjoint(Texts(("a",), ("b",), ("c",)))
    with pytest.raises(ValueError, match="calibration and test text share 1 documents"):
        check_disjoint(Texts(("a", "b"), ("c",), ("d", "b")))


def test_windows_refuse_overlapping_texts(texts: Texts) -> None:
    with pytest.raises(ValueError, match="share 20 documents"):
        windows(replace(texts, scoring=texts.test), byte_tokenizer(), config(), context=8)


def test_a_file_is_split_by_the_hash_of_each_document(tmp_path: Path) -> None:
    whole = load_texts(config(name="text", path=str(write_lines(tmp_path / "a.jsonl"))))
    check_disjoint(whole)
    sizes = {split: len(d) for split, d in vars(whole).items()}
    assert sum(sizes.values()) == 300
    assert 90 < sizes["test"] < 180 and 90 < sizes["calibration"] < 180 and 10 < sizes["scoring"] < 60
    part = load_texts(config(name="text", path=str(write_lines(tmp_path / "b.jsonl", 100))))
    for split, kept in vars(part).items():
        assert set(kept) <= set(getattr(whole, split))  # a document's split does not depend on the others


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    path.write_text(path.read_text() * 2)
    assert sum(len(d) for d in vars(load_texts(config(name="text", path=str(path)))).values()) == 300


def test_a_document_of_two_official_splits_stays_in_the_test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        data.SOURCES,
        "fake",
        lambda path: {"test": ["a", "b"], "scoring": ["b", "c"], "calibration": ["a", "c", "d"]},
    )
    assert load_texts(config(name="fake")) == Texts(calibration=("d",), scoring=("c",), test=("a", "b"))


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\nline two\n\n\n three \n  \t\nfour\n")
    texts = load_texts(config(name="text", path=str(file)))
    assert {d for documents in vars(texts).values() for d in documents} == {"one\nline two", "three", "four"}


def test_embedded_texts_are_the_corpus_splits() -> None:
    texts = load_texts(DataConfig())
    for one, other in combinations(vars(texts).values(), 2):
        assert not set(one) & set(other)
    assert texts.test == tuple(dict.fromkeys(d.text for d in corpus.core_documents("test")))
    assert all(len("".join(documents)) > 100_000 for documents in vars(texts).values())


def test_another_corpus_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts, documents = (
        tmp_path / "training.json",
        [corpus.Document(f"{i}.py", f"text {i}") for i in range(40)],
    )
    monkeypatch.setattr(data, "TINY_FACTS", facts)
    monkeypatch.setattr(corpus, "core_documents", lambda: documents)
    facts.write_text(json.dumps({"core_sha256": corpus.digest(documents), "python": "x"}))
    load_texts(DataConfig())
    assert not caplog.records
    data._load.cache_clear()
    facts.write_text(json.dumps({"core_sha256": "0" * 64, "python": "3.99.1"}))
    load_texts(DataConfig())
    assert "3.99.1" in caplog.text and "not comparable" in caplog.text


# --- identity ----------------------------------------------------------------------------------------------------


def test_digest_follows_texts_and_settings_only(tmp_path: Path) -> None:
    base = config(name="text", path=str(write_lines(tmp_path / "a.jsonl")))
    copy = replace(base, path=str(write_lines(tmp_path / "b.jsonl")))
    longer = replace(base, path=str(write_lines(tmp_path / "c.jsonl", 301)))
    assert texts_digest(base) == texts_digest(copy)
    changed = [longer, replace(base, length=9), replace(base, seed=1), replace(base, test_sequences=5)]
    assert len({texts_digest(c) for c in (base, *changed)}) == 5


# --- sentences for bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "text"}, "needs data.path=FILE"),
        ({"name": "text", "path": "nowhere.txt"}, "data.path=nowhere.txt does not exist"),
        ({"name": "text", "path": "nowhere.csv"}, "neither .txt nor .jsonl"),
        ({"name": "pydocs", "path": "a.txt"}, "use data=text"),
        ({"name": "pydoc"}, "there are pydocs, text, wikitext2, c4"),
    ],
)
def test_bad_sources(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_texts(config(**options))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_empty_text(tmp_path: Path, content: str, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match="has no text"):
        load_texts(config(name="text", path=str(path)))


@pytest.mark.parametrize("line", ["{", '"text"', "[1]", "{}", '{"text": 3}', '{"text": null}', "7"])
def test_a_bad_json_line_is_numbered(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 3 of .*a\.jsonl"):
        load_texts(config(name="text", path=str(path)))


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_texts(config(name="text", path=str(path)))


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_an_unreachable_hub_names_the_alternatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"neither cached nor reachable.*data=pydocs.*data=text data.path=FILE"
    ):
        load_texts(config(name=name))


def test_wikitext2_is_one_document_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {split: ["", f" = {split} = \n", "words \n"] for split in ("train", "validation", "test")}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_dict({"text": lines[split]})
    )
    texts = load_texts(config(name="wikitext2"))
    assert texts.test == ("\n\n = test = \n\n\nwords \n",)
    assert "= train =" in texts.calibration[0] and "= validation =" in texts.scoring[0]


def test_c4_takes_test_text_from_the_validation_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    def shard(path: str, *, data_files: dict[str, str], split: str) -> datasets.Dataset:
        assert path == "allenai/c4"
        (name,) = data_files
        assert split == f"{name}[:{data.C4_DOCUMENTS}]"
        return datasets.Dataset.from_dict({"text": list(documents(name, 40))})

    monkeypatch.setattr(datasets, "load_dataset", shard)
    texts = load_texts(config(name="c4"))
    assert texts.test == documents("validation", 40)
    assert sorted(texts.scoring + texts.calibration) == list(documents("train", 40))
    assert len(texts.scoring) == 5
