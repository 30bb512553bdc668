"""From a cell to its numbers: load, calibrate, quantize, count, evaluate. A session keeps what the cells of one
model and text share, so that a warm worker loads once.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness import accounting
from harness.cache import Cache, Entry
from harness.calibration import as_statistics, collect
from harness.cell import Cell
from harness.code import code_version
from harness.data import load_texts, windows
from harness.evaluate import batch_size, evaluate, reference
from harness.kv_cache import pack_cache, row_format
from harness.latency import LatencyTable
from harness.models import load
from harness.tasks import run_tasks
from harness.throughput import throughput
from harness.toolchains.environments import Environments
from harness.toolchains.service import ToolRunner
from methods.base import Context, Memo, Meter, Quantized, Stat, Statistics, Tracker, UniformMethod, no_meter, no_tracker
from methods.network import Network
from methods.toolchains.process import Tools


class Unsupported(Exception):
    """The method says that it cannot do this; the message says why."""


@dataclass
class Clock:
    """Seconds by phase. What came from the cache is charged as if it had been computed."""

    seconds: dict[str, float] = field(default_factory=dict)
    on_phase: Callable[[str], None] = lambda _: None
    recalled: float = 0.0
    """Seconds charged for what was not computed."""
    quantize_peak: int = 0
    """Peak bytes of the process that quantized, while it did."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and announce it."""
        self.on_phase(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def charge(self, name: str, entry: Entry) -> dict[str, Tensor]:
        """Add the cost of a value that was found in the cache, and return the value."""
        if entry.found:
            self.seconds[name] = self.seconds.get(name, 0.0) + entry.seconds
            self.recalled += entry.seconds
        return entry.value


class Session:
    """A loaded model with its texts, for cells that agree on `cell.model`, `cell.data` and `cell.seed`."""

    def __init__(
        self,
        cell: Cell,
        cache: Cache,
        device: str = "cpu",
        meter: Meter = no_meter,
        environments: Environments | None = None,
    ) -> None:
        self.model, self.data, self.seed = cell.model, cell.data, cell.seed
        self.environments = environments
        self.cache, self.device, self.meter = cache, torch.device(device), meter
        self.latency = LatencyTable(cache, self.device)
        loaded = load(cell.model, device)
        self.tokenizer, self.network, self.vocab_size = loaded.tokenizer, loaded.network, loaded.vocab_size
        self.windows = windows(load_texts(cell.data), loaded.tokenizer, cell.data, loaded.context)
        self.weights = loaded.digest

    def serves(self, cell: Cell) -> bool:
        """Whether the cell can run in this session."""
        return (cell.model, cell.data, cell.seed) == (self.model, self.data, self.seed)

    def run(self, cell: Cell, clock: Clock, track: Tracker = no_tracker) -> dict[str, Any]:
        """The numbers of a cell.

        Raises:
            Unsupported: the method cannot quantize this model to this budget.
            ValueError, FloatingPointError: bad input, or numbers that are no numbers.
        """
        reason = cell.method.supports(self.network, cell.budget)
        if reason is not None:
            raise Unsupported(reason)
        keys_and_values = row_format(cell.method.kv_cache)
        measure_layers = cell.evaluation.layer_error and cell.method.in_original_coordinates
        stats = cell.method.statistics | ({Stat.GRAM} if measure_layers else frozenset())
        with clock.phase("statistics"):
            statistics = self.statistics(stats, clock, track)
        peak = self.meter()
        with clock.phase("quantize"):
            quantized = self._quantize(cell, statistics, clock, track)
        clock.quantize_peak = peak()
        if quantized.spent is not None:
            clock.seconds["quantize"], clock.quantize_peak = quantized.spent
        packed = accounting.packed_copy(self.network, quantized)
        storage = accounting.storage(packed)
        storage["kv_bits"] = pack_cache(packed, keys_and_values)
        storage["limit_bits"] = _limit(cell, self.network)
        over = _budget_note(cell, storage["effective_bits"], storage["limit_bits"])
        with clock.phase("evaluate"):
            measured = self._evaluate(cell, packed, clock, track)
        if cell.evaluation.throughput:
            with clock.phase("throughput"):
                measured["throughput"] = throughput(self.network.model, packed, self.windows.test[0])
        layers = accounting.layers(self.network, quantized, statistics if measure_layers else None)
        ragged = accounting.ragged_note(self.network, cell.budget.group_size) if cell.method.uses_budget else None
        notes = [note for note in (over, ragged) if note]
        return {**measured, **storage, "layers": layers, "notes": notes}

    def statistics(self, stats: frozenset[Stat], clock: Clock, track: Tracker = no_tracker) -> Statistics:
        """Calibration statistics of the full-precision model: collected in one pass, or recalled."""
        if not stats:
            return _no_statistics

        def compute() -> dict[str, Tensor]:
            found = collect(self.network, self.windows.calibration.to(self.device), stats, track)
            return {f"{stat.value}/{group}": t for stat, groups in found.items() for group, t in groups.items()}

        identity = {
            "weights": self.weights,
            "tokens": _digest(self.windows.calibration),
            "stats": sorted(s.value for s in stats),
            "code": code_version("harness.calibration"),
        }
        flat = clock.charge("statistics", self.cache("statistics", identity, compute))
        nested: dict[Stat, dict[str, Tensor]] = {stat: {} for stat in stats}
        for name, tensor in flat.items():
            stat, group = name.split("/", 1)
            nested[Stat(stat)][group] = tensor.to(self.device)
        return as_statistics(self.network, nested)

    def memo(self, tokens: Tensor, clock: Clock, phase: str) -> Memo:
        """Remembers results that depend on the model, the calibration text and `tokens`, and charges their cost."""

        def memo(name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            identity = {
                "weights": self.weights,
                "tokens": [_digest(self.windows.calibration), _digest(tokens)],
                "options": dict(options),
                "code": code_version(compute.__module__),
            }
            return clock.charge(phase, self.cache(name, identity, compute, lambda: clock.recalled))

        return memo

    def _quantize(self, cell: Cell, statistics: Statistics, clock: Clock, track: Tracker) -> Quantized:
        working = copy.deepcopy(self.network.model)
        context = Context(
            network=Network(working, self.network.blocks),
            tokens=self.windows.calibration.to(self.device),
            scoring=self.windows.scoring.to(self.device),
            statistics=statistics,
            budget=cell.budget,
            generator=torch.Generator().manual_seed(cell.seed),
            memo=self.memo(self.windows.scoring, clock, "quantize"),
            track=track,
            meter=self.meter,
            latency=self.latency,
            tools=self._tools(),
        )
        return cell.method.quantize(context)

    def _tools(self) -> Tools | None:
        if self.environments is None:
            return None
        return ToolRunner(self.environments, self.network, self.tokenizer, self.windows.calibration)

    def _evaluate(self, cell: Cell, packed: Any, clock: Clock, track: Tracker) -> dict[str, Any]:
        chosen, tokens = cell.evaluation, self.windows.test
        batch = batch_size(tokens.shape[1], self.vocab_size)
        truth = self._reference(batch, clock) if chosen.kl else None
        measured = evaluate(Network(packed, ()), tokens, truth, self.windows.words, batch, chosen.bootstrap, track)
        tasks = {}
        if chosen.tasks:
            tasks = run_tasks(packed, self.tokenizer, chosen.tasks, chosen.limit, chosen.include_path, chosen.data)
        return {
            "perplexity": asdict(measured.ppl_token),
            "word_perplexity": measured.ppl_word,
            "kl": asdict(measured.kl) if measured.kl else None,
            "top1": asdict(measured.agreement) if measured.agreement else None,
            "nll": measured.nll,
            "tokens": measured.tokens,
            "length": measured.length,
            "tasks": tasks,
        }

    def _reference(self, batch: int, clock: Clock) -> Tensor:
        """Log-probabilities of the full-precision model on the test windows."""

        def compute() -> dict[str, Tensor]:
            return {"log_probabilities": reference(self.network, self.windows.test, batch)}

        identity = {
            "weights": self.weights,
            "tokens": _digest(self.windows.test),
            "code": code_version("harness.evaluate"),
        }
        return clock.charge("evaluate", self.cache("reference", identity, compute))["log_probabilities"]


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _no_statistics(stat: Stat, linear: str) -> Tensor:
    raise KeyError(f"statistic {stat.value} of {linear} was not declared in the method's `needs`")


def _limit(cell: Cell, network: Network) -> float | None:
    """Most bits a weight that the cell's budget allows, or None."""
    return cell.budget.limit(network.shapes, network.other_parameters) if cell.method.uses_budget else None


def _budget_note(cell: Cell, effective_bits: float, limit: float | None) -> str | None:
    """A sentence where a uniform width stores more than its budget allows (GPTQ's group index, SpQR's outliers).

    Raises:
        ValueError: a method that chooses widths stored more than its budget, which is a failure, not a data point.
    """
    if limit is None or effective_bits <= limit + 1e-9:
        return None
    excess = f"{cell.method.label} stored {effective_bits:.4f} bits a weight, over the {limit:.4f} of its budget"
    if isinstance(cell.method, UniformMethod):
        return excess
    raise ValueError(excess)
