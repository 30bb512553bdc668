"""Work beside the cells."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from harness.claims import runner
from harness.config import RunConfig


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_task_beside_the_cells_gets_a_jobs_share_of_the_cores() -> None:
    torch.set_num_threads(4)
    seen: list[tuple[int, int]] = []
    runner.run([], RunConfig(), 2, quiet(), [lambda run: seen.append((run.threads, torch.get_num_threads()))])
    assert seen == [(2, 2)]


def test_its_failure_is_not_lost() -> None:
    def fails(_: RunConfig) -> None:
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        runner.run([], RunConfig(), 1, quiet(), [fails])
