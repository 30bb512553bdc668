"""ModelOpt's AutoQuantize with the KL score (NVIDIA Model Optimizer, `mtq.auto_quantize`)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import register
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.autoquantize_kl import AutoQuantizeKL


@register("autoquantize_kl")
@dataclass(frozen=True)
class AutoQuantizeKLMethod(MixedPrecision):
    """The narrowest format of each group whose KL score stays below a common threshold, found by bisection.

    See `methods.autoquantize_gradient` on candidates and bits.
    """

    solver: str = "threshold"

    def sensitivity(self) -> AutoQuantizeKL:
        return AutoQuantizeKL()
