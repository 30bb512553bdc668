"""Tests of harness.report on synthetic records whose differences are known."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness.records import Record, Store, digest
from harness.report import figures, frame, style, tables, terminal
from harness.report import report as write_report

HOSTILE = r"a_b $x^2$ & 50% #1 {y} \z ~ <b>|*c*|</b> [l](u) `d`"
LAYERS = [f"model.layers.{i}.{kind}" for i in range(8) for kind in ("self_attn.q_proj", "mlp.up_proj")]
BITS = {"w2g128": 2, "w3g128": 3, "w4g128": 4, "w8g128": 8, "b3.25g128": 3.25}
# Nats that a method loses at a width of b bits: factor * 4^-b.
FACTOR = {"rtn": 40.0, "gptq": 9.0, "awq": 10.0, "hawq_v1": 34.0, "hawq_v2": 30.0, "hawq_v2 rounding=gptq": 6.0}


def make(
    method: str = "rtn",
    budget: str = "w4g128",
    status: str = "done",
    loss: float = 0.0,
    noise: float = 0.001,
    reason: str | None = None,
    model: str = "tiny",
    seed: int = 0,
    created: str = "2026-01-01T00:00:00+00:00",
    **data: Any,
) -> Record:
    """A record whose sequences lose `loss` nats against fp16, with `noise` from sequence to sequence."""
    name = method.split()[0]
    bits = BITS.get(budget, 16)
    cell = {
        "model": {"name": model, "path": None},
        "data": {"name": "pydocs", "length": 512, "seed": seed, **data},
        "method": {"name": name},
        "budget": {"name": budget, "bits": bits if budget.startswith("w") else None, "effective_bits": bits},
        "evaluation": {"tasks": [], "kl": True},
        "seed": seed,
    }
    labels = {"model": model, "data": "pydocs", "method": method, "budget": "–" if name == "fp16" else budget}
    record = Record(
        digest([cell, method, created]), status, cell, labels, reason, created=created, environment={"git": "abc123"}
    )
    return replace(record, result=result(method, bits, loss, noise), cost=COST) if status == "done" else record


COST = {"seconds": {"load": 1.0, "statistics": 2.0, "quantize": 3.25, "evaluate": 4.0, "total": 10.0}, "peak_bytes": 2**30}


def result(method: str, bits: float, loss: float, noise: float) -> dict[str, Any]:
    common = np.random.default_rng(7).normal(2.5, 0.3, 64)
    own = np.random.default_rng(sum(method.encode()) + int(bits * 100)).normal(0, 1, 64)
    nll = common + loss + noise * (own - own.mean())
    value = math.exp(nll.mean())
    kl = max(loss, 1e-6) * 0.8
    mixed = bits != int(bits)
    return {
        "perplexity": {"value": value, "low": value * 0.93, "high": value * 1.07},
        "word_perplexity": value**2,
        "kl": None if method == "fp16" else {"value": kl, "low": kl * 0.9, "high": kl * 1.1},
        "top1": None if method == "fp16" else {"value": 0.9, "low": 0.88, "high": 0.92},
        "nll": nll.tolist(),
        "tokens": 64 * 511,
        "length": 512,
        "effective_bits": bits if method == "fp16" or mixed else bits + 0.25,
        "linear_bytes": int(bits * 1e6),
        "model_bytes": int(bits * 1e6) + 10**6,
        "embedding_bytes": 10**6,
        "head_bytes": 0,
        "layers": [
            {"name": n, "bits": (2 if i % 3 else 8) if mixed else bits, "effective_bits": bits, "output_error": 0.01, "sensitivity": None}
            for i, n in enumerate(LAYERS)
        ],
        "tasks": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.01}},
        "notes": [],
    }


@pytest.fixture(scope="module")
def sweep() -> list[Record]:
    """A full sweep: methods × budgets, with one failure, skips for the mixed budget, and a gap."""
    records = [make("fp16", "–")]
    for method, factor in FACTOR.items():
        for budget, bits in BITS.items():
            if budget == "b3.25g128" and not method.startswith("hawq"):
                records.append(make(method, budget, "skipped", reason="uniform widths cannot meet a bound"))
            elif (method, budget) == ("hawq_v1", "w2g128"):
                records.append(make(method, budget, "failed", reason=f"the Hessian of\n{HOSTILE} is singular"))
            elif (method, budget) != ("hawq_v1", "w8g128"):
                records.append(make(method, budget, loss=factor * 4.0**-bits))
    return records


@pytest.fixture(scope="module")
def tidy(sweep: list[Record]) -> pd.DataFrame:
    return frame.build(sweep)


def pick(table: pd.DataFrame, method: str, budget: str) -> pd.Series:
    (row,) = (r for _, r in table.iterrows() if (r["method"], r["budget"]) == (method, budget))
    return row
