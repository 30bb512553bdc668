"""Tables of the bench, as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness.bench.scaling import summarize, unmeasured
from harness.environment import describe
from harness.report.tables import markdown_text

SIZE_LEGEND = (
    "Seconds and peak memory beyond the loaded model, of random Llama models, each point in a process of its own. "
    "*Exponent*: slope of log cost against log parameters in linears, by least squares over the sizes measured, ± its "
    "standard error; fixed costs flatten it. *Times GPTQ*: seconds over those of GPTQ at the same size and length; "
    "median, and in brackets least and most over sizes. Calibration statistics that a metric reads are part of its "
    "time. All rows read the same text, which is less than the 128 sequences that GPTQ and AWQ are usually calibrated "
    "on. These two round to 4 bits in groups; metrics that know formats score every linear at every candidate width. "
    "The weights are random, so the work is fixed rather than ended by an accuracy."
)


def machine(threads: int, device: str) -> str:
    """One line that says where seconds were measured."""
    facts = describe()
    chip = facts["gpu"] if device.startswith("cuda") else f"{facts['cpu']}, {facts['cores']} cores, {threads} threads"
    return f"{chip}; torch {facts['packages']['torch']}; {facts['platform']}"


def csv(frame: pd.DataFrame, header: str) -> str:
    """CSV whose first line is a comment (`pandas.read_csv(…, comment="#")`)."""
    return f"# {header.replace('#', '')}\n" + frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")


def markdown(title: str, parts: Sequence[str]) -> str:
    """A page of paragraphs and tables."""
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of texts."""
    frame = pd.DataFrame(rows).map(lambda value: markdown_text(str(value)))
    return str(frame.to_markdown(index=False, disable_numparse=True))


def scaling_page(frame: pd.DataFrame, header: str, work: Mapping[str, str]) -> str:
    """The page of cost against size: a table a length, what was not measured and why, and the options.

    Args:
        work: row to what it computes.
    """
    found = summarize(frame)
    parts = [SIZE_LEGEND, f"Measured on {markdown_text(header)}."]
    for length, part in found.groupby("length", sort=True):
        parts += [f"## {length} tokens a sequence", grid([_scaling_row(row) for _, row in part.iterrows()])]
    missing = [
        f"- {markdown_text(row)}, {length} tokens, {sizes}: {markdown_text(reason)}"
        for (row, length), (sizes, reason) in unmeasured(frame).items()
    ]
    if missing:
        parts += ["## Not measured", "\n".join(missing)]
    listed = [f"- {markdown_text(row)}: {markdown_text(text)}" for row, text in work.items()]
    return markdown("Cost against model size", [*parts, "## Work", "\n".join(listed)])


def _scaling_row(row: pd.Series) -> dict[str, str]:
    return {
        "row": row["row"],
        "exponent of seconds": _with_error(row["seconds_exponent"], row["seconds_error"]),
        "exponent of memory": _with_error(row["extra_bytes_exponent"], row["extra_bytes_error"]),
        "times GPTQ": spread(row["ratio"], row["ratio_low"], row["ratio_high"]),
        "sizes": f"{row['seconds_points']}, up to {row['largest']}",
    }


def _with_error(value: float, error: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.2f} ± {error:.2f}" if np.isfinite(error) else f"{value:.2f}"


def spread(value: float, low: float, high: float) -> str:
    """A number and its range."""
    return "–" if np.isnan(value) else f"{value:.3g} [{low:.3g}, {high:.3g}]"
