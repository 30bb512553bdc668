"""The cache computes once, survives damage, and never fails a cell."""

import pytest
import torch

from harness.cache import Cache


class Counted:
    """A computation that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {
            "gram": torch.arange(6.0).view(2, 3).t(),
            "count": torch.tensor(3),
            "half": torch.ones(2).half(),
        }


def test_the_second_call_finds_the_first_result(tmp_path):
    compute = Counted()
    first = Cache(tmp_path)("statistics", {"weights": "a"}, compute)
    second = Cache(tmp_path)("statistics", {"weights": "a"}, compute)
    assert compute.calls == 1
    assert not first.found and second.found
    assert second.seconds == first.seconds
    for name, value in first.value.items():
        assert torch.equal(value, second.value[name]) and value.dtype == second.value[name].dtype


@pytest.mark.parametrize("other", [{"weights": "b"}, {"weights": "a", "seed": 0}, {}])
def test_another_identity_is_another_entry(tmp_path, other):
    compute, cache = Counted(), Cache(tmp_path)
    cache("statistics", {"weights": "a"}, compute)
    cache("statistics", other, compute)
    assert compute.calls == 2


@pytest.mark.parametrize("where", [10, -5])  # in the header, in the numbers
def test_a_flipped_bit_is_noticed(tmp_path, caplog, where):
    compute, cache = Counted(), Cache(tmp_path)
    cache("statistics", {}, compute)
    file = next(tmp_path.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[where] ^= 4
    file.write_bytes(data)
    entry = cache("statistics", {}, compute)
    assert compute.calls == 2 and not entry.found
    assert "computing it again" in caplog.text
    assert cache("statistics", {}, compute).found


def test_a_truncated_entry_is_noticed(tmp_path):
    compute, cache = Counted(), Cache(tmp_path)
    cache("statistics", {}, compute)
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    assert not cache("statistics", {}, compute).found


def test_an_unwritable_cache_costs_time_and_nothing_else(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    compute = Counted()
    entry = Cache(blocked)("statistics", {}, compute)
    assert entry.value["count"] == 3
    assert "cannot keep" in caplog.text


def test_what_cached_parts_saved_belongs_to_the_cost(tmp_path):
    """A metric that builds on a cached one is charged for both, now and when it is found again."""
    saved = [100.0]

    def compute() -> dict[str, torch.Tensor]:
        saved[0] += 7.0
        return {"omega": torch.ones(1)}

    first = Cache(tmp_path)("hawq_v2", {}, compute, lambda: saved[0])
    again = Cache(tmp_path)("hawq_v2", {}, compute, lambda: saved[0])
    assert 7.0 <= first.seconds < 8.0
    assert again.found
    assert again.seconds == first.seconds
