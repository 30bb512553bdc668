"""Time on a GPU: launches in a CUDA graph, so that the host's pace does not enter, replayed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

WARM = 2


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all calls, after each has run outside of it: compilation and allocation are done by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:WARM]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def interleaved(graphs: Sequence[torch.cuda.CUDAGraph], rounds: int) -> list[float]:
    """Microseconds of a replay of each, the median over rounds in which each has a turn."""
    times: list[list[float]] = [[] for _ in graphs]
    for graph in graphs:
        graph.replay()
    for _ in range(rounds):
        for graph, taken in zip(graphs, times, strict=True):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            taken.append(1e3 * began.elapsed_time(ended))
    return [median(taken) for taken in times]
