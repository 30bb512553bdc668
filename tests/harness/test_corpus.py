"""The embedded corpus: splits by file, identity, and what is left out."""

import hashlib

import pytest

from harness.corpus import Document, core_documents, digest, optional_documents


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return core_documents()


def test_each_file_is_in_one_split(documents: list[Document]) -> None:
    paths = [d.path for d in documents]
    assert len(paths) == len(set(paths)) and paths == sorted(paths)
    assert {d.split for d in documents} == {"test", "scoring", "calibration", "train"}
    assert core_documents("test") == [d for d in documents if d.split == "test"]


def test_a_split_depends_on_the_path_alone() -> None:
    paths = [f"package/module_{i}.py" for i in range(200)]
    for path in paths:
        bucket = int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % 100
        expected = "test" if bucket < 6 else "scoring" if bucket < 12 else "calibration" if bucket < 17 else "train"
        assert Document(path, "one text").split == Document(path, "another").split == expected
    assert {Document(path, "").split for path in paths} == {"test", "scoring", "calibration", "train"}


def test_shares(documents: list[Document]) -> None:
    total = sum(len(d.text) for d in documents)
    assert total > 5_000_000
    for split, share in (("test", 0.06), ("scoring", 0.06), ("calibration", 0.05)):
        assert 0.3 * share < sum(len(d.text) for d in documents if d.split == split) / total < 2.5 * share


def test_both_kinds_of_text_are_there(documents: list[Document]) -> None:
    paths = {d.path for d in documents}
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics/if"} <= paths
    assert all(d.text.strip() for d in documents)


def test_what_an_installation_may_lack_is_not_core(documents: list[Document]) -> None:
    for document in documents:
        parts = document.path.split("/")
        assert parts[0] not in ("site-packages", "test", "idlelib", "tkinter", "lib2to3", "encodings")
        assert "tests" not in parts[:-1]
    assert not {d.path for d in documents} & {d.path for d in optional_documents()}


def test_digest_identifies_paths_texts_and_order() -> None:
    a, b = Document("a", "x"), Document("b", "y")
    different = [
        [a, b],
        [b, a],
        [a],
        [Document("a", "y"), b],
        [Document("c", "x"), b],
        [Document("a", "xb"), b],
    ]
    assert len({digest(documents) for documents in different}) == len(different)
    assert digest([a, b]) == digest([Document("a", "x"), Document("b", "y")])
