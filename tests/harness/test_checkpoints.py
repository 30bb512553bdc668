"""Checkpoints on disk and on the hub: what is found, and what is said when nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from harness import checkpoints

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def fill(cache: Path, *files: str) -> Path:
    """The layout of huggingface_hub's cache for one revision of some/model."""
    snapshot = cache / "models--some--model/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text("{}")
    (cache / "models--some--model/refs").mkdir()
    (cache / "models--some--model/refs/main").write_text(COMMIT)
    return snapshot


def test_locate(directory: Path) -> None:
    assert checkpoints.locate(str(directory)) == directory
    assert (checkpoints.locate("package:tiny") / "model.safetensors").is_file()


def test_missing_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", "package:absent"):
        with pytest.raises(ValueError, match=r"model\.path=.*absent is not a directory; name one with config\.json"):
            checkpoints.locate(str(path))


def test_directory_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; name the directory of a Hugging Face checkpoint"):
        checkpoints.locate(str(tmp_path))


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    for allow_pickle in (False, True):
        with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*; save the weights as safetensors"):
            checkpoints.weight_files(directory, allow_pickle)


def test_safetensors_come_before_pickles(directory: Path) -> None:
    (directory / "pytorch_model.bin").touch()
    for allow_pickle in (False, True):
        assert checkpoints.weight_files(directory, allow_pickle) == [directory / "model.safetensors"]
    (directory / "model.safetensors").unlink()
    assert checkpoints.weight_files(directory, allow_pickle=True) == [directory / "pytorch_model.bin"]
    with pytest.raises(ValueError, match=r"can run code .* model\.allow_pickle=true"):
        checkpoints.weight_files(directory, allow_pickle=False)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_damaged_index(directory: Path, text: str) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="does not say which file holds which tensor"):
        checkpoints.weight_files(directory, allow_pickle=False)


def test_shards(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "b.safetensors")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists files that are missing \(a\.safetensors\)"):
        checkpoints.weight_files(directory, allow_pickle=False)
    (directory / "a.safetensors").touch()
    files = [directory / "a.safetensors", directory / "b.safetensors"]
    assert checkpoints.weight_files(directory, allow_pickle=False) == files


def test_digest_is_of_contents(directory: Path) -> None:
    first = checkpoints.digest(directory, allow_pickle=False, code=False)
    assert checkpoints.digest(directory, allow_pickle=False, code=True) == first
    (directory / "README.md").write_text("not read by load")
    assert checkpoints.digest(directory, allow_pickle=False, code=False) == first
    (directory / "modeling.py").write_text("raise SystemExit")
    assert checkpoints.digest(directory, allow_pickle=False, code=False) == first
    assert checkpoints.digest(directory, allow_pickle=False, code=True) != first
    (directory / "model.safetensors").write_bytes(b"WEIGHTS")  # the same size
    assert checkpoints.digest(directory, allow_pickle=False, code=False) != first


def test_files_are_read_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checkpoints.digest(directory, allow_pickle=False, code=False)
    monkeypatch.delattr(Path, "open")
    assert checkpoints.digest(directory, allow_pickle=False, code=False) == first


def test_cached_model_needs_no_hub(cache: Path) -> None:
    snapshot = fill(cache, "config.json", "model.safetensors")
    assert checkpoints.download("some/model", None, allow_pickle=False) == snapshot
    assert checkpoints.download("some/model", COMMIT, allow_pickle=False) == snapshot


def test_offline_and_not_cached(cache: Path) -> None:
    del cache
    with pytest.raises(ValueError, match=r"some/model is not in the local cache.*HF_HUB_OFFLINE.*model=tiny$"):
        checkpoints.download("some/model", None, allow_pickle=False)


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the hub answer every request with `error`."""

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize("error", [httpx.ProxyError("no"), httpx.ConnectTimeout("no"), OSError("no")])
def test_hub_out_of_reach(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, error)
    with pytest.raises(ValueError, match=r"the hub is out of reach.*model=tiny$"):
        checkpoints.download("some/model", None, allow_pickle=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, r"some/model is gated: accept its license .*`hf auth login`"),
        (errors.RepositoryNotFoundError, r"the hub has no model 'some/model' at revision v9; name one as"),
        (errors.RevisionNotFoundError, r"the hub has no model 'some/model' at revision v9"),
    ],
)
def test_hub_refuses(kind: type[errors.HfHubHTTPError], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://hub"))))
    with pytest.raises(ValueError, match=message):
        checkpoints.download("some/model", "v9", allow_pickle=False)


def test_impossible_name() -> None:
    with pytest.raises(ValueError, match="the hub has no model 'a/b/c'; name one as ORGANIZATION/MODEL"):
        checkpoints.download("a/b/c", None, allow_pickle=False)


def test_pickles_are_fetched_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fake(_: str, *, allow_patterns: list[str], **__: object) -> str:
        fetched.append(allow_patterns[0])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    checkpoints.download("some/model", None, allow_pickle=False)
    assert fetched == ["model*.safetensors"]
    checkpoints.download("some/model", None, allow_pickle=True)
    assert fetched[1:] == ["model*.safetensors", "pytorch_model*.bin"]
    (tmp_path / "model.safetensors").touch()
    checkpoints.download("some/model", None, allow_pickle=True)
    assert fetched[3:] == ["model*.safetensors"]
