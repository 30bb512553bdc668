"""The study's scores as analyses of rankings want them: linears by metrics, in one format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.claims.evidence import Evidence, Missing
from harness.sensitivity.study import PRICED
from methods.base import hint
from methods.sensitivity.base import METRICS

FORMATS = ("int2-g128", "int3-g128", "int4-g128")
"""Where rounding one linear changes the loss by more than its standard error."""
TRUTH = "truth"
CONTROLS = {
    "weights": "nᵢ, the number of weights",
    "squared_error": "‖ΔWᵢ‖², the squared error of rounding to nearest",
}
REMEDY = "not run: the study of sensitivity metrics"


def scores(evidence: Evidence, fmt: str, names: Sequence[str]) -> pd.DataFrame:
    """Linears by `names`, which are metrics of the study, `truth`, or controls; see `CONTROLS`.

    Raises:
        ValueError: a name that no metric has.
        Missing: the study was not run, or lacks the format, or the metric could not be measured on this model.
    """
    for name in names:
        _check(name)
    table = _in_format(evidence, fmt)
    values = table.pivot(index="linear", columns="metric", values="value")
    return pd.DataFrame({name: _column(values, name) for name in names})


def errors(evidence: Evidence, fmt: str) -> pd.Series[float]:
    """Standard error of the measured loss of each linear. See `scores` for Missing."""
    table = _in_format(evidence, fmt)
    return table[table["metric"] == TRUTH].set_index("linear")["error"].sort_index()


def formats(evidence: Evidence) -> list[str]:
    """The formats of the study, narrowest first. See `scores` for Missing."""
    return list(_study(evidence).sort_values("bits", kind="stable")["format"].unique())


def types(linears: Iterable[str]) -> NDArray[np.int64]:
    """A number for the type of each linear, which is the last part of its name: `q_proj`, `down_proj`."""
    return pd.factorize(np.array([name.rsplit(".", 1)[-1] for name in linears]))[0].astype(np.int64)


def _check(name: str) -> None:
    known = [*METRICS.complete(), TRUTH, *CONTROLS]
    if name.removesuffix(PRICED) not in known:
        raise ValueError(f"unknown score {name!r}: {hint(name, known)}")


def _study(evidence: Evidence) -> pd.DataFrame:
    table = evidence.study.read()
    if table is None:
        raise Missing(REMEDY)
    return table


def _in_format(evidence: Evidence, fmt: str) -> pd.DataFrame:
    table = _study(evidence)
    if fmt not in set(table["format"]):
        raise Missing(f"the study has no {fmt}; it has {', '.join(table['format'].unique())}")
    return table[table["format"] == fmt]


def _column(values: pd.DataFrame, name: str) -> pd.Series[float]:
    if name == "squared_error":
        return _ratio(_column(values, "hawq_v1"), _column(values, "eigenvalue").abs())
    if name == "weights":
        traces = _column(values, "hutchinson") * _column(values, "squared_error")
        # Products of rounded numbers: five digits tell sizes apart and keep equal ones equal.
        return _ratio(traces, _column(values, "hawq_v2")).map(lambda count: float(f"{count:.5g}"))
    if name not in values:
        raise Missing(f"the study has no {name}: it could not be measured on this model, or ranks as its Ω does")
    return values[name]


def _ratio(product: pd.Series[float], factor: pd.Series[float]) -> pd.Series[float]:
    """The other factor, from the definitions |λ|·‖ΔW‖² of HAWQ and tr(H)/n·‖ΔW‖² of HAWQ-V2."""
    ratio = product / factor
    if not np.isfinite(ratio).all():
        raise Missing(f"{ratio.index[~np.isfinite(ratio)][0]} has no curvature, which its size is derived from")
    return ratio
