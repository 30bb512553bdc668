"""What the bench of quantization compares: the paper's own form of GPTQ, and every method that can run alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from harness.bench import quantize
from harness.bench.measure import SIZES, Measurement, Point
from harness.bench.quantize import QuantizeBench, cost_of_methods, gptq_beside_the_paper, measurable
from harness.bench.textbook import textbook_gptq
from methods.formats.integer import Integer
from methods.rounding.gptq import GPTQRounding


def problem(out: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(out, columns, generator=generator), x.T @ x / len(x)


def eliminated(weight: Tensor, gram: Tensor, fmt: Integer) -> Tensor:
    """Optimal brain quantization in a fixed order, by explicit elimination from the inverse, in fp64."""
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    current, inverse, codes = weight.double(), torch.linalg.inv(damped), []
    for j in range(weight.shape[1]):
        if j % fmt.group_size == 0:
            scale, zero = fmt.scale_and_zero(current[:, j : j + fmt.group_size])
        codes.append((torch.round(current[:, j] / scale) + zero).clamp(0, 2**fmt.width - 1))
        error = current[:, j] - scale * (codes[-1] - zero)
        current = current - torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.stack(codes, 1)


def test_the_textbook_form_is_the_papers_algorithm() -> None:
    weight, gram = problem(24, 160)
    fmt = Integer(3, 32)
    codes, rounded = textbook_gptq(weight, gram, fmt)
    assert (codes == eliminated(weight, gram, fmt)).float().mean() >= 0.999
    ours = GPTQRounding()(weight, fmt, gram)
    assert (ours.packed.unpacked_codes() == codes).float().mean() >= 0.999
    assert (ours.weight == rounded).float().mean() >= 0.999


def test_gptq_is_compared_code_for_code() -> None:
    frame, page = gptq_beside_the_paper(QuantizeBench(shapes=[[24, 160]], repeats=2), "a machine")
    row = frame.iloc[0]
    assert row["equal_codes"] >= 0.999
    assert row["loss_ratio"] == pytest.approx(1, abs=1e-3)
    assert min(row["ours"], row["shared"], row["textbook"]) > 0
    assert "24 × 160" in page


def test_every_uniform_method_of_this_project_is_measurable() -> None:
    names = measurable()
    assert {"rtn", "gptq", "awq"} <= set(names)
    assert not {"fp16", "hawq_v2", "mixed", "autoq"} & set(names)
    assert not [name for name in names if name.startswith("tool_")]


def test_a_part_of_the_steps_is_charged_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Point] = []

    def measured(point: Point, patience: float) -> Measurement | str:
        asked.append(point)
        return "it was stopped" if point.name == "rtn" else Measurement((2.0, 3.0, 4.0), None, 10**9, 3 * 10**9)

    monkeypatch.setattr(quantize, "measure_alone", measured)
    config = QuantizeBench(methods=["rtn", "autoround"], sizes=["tiny"])
    frame, page = cost_of_methods(config, "a machine")
    rows = frame.set_index("row")
    steps, times = quantize.PARTLY["autoround"]
    assert rows.loc["autoround", "seconds"] == 3.0 * times
    assert pd.isna(rows.loc["rtn", "seconds"])
    assert "it was stopped" in page
    assert "2.00" in page
    point = next(point for point in asked if point.name == "autoround")
    assert point.size is SIZES["tiny"]
    assert steps.items() <= dict(point.options).items()


def test_a_mistyped_size_is_named() -> None:
    with pytest.raises(ValueError, match="125M"):
        cost_of_methods(QuantizeBench(sizes=["125"], folder=str(Path("unused"))), "a machine")
