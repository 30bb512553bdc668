"""The table that holds our methods against the libraries' own."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize

from harness.config import build, register_configs
from harness.parity import Pair, chosen, compare
from harness.records import Record
from methods.base import METHODS


def record(nll: list[float], seconds: float, status: str = "done") -> Record:
    result: dict[str, Any] = {"perplexity": {"value": 3.0}, "effective_bits": 3.1, "nll": nll}
    cost = {"seconds": {"quantize": seconds, "statistics": 1.0}, "quantize_peak_bytes": 2 * 10**9}
    labels = {"model": "m", "data": "d", "method": "x", "budget": "w3g128"}
    done = status == "done"
    return Record("k", status, {}, labels, None if done else "it fell over", result if done else {}, cost)


def test_windows_are_paired_and_seconds_include_statistics() -> None:
    base = [1.0, 2.0, 1.5, 1.2, 0.7, 1.9]
    row = compare(record([x + 0.01 for x in base], 2.0), record(base, 9.0))
    assert row["ratio"] == pytest.approx(1.01005, abs=1e-4)
    assert row["verdict"] == "worse"  # every window is worse by the same amount, however much windows differ
    assert row["times_faster"] == pytest.approx(10 / 3)
    assert row["our_peak_gb"] == 2
    assert compare(record([x - 0.01 for x in base], 2.0), record(base, 9.0))["verdict"] == "better"
    mixed = [x + d for x, d in zip(base, [0.02, -0.02, 0.01, -0.01, 0.02, -0.02], strict=True)]
    assert compare(record(mixed, 2.0), record(base, 9.0))["verdict"] == "no worse"


def test_a_failure_stays_in_the_table() -> None:
    row = compare(record([1.0, 2.0], 2.0), record([], 0.0, "failed"))
    assert row["their_status"] == "failed"
    assert row["their_reason"] == "it fell over"
    assert "ratio" not in row


def test_every_pair_of_the_table_names_methods_and_options_that_exist() -> None:
    register_configs()
    with initialize(version_base="1.3", config_path="../../conf"):
        config = compose("parity")
    pairs = chosen(config)
    assert len(pairs) == len(config.table)
    for pair in pairs.values():
        assert isinstance(pair, Pair)
        for options in (pair.ours, pair.theirs):
            others = {key: value for key, value in options.items() if key != "name"}
            build(METHODS[options["name"]], others, "method")
    config.pairs = ["nothing"]
    with pytest.raises(ValueError, match="unknown pair"):
        chosen(config)
