"""What stored bits a tool's own count of effective bits comes to."""

from __future__ import annotations

from harness.claims.checks.base import check, fact
from harness.claims.evidence import Evidence
from harness.claims.verdicts import Case, Rule
from methods.formats.floats import FP8, NVFP4

REPORTED = 4.8
SHAPE = (4096, 4096)


@check("effective_bits_nvfp4_fp8", Rule((0.0, 0.05)))
def effective_bits(evidence: Evidence) -> list[Case]:
    """C47: ModelOpt's `effective_bits=4.8` of NVFP4 and FP8, which until 2026 counted an NVFP4 weight as 4 bits and
    an FP8 weight as 8, against what the same mix of tensors stores with its scales."""
    del evidence
    share = (REPORTED - NVFP4().bits) / (FP8().bits - NVFP4().bits)
    weights = SHAPE[0] * SHAPE[1]
    narrow, wide = (fmt.stored_bits(SHAPE) / weights for fmt in (NVFP4(), FP8()))
    stored = (1 - share) * narrow + share * wide
    test = f"{share:.0%} of weights in FP8: {stored:.3f} bits are stored, {REPORTED} reported"
    return [fact("NVFP4 and FP8", abs(stored - REPORTED), "bits", test)]
