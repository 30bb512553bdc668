"""All figures of the comparison, from the tidy table: which there are, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from harness.records import DONE, write_atomically
from harness.report import frame as frames
from harness.report import style
from harness.report.dose import dose_responses
from harness.report.pareto import divergence, pareto
from harness.report.strips import bits, by_type
from harness.report.style import INK

__all__ = ["INK", "bits", "by_type", "divergence", "pareto", "save", "write"]

FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""For previews, for pages and for print; without dates and versions: the same records give the same bytes."""


def write(frame: pd.DataFrame, folder: Path, prefix: str = "") -> list[Path]:
    """Write every figure that the rows give, in all formats; return the paths.

    For each section `pareto_…`, `kl_…` and `bits_…`; for each model with outliers of several magnitudes `dose_…`.
    """
    paths = []
    with matplotlib.rc_context(style.FIGURE):
        for stem, figure in _figures(frame):
            paths += save(figure, folder / f"{prefix}{stem}")
    return paths


def save(figure: Figure, stem: Path, kinds: Iterable[str] = tuple(FORMATS)) -> list[Path]:
    """Write the figure in these formats; return the paths."""
    paths = []
    with matplotlib.rc_context(style.FIGURE):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, so that the formats agree
    for kind in kinds:
        buffer = io.BytesIO()
        with matplotlib.rc_context(style.FIGURE):
            figure.savefig(buffer, format=kind, metadata=FORMATS[kind])
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomically(path, buffer.getvalue())
        paths.append(path)
    return paths


def _figures(frame: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """File stems and figures."""
    looks = style.looks(dict(zip(frame["method"], frame["method_name"], strict=True)))
    names = frames.slugs(frame)
    for section, rows in frames.sections(frame):
        done = rows[rows["status"] == DONE]
        for kind, draw in (("pareto", pareto), ("kl", divergence), ("bits", bits)):
            figure = draw(section, done, looks)
            if figure is not None:
                yield f"{kind}_{names[section]}", figure
    for section, figure in dose_responses(frame, looks):
        yield f"dose_{names[section]}", figure
