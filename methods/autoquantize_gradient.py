"""ModelOpt's AutoQuantize with the gradient score (NVIDIA Model Optimizer, `mtq.auto_quantize`)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import register
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.autoquantize_gradient import AutoQuantizeGradient


@register("autoquantize_gradient")
@dataclass(frozen=True)
class AutoQuantizeGradientMethod(MixedPrecision):
    """A format for each group by a 0-1 programme over Σ (∂L/∂Y)² · ΔY².

    The tool's own candidates are NVFP4 and FP8 (`method.bits=[] method.formats=[nvfp4,fp8]`), or no quantization
    (`method.formats=[nvfp4,fp8,dense16]`); the default here are the integer widths that all methods share, so that
    rows compare. Its `effective_bits` leave out the scales of blocks (4 bits for NVFP4 until 2026); ours are stored.

    Args:
        sequences, context: see `methods.sensitivity.autoquantize_gradient`.
    """

    solver: str = "lp"
    sequences: int = AutoQuantizeGradient.sequences
    context: int = AutoQuantizeGradient.context

    def sensitivity(self) -> AutoQuantizeGradient:
        return AutoQuantizeGradient(self.sequences, self.context)
