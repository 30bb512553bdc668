from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.bench.gpu.__main__ import Row, draw, fits, main, products, write
from kernels.bench.gpu.shapes import SHAPES


def row(name: str, tokens: int, size: int, time: float, note: str = "") -> Row:
    return Row(4096, 4096, "Llama-3-8B o_proj", tokens, name, size, time, 0.5, 2.0 / tokens, 0.001, note)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "CUDA" in said or "Triton" in said


def test_single_tokens_come_first_and_no_product_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list(products())) == len(set(products()))
    assert [tokens for _, tokens in products()][: len(SHAPES)] == [1] * len(SHAPES)
    assert len({shape[:2] for shape in SHAPES}) == len(SHAPES)


def test_a_start_and_a_rate_are_fitted_to_single_tokens() -> None:
    table = [row("ours", 1, size, 3 + 1e6 * size / 4e12) for size in (10**7, 10**8, 10**9)]
    table += [row("ours", 16, 10**7, 999.0), row("ours", 1, 10**6, np.nan, "wrong"), row("once", 1, 10**7, 5.0)]
    (found,) = fits(table)
    assert found == {"name": "ours", "start_us": "3", "terabytes_per_second": "4"}


def test_tables_and_figures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = [row("ours", tokens, 10**7, 3.0) for tokens in (1, 16)]
    draw(tmp_path, table)
    assert (tmp_path / "speedup_4096x4096.png").stat().st_size > 1000
    write(tmp_path / "some.csv", fits([*table, row("ours", 1, 10**8, 30.0)]))
    assert (tmp_path / "some.csv").read_text().startswith("name,start_us")
    write(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()
