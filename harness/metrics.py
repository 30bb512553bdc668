"""A record's numbers under one flat name each, as tables and wandb show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.records import Record

ENDS = {"value": "", "low": "_low", "high": "_high"}
INTERVALS = ("perplexity", "kl", "top1")
RATES = ("prefill", "prefill_speedup", "decode", "decode_speedup")
NUMBERS = (
    "word_perplexity",
    "tokens",
    "length",
    "effective_bits",
    "limit_bits",
    "kv_bits",
    "linear_bytes",
    "model_bytes",
    "embedding_bytes",
    "head_bytes",
)
PHASES = ("load", "statistics", "quantize", "evaluate", "total")
NUMERIC = (
    *(f"{name}{end}" for name in (*INTERVALS, *RATES) for end in ENDS.values()),
    *NUMBERS,
    *(f"seconds_{phase}" for phase in PHASES),
    "peak_bytes",
)


def metrics(record: Record) -> dict[str, Any]:
    """A record's numbers under one flat name each; what was not measured is None.

    Intervals become `name`, `name_low` and `name_high`; tasks `task.metric`; costs `seconds_phase` and
    `peak_bytes`.
    """
    flat: dict[str, Any] = dict.fromkeys(NUMERIC)
    flat |= ends(record.result, INTERVALS) | ends(record.result.get("throughput", {}), RATES)
    flat |= {name: record.result.get(name) for name in NUMBERS}
    flat |= {f"seconds_{phase}": record.cost.get("seconds", {}).get(phase) for phase in PHASES}
    flat["peak_bytes"] = record.cost.get("peak_bytes")
    for task, values in record.result.get("tasks", {}).items():
        flat |= {f"{task}.{metric}": value for metric, value in values.items()}
    return flat


def ends(found: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Intervals under flat names: `name`, `name_low` and `name_high`."""
    return {f"{name}{end}": (found.get(name) or {}).get(key) for name in names for key, end in ENDS.items()}
