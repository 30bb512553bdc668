"""How things look: a method has one color, marker and line in every figure, and one place in every table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

REFERENCE = "fp16"
"""The method that changes nothing: the row that all others are compared with."""

SEATS = (
    "rtn",
    "gptq",
    "awq",
    "hawq_v1",
    "hawq_v2",
    "hawq_v3",
    "qbert",
    "autoquantize_gradient",
    "autoquantize_kl",
    "accuracy_aware",
    "inc_hawq_v2",
    "autoq",
    "mixed",
    "modelopt_awq",
    "hqq",
    "kquant",
    "squeezellm",
    "spqr",
    "sparsegpt",
    "quip",
    "slim_llm",
    "nncf",
    "teq",
    "omniquant",
    "autoround",
    "smoothquant",
    "llm_int8",
    "zeroquant",
)
"""Methods whose place in tables, and so color, is fixed; append only. Others follow by name."""

# Okabe and Ito's colors, which color-blind readers tell apart; without black (the reference) and the yellow
# that print loses. Seven markers and six colors share no factor, so that 42 methods look different.
COLORS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIANT_MARKERS = ("*", "h", "<", ">", "p", "d", "8")
SAME_COLOR = 2
"""Variants of a method that share its color."""
DASHES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
WAYS = SAME_COLOR * len(COLORS) * len(VARIANT_MARKERS) * len(DASHES)
"""After so many variants all looks are taken, and repeat."""
INK = "#222222"
"""Text, the reference, and lines that belong to no method."""
FAINT = "#8A8A8A"
"""What is there to be read against, or was not measured."""

FIGURE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 130,  # PNG is for previews: print takes the PDF, pages the SVG
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 6.5,
    "lines.markeredgewidth": 0.7,
    "text.parse_math": False,  # names of models may contain dollar signs
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # fonts as TrueType: text stays text, as publishers ask
    "svg.hashsalt": "hawq-bench",
}


@dataclass(frozen=True)
class Look:
    """How one method is drawn. Variants of a method share its color and differ in marker, fill and dashes."""

    color: str
    marker: str
    filled: bool = True
    line: Any = "-"
    """As matplotlib names line styles."""

    def marks(self) -> dict[str, Any]:
        """As matplotlib's keywords for markers."""
        face, edge = (self.color, "white") if self.filled else ("white", self.color)
        return {"marker": self.marker, "color": self.color, "markerfacecolor": face, "markeredgecolor": edge}


VERDICTS = {
    "supported": Look("#009E73", "o"),
    "partly supported": Look("#009E73", "D", filled=False),
    "inconclusive": Look("#56B4E9", "s"),
    "refuted": Look("#D55E00", "X"),
    "not testable": Look(FAINT, "v", filled=False),
    "not run": Look(FAINT, "o", filled=False),
}
"""What a test of a claim can say, as forest plots show it."""


def rank(method: str) -> tuple[int, str]:
    """Sort key of a method's name: the reference, the seated methods, the others by name."""
    order = (REFERENCE, *SEATS)
    return (order.index(method) if method in order else len(order), method)


def looks(methods: Mapping[str, str]) -> dict[str, Look]:
    """A look for every label, given {label: name of its method}; in the order in which to list them."""
    seat = {name: i for i, name in enumerate((*SEATS, *_unseated(methods.values())))}
    found: dict[str, Look] = {}
    for label in sorted(methods, key=lambda label: (rank(methods[label]), label)):
        name = methods[label]
        if name == REFERENCE:
            continue
        plain = Look(COLORS[seat[name] % len(COLORS)], MARKERS[seat[name] % len(MARKERS)])
        found[label] = plain if label == name else _variant(seat[name], set(found.values()))
    return found


def _unseated(names: Iterable[str]) -> list[str]:
    return sorted(set(names) - {REFERENCE, *SEATS})


def _variant(seat: int, taken: set[Look]) -> Look:
    """A look not yet taken. The first variants have the method's color; more take the next ones, as ten solvers of
    one allocator would look the same."""
    cycle = seat // len(COLORS)
    ways = [
        Look(
            COLORS[(seat + i // SAME_COLOR) % len(COLORS)],
            VARIANT_MARKERS[(i + cycle) % len(VARIANT_MARKERS)],
            filled=False,
            line=DASHES[(i + cycle) % len(DASHES)],
        )
        for i in range(WAYS)
    ]
    return next((look for look in ways if look not in taken), ways[0])
