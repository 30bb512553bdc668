"""Every score of this study as a loss of each linear in each format: what allocation minimizes, and what is ranked
against the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.formats.base import Format
from methods.sensitivity.base import Losses, Metric, Subject, squared_error
from methods.sensitivity.eigenvalue import TopEigenvalue
from methods.sensitivity.fisher import FisherTrace
from methods.sensitivity.hutchinson import Hutchinson
from methods.sensitivity.kfac import KFAC
from methods.sensitivity.measured import Measured
from methods.sensitivity.output_error import OutputMSE

LENGTH = 10**6  # tokens of a sequence: all of them


@dataclass(frozen=True)
class Effort:
    """How much the estimates may take.

    Args:
        probes: most Hutchinson probes a linear, each with another mini-batch.
        iterations: most power iterations a linear.
        batches: mini-batches on which eigenvalues are taken.
    """

    probes: int = 32
    iterations: int = 40
    batches: int = 2


def scores(subject: Subject, effort: Effort) -> dict[str, Losses]:
    """Score to losses, measured on the subject's text: curvature alone (λ, λ/n, tr, tr/n), curvature times ‖ΔW‖²
    (HAWQ's Ω and its rivals), what knows no Hessian of the loss (‖ΔW‖², the output's error), and the loss itself."""
    network, formats = subject.network, subject.formats
    weights = {name: network.linear(name).weight.numel() for name in network.linears}
    top = TopEigenvalue(tolerance=0.01, max_iterations=effort.iterations, sequences=effort.batches, context=LENGTH)
    eigenvalues = {name: abs(value) for name, value in subject.measure(top).values.items()}
    hutchinson = Hutchinson(max_probes=effort.probes, context=LENGTH)
    traces = subject.measure(hutchinson).values
    averages = {name: trace / weights[name] for name, trace in traces.items()}
    everywhere = {name: dict.fromkeys(formats, 1.0) for name in network.linears}
    squares = {name: {fmt: squared_error(network, name, fmt) for fmt in formats} for name in network.linears}
    return {
        "lambda": _times(eigenvalues, everywhere),
        "lambda/n": _times({name: value / weights[name] for name, value in eigenvalues.items()}, everywhere),
        "hawq_v1": _times(eigenvalues, squares),
        "trace": _times(traces, everywhere),
        "trace/n": _times(averages, everywhere),
        "hawq_v2": _times(averages, squares),
        "fisher": _losses(FisherTrace(), subject),
        "kfac": _losses(KFAC(context=LENGTH), subject),
        "output_mse": _losses(OutputMSE(), subject),
        "squared_error": squares,
        "measured": _losses(measured(subject), subject),
    }


def measured(subject: Subject) -> Measured:
    """The loss with one linear rounded, on all of the subject's text."""
    return Measured(sequences=len(subject.tokens), context=LENGTH, batch=16)


def truth(subject: Subject) -> Losses:
    """The loss with one linear rounded, on text that no score has seen."""
    return _losses(measured(subject), subject)


def _losses(metric: Metric, subject: Subject) -> Losses:
    return metric.losses(subject.measure(metric), subject.network, subject.formats)


def _times(curvature: Mapping[str, float], errors: Mapping[str, Mapping[Format, float]]) -> Losses:
    return {name: {fmt: curvature[name] * error for fmt, error in row.items()} for name, row in errors.items()}
