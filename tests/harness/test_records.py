"""Records are written whole or not at all, and never believed when altered."""

import json
import multiprocessing

import pytest

from harness.records import DONE, Record, Store, canonical, digest, write_atomically


def record(key: str = "ab12", **changes: object) -> Record:
    values: dict = {
        "key": key,
        "status": DONE,
        "cell": {"model": {"name": "tiny"}},
        "labels": {"model": "tiny"},
        "result": {"perplexity": {"value": 12.5}},
    }
    return Record(**{**values, **changes})


def test_a_record_reads_back_equal(tmp_path):
    store = Store(tmp_path)
    store.write(record())
    assert store.read("ab12") == record()
    assert store.all() == [record()]


def test_a_missing_record_is_none_and_silent(tmp_path, caplog):
    assert Store(tmp_path).read("ab12") is None
    assert not caplog.records


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],  # torn
        lambda text: text.replace("12.5", "11.5"),  # a flipped digit
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({"key": "ab12", "status": "done"}),  # foreign
        lambda text: text.replace('"schema": 1', '"schema": 99'),
    ],
)
def test_a_damaged_record_is_reported_and_not_used(tmp_path, caplog, damage):
    store = Store(tmp_path)
    store.write(record())
    store.path("ab12").write_text(damage(store.path("ab12").read_text()))
    assert store.read("ab12") is None
    assert store.all() == []
    assert "computed again" in caplog.text


def test_a_record_under_another_key_is_not_used(tmp_path):
    store = Store(tmp_path)
    store.write(record("ab12"))
    store.path("ab12").rename(store.path("cd34"))
    assert store.read("cd34") is None


def test_nan_cannot_enter_a_record(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        Store(tmp_path).write(record(result={"perplexity": float("nan")}))
    assert Store(tmp_path).all() == []


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, "old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def _write_many(folder: str, who: int) -> None:
    store = Store(folder)
    for i in range(40):
        store.write(record(f"{i:04}", cell={"writer": who, "padding": "x" * 10_000}))


def test_two_sweeps_writing_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), who)) for who in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [r.key for r in Store(tmp_path).all()] == [f"{i:04}" for i in range(40)]


def test_digest_depends_on_content_not_on_order():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert canonical({"b": 1, "a": 2}) == '{"a":2,"b":1}'
