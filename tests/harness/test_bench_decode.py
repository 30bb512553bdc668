"""What the bench of whole models measures: the formats it makes, and its page."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from harness.bench import decode
from harness.bench.decode import DecodeBench, decode_page, measure, rounded
from methods.network import Network


def test_formats_by_name(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    assert {packed.bits for packed in rounded(network, "w3").packed.values()} == {3}
    assert not rounded(network, "w3").inputs
    assert set(rounded(network, "w4a8").inputs) == set(network.linears)
    with pytest.raises(ValueError, match="unknown format 'w4a4': take wN or wNa8"):
        rounded(network, "w4a4")


def test_a_row_for_each_dtype_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def throughput(reference: object, model: object, prompt: object, rounds: int) -> dict[str, dict[str, float]]:
        return {"decode": {"value": 5.0, "low": 4.0, "high": 6.0}}

    monkeypatch.setattr(decode, "throughput", throughput)
    frame = pd.DataFrame(measure(DecodeBench(formats=["w4", "w2a8"]), "1M"))
    assert frame["dtype"].tolist() == ["float32"] * 2 + ["bfloat16"] * 2
    assert frame["effective_bits"].round(2).tolist() == [4.16, 2.14] * 2
    page = decode_page(frame.fillna(float("nan")), "a machine", DecodeBench())
    assert "## 1M, bfloat16: 1 · 10⁶ weights" in page
    assert "5 [4, 6]" in page.replace("\\", "")
