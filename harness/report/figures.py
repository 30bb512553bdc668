"""All figures of the comparison, from the tidy table: which there are, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
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

SECTIONS = {"pareto": pareto, "kl": divergence, "bits": bits}
DOSE = "dose"
KINDS = (*SECTIONS, DOSE)


def write(frame: pd.DataFrame, folder: Path, prefix: str = "", kinds: Sequence[str] = KINDS) -> list[Path]:
    """Write the figures of these kinds that the rows give, in all formats; return the paths.

    For each section `pareto_…`, `kl_…` and `bits_…`; for each model with outliers of several magnitudes `dose_…`.

    Raises:
        ValueError: there is no such kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"there is no figure {unknown[0]!r}: choose from {', '.join(KINDS)}")
    paths = []
    with matplotlib.rc_context(style.FIGURE):
        for stem, figure in _figures(frame, kinds):
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


def _figures(frame: pd.DataFrame, kinds: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """File stems and figures."""
    looks = style.looks(dict(zip(frame["method"], frame["method_name"], strict=True)))
    names = frames.slugs(frame)
    for section, rows in frames.sections(frame):
        done = rows[rows["status"] == DONE]
        for kind, draw in SECTIONS.items():
            figure = draw(section, done, looks) if kind in kinds else None
            if figure is not None:
                yield f"{kind}_{names[section]}", figure
    doses = list(dose_responses(frame, looks)) if DOSE in kinds else []
    models = dict(zip(frame["section"], frame["model"], strict=True))
    for section, figure in doses:
        yield f"{DOSE}_{models[section] if len(doses) == 1 else names[section]}", figure
