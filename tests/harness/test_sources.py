"""Where documents come from, and the sentences for sources that cannot be read."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from harness import corpus, sources
from harness.sources import SOURCES, SPLITS


def write_lines(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"text": f"story {i}"}) + "\n" for i in range(count)))
    return str(path)


def test_a_file_is_split_by_the_hash_of_each_document(tmp_path: Path) -> None:
    whole = SOURCES["text"](write_lines(tmp_path / "a.jsonl", 300))
    sizes = {split: len(documents) for split, documents in whole.items()}
    assert sum(sizes.values()) == 300
    assert 90 < sizes["test"] < 180 and 90 < sizes["calibration"] < 180 and 10 < sizes["scoring"] < 60
    part = SOURCES["text"](write_lines(tmp_path / "b.jsonl", 100))
    for split in SPLITS:
        assert set(part[split]) <= set(whole[split])  # a document's split does not depend on the others


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\nline two\n\n\n three \n  \t\nfour\n")
    assert {d for documents in SOURCES["text"](str(file)).values() for d in documents} == {
        "one\nline two",
        "three",
        "four",
    }


def test_another_corpus_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts = tmp_path / "training.json"
    documents = [corpus.Document(f"{i}.py", f"text {i}") for i in range(40)]
    monkeypatch.setattr(sources, "TINY_FACTS", facts)
    monkeypatch.setattr(corpus, "core_documents", lambda: documents)
    facts.write_text(json.dumps({"core_sha256": corpus.digest(documents), "python": "x"}))
    SOURCES["pydocs"](None)
    assert not caplog.records
    facts.write_text(json.dumps({"core_sha256": "0" * 64, "python": "3.99.1"}))
    SOURCES["pydocs"](None)
    assert "3.99.1" in caplog.text and "not comparable" in caplog.text


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("text", None, "needs data.path=FILE"),
        ("text", "nowhere.txt", r"data.path=nowhere\.txt does not exist"),
        ("text", "nowhere.csv", r"neither \.txt nor \.jsonl"),
        ("pydocs", "a.txt", "use data=text"),
        ("wikitext2", "a.txt", "use data=text"),
        ("c4", "a.txt", "use data=text"),
    ],
)
def test_bad_paths(name: str, path: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOURCES[name](path)


@pytest.mark.parametrize("line", ["{", '"text"', "[1]", "{}", '{"text": 3}', '{"text": null}', "7"])
def test_a_bad_json_line_is_numbered(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 3 of data\.path"):
        SOURCES["text"](str(path))


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        SOURCES["text"](str(path))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_an_unreachable_hub_names_the_alternatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"neither cached nor reachable.*data=pydocs.*data=text data.path=FILE"):
        SOURCES[name](None)


def test_wikitext2_is_one_document_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {split: ["", f" = {split} = \n", "words \n"] for split in ("train", "validation", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_dict({"text": lines[split]}))
    texts = SOURCES["wikitext2"](None)
    assert texts["test"] == ["\n\n = test = \n\n\nwords \n"]
    assert "= train =" in texts["calibration"][0] and "= validation =" in texts["scoring"][0]


def test_c4_takes_test_text_from_the_validation_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    def shard(path: str, *, data_files: dict[str, str], split: str) -> datasets.Dataset:
        assert path == "allenai/c4"
        (name,) = data_files
        assert split == f"{name}[:{sources.C4_DOCUMENTS}]"
        return datasets.Dataset.from_dict({"text": [f"{name} {i:02d}" for i in range(40)]})

    monkeypatch.setattr(datasets, "load_dataset", shard)
    texts = SOURCES["c4"](None)
    assert texts["test"] == [f"validation {i:02d}" for i in range(40)]
    assert sorted(texts["scoring"] + texts["calibration"]) == [f"train {i:02d}" for i in range(40)]
    assert len(texts["scoring"]) == 5
