"""Intel Neural Compressor's HAWQ-V2 strategy: layers in the order of their Hessian traces alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from methods.formats.base import Format
from methods.network import Network
from methods.sensitivity.base import METRICS, Losses, Sensitivity, Subject
from methods.sensitivity.hutchinson import Hutchinson


@METRICS.register("inc_trace")
@dataclass(frozen=True)
class INCTrace(Hutchinson):
    """The Hessian trace, without the ‖ΔW‖² of HAWQ-V2 and without division by the number of weights.

    The strategy as shipped (neural-compressor 2.x, `strategy/hawq_v2.py`) multiplies by the rounding error only
    in a branch that it disables.
    """

    def __call__(self, subject: Subject) -> Sensitivity:
        return subject.measure(Hutchinson(**asdict(self)))

    def losses(self, found: Sensitivity, network: Network, formats: Sequence[Format]) -> Losses:
        """Trace · 4^−bits: at every width the order of linears is that of the traces."""
        return {name: {f: found.values[name] * 4.0**-f.bits for f in formats} for name in network.linears}
