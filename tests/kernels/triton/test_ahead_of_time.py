"""Machine code, compiled with no GPU present: no spills, tensor cores, and few instructions per weight."""

import os

import pytest

from kernels.triton.assembly import Assembly
from kernels.triton.variants import A100, GPU, GPUS, H200, Variant, variants

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("functions are interpreted in this process, not compiled", allow_module_level=True)

ALL = [(variant, gpu) for variant in variants() for gpu in GPUS if gpu.capability in variant.product]
QUICK = [(variant, H200) for variant in variants() if variant.quick]


def check(variant: Variant, gpu: GPU) -> Assembly:
    code = variant.compiled(gpu)
    assert not code.spills
    assert code.registers <= 255
    product = variant.product[gpu.capability]
    if product:
        assert any(name.startswith(product) for name in code.loop), f"no {product} in the loop"
    assert not code.has("I2F.F16"), "codes go through the slow conversion units"
    return code


def name(case: object) -> str:
    return getattr(case, "name", str(case)).replace(" ", "-")


@pytest.mark.parametrize(("variant", "gpu"), QUICK, ids=name)
def test_the_main_variants(variant: Variant, gpu: GPU) -> None:
    """Those for few tokens, where memory sets the pace, keep up with it, or nearly: look-up tables do not."""
    code = check(variant, gpu)
    if variant.tokens:
        assert variant.per_weight(code) < variant.slack * gpu.budget(variant.bits)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "gpu"), ALL, ids=name)
def test_every_variant(variant: Variant, gpu: GPU) -> None:
    code = check(variant, gpu)
    if variant.quick and variant.tokens and gpu is A100:
        assert variant.per_weight(code) < variant.slack * gpu.budget(variant.bits)


LISTING = """
.L_x_1:
        /*0100*/                   HGMMA.64x16x16.F32 R24, R32, gdesc[UR16], R24 ;
.L_x_2:
        /*0110*/               @P0 LDG.E R0, [R2] ;
        /*0120*/               @P1 BRA `(.L_x_2) ;
        /*0130*/                   HGMMA.64x16x16.F32 R24, R36, gdesc[UR16], R24, gsb0 ;
        /*0140*/              @!P0 BRA `(.L_x_1) ;
        /*0150*/                   STL [R1], R0 ;
        /*0160*/                   BRA `(.L_x_9) ;
.L_x_9:
"""


def test_a_listing_is_read() -> None:
    from kernels.triton.assembly import _parsed

    code = Assembly(tuple(_parsed(LISTING)), 32)
    assert code.loop == ("HGMMA.64x16x16.F32", "LDG.E", "BRA", "HGMMA.64x16x16.F32", "BRA")
    assert code.spills
    # Each instruction: 64 × 16 weights for 16 tokens by four warps, 256 a warp; the program has twice as many tokens.
    assert code.per_weight(tokens=16, tile=0) == 5 * 32 / 512
    assert code.per_weight(tokens=32, tile=0) == 5 * 32 / 256
