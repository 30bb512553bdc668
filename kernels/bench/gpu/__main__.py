"""`python -m kernels.bench.gpu`: every kernel and every peer on one GPU, as tables and figures.

Needs only torch, triton and numpy; libraries that are there besides are compared with, and matplotlib draws. Results
are checked against float64 before anything is timed. Weights rotate through three times the L2 cache, launches are
replayed from CUDA graphs, and all contenders for a product take turns in one process.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.bench.gpu.shapes import EFFORT, SHAPES, TOKENS, Shape
from kernels.triton import missing

if TYPE_CHECKING:  # what needs Triton is imported once it is known to be there
    from kernels.bench.gpu.contenders import Contender

TOLERANCE = 0.02  # relative; bf16 results
ROUNDS = 25
CACHES = 3  # times the L2 cache that weights rotate through
MOST_COPIES = 64
COMPILED = 2  # shapes that torch.compile is tried on: it takes its time
FAILURES = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    OSError,
)
"""What a peer may raise that does not take this shape, GPU or version; noted beside it."""


@dataclass(frozen=True)
class Row:
    """One time.

    Args:
        roof: fraction of the measured read rate that reading the weights alone makes of the time.
        error: relative to float64; NaN if unchecked.
        note: why there is no time.
    """

    rows: int
    columns: int
    linear: str
    tokens: int
    name: str
    weight_bytes: int
    microseconds: float
    roof: float
    speedup: float
    error: float
    note: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels.bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder for tables and figures")
    parser.add_argument("--seconds", type=float, default=480, help="no new product is begun after so long")
    parser.add_argument("--list", action="store_true", help="print the products that are timed, and stop")
    parser.add_argument("--no-peers", action="store_true", help="only our kernels and cuBLAS")
    options = parser.parse_args(arguments)
    if options.list:
        for shape, tokens in products():
            print(f"{tokens:>5} × {shape.columns:>6} × {shape.rows:>6}  {shape.linear}")
        return 0
    if reason := missing() or (None if torch.cuda.is_available() else "no CUDA device is there, so nothing is timed"):
        print(reason, file=sys.stderr)
        return 1
    measure(options.out, monotonic() + options.seconds, not options.no_peers)
    return 0


def products() -> Iterator[tuple[Shape, int]]:
    """What is multiplied: the most important first."""
    for tokens in TOKENS:
        for shape in SHAPES[: EFFORT[tokens]]:
            yield shape, tokens


def measure(out: Path, deadline: float, peers: bool) -> None:
    """Time all, and write what there is after every product."""
    from kernels.bench.gpu.ceilings import ceilings

    out.mkdir(parents=True, exist_ok=True)
    roofs = ceilings()
    write(out / "ceilings.csv", [{"what": name, "per_second": f"{rate:.4g}"} for name, rate in roofs.items()])
    print(", ".join(f"{name} {rate / 1e12:.4g} T/s" for name, rate in roofs.items()), flush=True)
    table: list[Row] = []
    pending = list(products())
    while pending and monotonic() < deadline:
        shape, tokens = pending.pop(0)
        found = timed(shape, tokens, roofs["read"], peers)
        table += found
        write(out / "products.csv", [asdict(row) for row in table])
        write(out / "fits.csv", fits(table))
        for row in found:
            print(f"{tokens:>5} {shape.rows:>6} {shape.columns:>6} {row.name:28} {row.microseconds:9.2f} us "
                  f"{row.roof:6.1%} {row.speedup:5.2f}x {row.note}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    if pending:
        print(f"time is up: {len(pending)} products are left out, from {pending[0]} on")
    draw(out, table)


def timed(shape: Shape, tokens: int, read: float, peers: bool) -> list[Row]:
    """All contenders for one product, cuBLAS first."""
    from kernels.bench.gpu.contenders import OURS, dense
    from kernels.bench.gpu.peers import PEERS, compiled_int8
    from kernels.bench.gpu.replay import captured, interleaved

    blank = Row(shape.rows, shape.columns, shape.linear, tokens, "", 0, np.nan, np.nan, np.nan, np.nan, "")
    x = torch.randn(tokens, shape.columns, dtype=torch.bfloat16, device="cuda")
    graphs, rows, kept = [], [], []
    for maker in (dense, *OURS, *(PEERS if peers else ())):
        if maker is compiled_int8 and shape not in SHAPES[:COMPILED]:
            continue
        values = asdict(blank) | {"name": getattr(maker, "__name__", str(maker))}
        try:
            contender = maker(shape, tokens)
            values |= {"name": contender.name, "weight_bytes": contender.weight_bytes}
            values["error"] = error(contender, x)
            if values["error"] > TOLERANCE:
                raise ValueError(f"wrong: relative error {values['error']:.2g}")
            weights = [contender.weight, *(contender.fresh() for _ in range(copies(contender.weight_bytes) - 1))]
            graphs.append(captured([partial(contender.call, x, weight) for weight in weights]))
            kept.append(weights)  # graphs do not hold what they read
        except FAILURES as failure:
            values["note"] = f"{type(failure).__name__}: {failure}".split("\n")[0][:160]
        rows.append(values)
    times = iter(interleaved(graphs, ROUNDS))
    sizes = iter(len(weights) for weights in kept)
    for values in rows:
        if not values["note"]:
            values["microseconds"] = next(times) / next(sizes)
            values["roof"] = 1e6 * values["weight_bytes"] / read / values["microseconds"]
            values["speedup"] = rows[0]["microseconds"] / values["microseconds"]
    return [Row(**values) for values in rows]


def error(contender: Contender, x: torch.Tensor) -> float:
    """Of a result, relative to float64; NaN where nothing is known to compare with."""
    matrix = contender.truth()
    if not matrix.numel():
        return float("nan")
    inputs = x if contender.inputs is None else contender.inputs(x.float())
    expected = inputs.double() @ matrix.double().t()
    result = contender.call(x, contender.weight)[: len(x)].double()
    return float((result - expected).norm() / expected.norm())


def copies(size: int) -> int:
    """Weights that do not fit into the cache together."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(2, -(-CACHES * cache // size)), MOST_COPIES)


def fits(table: Sequence[Row]) -> list[dict[str, object]]:
    """For single tokens, time = start + bytes / rate over all shapes, by least squares."""
    result: list[dict[str, object]] = []
    for name in dict.fromkeys(row.name for row in table):
        points = [(r.weight_bytes, r.microseconds) for r in table if r.name == name and r.tokens == 1 and not r.note]
        if len({size for size, _ in points}) > 1:
            sizes, times = np.array(points, float).T
            slope, start = np.polyfit(sizes, times, 1)
            result.append({"name": name, "start_us": f"{start:.3g}", "terabytes_per_second": f"{1e-6 / slope:.4g}"})
    return result


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """As CSV; nothing if there are no rows."""
    if rows:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)


def draw(out: Path, table: Sequence[Row]) -> None:
    """Speedup over cuBLAS against tokens, a panel for each shape that was taken at several."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not there: the tables are written, and figures are not")
        return
    shapes = [s for s in SHAPES if len({r.tokens for r in table if (r.rows, r.columns) == s[:2]}) > 1]
    for shape in shapes:
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for name in dict.fromkeys(row.name for row in table):
            points = [(r.tokens, r.speedup) for r in table if (r.rows, r.columns, r.name) == (*shape[:2], name)]
            axes.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axes.set(xscale="log", xlabel="tokens", ylabel="speedup over cuBLAS bf16")
        axes.set_title(f"{shape.linear}, {shape.rows} × {shape.columns}")
        axes.legend(fontsize=7)
        figure.savefig(out / f"speedup_{shape.rows}x{shape.columns}.png", dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
