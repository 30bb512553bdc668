"""One measurement in a fresh process: what a metric, or a whole quantization, takes on a random model of one size.

A process of its own keeps what was measured before out of the memory. It is forked from a server that has already
imported everything, because imports take longer than most measurements.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from multiprocessing.connection import Connection
from statistics import median
from textwrap import shorten
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.calibration import as_statistics, collect
from harness.config import build
from harness.memory import MemoryMeter
from methods.base import METHODS, Context, Stat, Statistics
from methods.budget import Budget
from methods.network import Network, discover
from methods.sensitivity.base import METRICS, Subject

BATCH = 8  # sequences in one forward pass, as calibration takes them
BITS = 4  # of the methods


@dataclass(frozen=True)
class Size:
    """A Llama with grouped-query attention, two heads to a key-value head, and an MLP three times as wide as its
    hidden states: 12 · hidden² parameters in the linears of a block."""

    hidden: int
    blocks: int
    heads: int
    vocabulary: int = 2048

    @property
    def parameters(self) -> int:
        """Weights of all linears to quantize."""
        return 12 * self.hidden**2 * self.blocks


SIZES = {
    "1M": Size(128, 5, 2),
    "4M": Size(256, 5, 4),
    "16M": Size(384, 9, 6),
    "64M": Size(640, 13, 10),
    "125M": Size(768, 18, 12),
    "350M": Size(1024, 28, 16),
    "1.3B": Size(2048, 26, 32),
    "3B": Size(2560, 38, 40),
    "7B": Size(4096, 32, 64),
    "tiny": Size(256, 8, 8),
    "7B-block": Size(4096, 1, 64),
}
"""By their parameters in linears; `tiny` is shaped like the embedded model."""


@dataclass(frozen=True)
class Point:
    """What to measure.

    Attributes:
        kind: `metric`, `method` or `forward`.
        name: of the metric or method.
        length: tokens a sequence.
        sequences: sequences of the text, for losses, gradients and calibration alike.
        options: of the metric or method.
        widths: in bits, of the candidate formats of metrics.
        group_size: columns that share a scale.
        threads: of torch; 0 leaves its choice.
        repeats: runs, if one takes less than `patience` seconds.
    """

    kind: str
    name: str
    size: Size
    length: int
    sequences: int
    options: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int = 128
    device: str = "cpu"
    threads: int = 0
    seed: int = 0
    repeats: int = 3
    patience: float = 10.0


@dataclass(frozen=True)
class Measurement:
    """What it took.

    Attributes:
        seconds: of each run: calibration statistics and the metric, or calibration and rounding.
        passes: see `methods.sensitivity.base.Cost`, with those of the calibration; None where nobody counts.
        base_bytes: memory in use before the first run: on a CPU the process with the model, on a GPU the model.
        peak_bytes: largest memory in use during the first run.
    """

    seconds: tuple[float, ...]
    passes: int | None
    base_bytes: int
    peak_bytes: int

    @property
    def typical(self) -> float:
        """Median of the seconds."""
        return median(self.seconds)

    @property
    def extra_bytes(self) -> int:
        """Peak beyond the loaded model."""
        return self.peak_bytes - self.base_bytes


def measure_alone(point: Point, patience: float) -> Measurement | str:
    """`measure` in a fresh process; or one sentence that says why there is no number.

    Args:
        patience: seconds after which the process is stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(point, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(patience) else f"it was stopped after {patience:.0f} s"
    except EOFError:
        process.join()
        return f"its process ended with status {process.exitcode}, as happens when memory runs out"
    finally:
        process.kill()
        process.join()
        ours.close()


def _child(point: Point, pipe: Connection) -> None:
    logging.disable(logging.WARNING)  # that traces are negative is chance in a random model
    try:
        pipe.send(measure(point))
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        pipe.send(shorten(f"{type(error).__name__}: {error}", 200))


def measure(point: Point) -> Measurement:
    """Run it in this process, with a new model for every run, because methods overwrite weights."""
    if point.threads:
        torch.set_num_threads(point.threads)
    generator = torch.Generator().manual_seed(point.seed)
    tokens = torch.randint(point.size.vocabulary, (point.sequences, point.length), generator=generator)
    tokens = tokens.to(point.device)
    meter, work = MemoryMeter(), KINDS[point.kind]
    network = random_network(point)
    _trim()
    base, peak = meter()(), meter()
    passes, first = _timed(work, point, network, tokens)
    peak_bytes, seconds = peak(), [first]
    while len(seconds) < point.repeats and first < point.patience:
        del network
        network = random_network(point)
        seconds.append(_timed(work, point, network, tokens)[1])
    return Measurement(tuple(seconds), passes, base, peak_bytes)


def _timed(work: Work, point: Point, network: Network, tokens: Tensor) -> tuple[int | None, float]:
    began = perf_counter()
    passes = work(point, network, tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return passes, perf_counter() - began


def random_network(point: Point) -> Network:
    """The model of the point's size, in fp32; on a GPU in bf16, unless second derivatives are asked for.

    Weights are of standard deviation hidden^(−½), so that a block changes its input about as much at every width.
    """
    size = point.size
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=max(size.heads // 2, 1),
        max_position_embeddings=point.length,
        tie_word_embeddings=True,
        initializer_range=size.hidden**-0.5,
    )
    with torch.random.fork_rng(), torch.device(point.device):
        torch.manual_seed(point.seed)
        model: nn.Module = LlamaForCausalLM(config)
    return discover(model.to(point.device, dtype(point)).eval().requires_grad_(False), size.vocabulary)


def dtype(point: Point) -> torch.dtype:
    """Precision of the model's weights."""
    # Metrics of the Hessian are those that can hold one block's graph at a time.
    second_order = point.kind == "metric" and hasattr(METRICS[point.name], "blockwise")
    return torch.float32 if second_order or point.device == "cpu" else torch.bfloat16


def _trim() -> None:
    """Give freed memory back to the system, where it would otherwise be taken for the model's."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def _forward(point: Point, network: Network, tokens: Tensor) -> int:
    """One pass over the text, the unit of the others."""
    del point
    for batch in tokens.split(BATCH):
        network.logits(batch)
    return ceil(len(tokens) / BATCH)


def _metric(point: Point, network: Network, tokens: Tensor) -> int:
    metric = build(METRICS[point.name], point.options, f"options.{point.name}")
    statistics, passes = _statistics(network, tokens, metric.needs)
    formats = tuple(Budget(bits=width, group_size=point.group_size).format() for width in point.widths)
    return metric(Subject(network, tokens, tokens, formats, statistics, point.seed)).cost.passes + passes


def _method(point: Point, network: Network, tokens: Tensor) -> None:
    method = build(METHODS[point.name], point.options, f"options.{point.name}")
    statistics, _ = _statistics(network, tokens, method.statistics)
    generator = torch.Generator().manual_seed(point.seed)
    method.quantize(Context(network, tokens, tokens, statistics, Budget(BITS, group_size=point.group_size), generator))


def _statistics(network: Network, tokens: Tensor, stats: frozenset[Stat]) -> tuple[Statistics, int]:
    """Calibration statistics and the passes they took."""
    if not stats:
        return as_statistics(network, {}), 0
    return as_statistics(network, collect(network, tokens, stats, batch_size=BATCH)), ceil(len(tokens) / BATCH)


Work = Callable[[Point, Network, Tensor], int | None]
KINDS: dict[str, Work] = {"forward": _forward, "metric": _metric, "method": _method}
