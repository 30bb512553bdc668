"""Codes to fp16 inside a kernel: the bits of a code become the fraction of a float whose exponent is known.

A field that begins at bit p of a 16-bit word, OR-ed into the bits of 2**(10 − p), gives the fp16 number
2**(10 − p) + code, exactly: one LOP3 for two weights. The power is never subtracted from a weight, but from sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

FOUR_HALVES: tl.constexpr = tl.constexpr((tl.float16,) * 4)


@triton.constexpr_function
def _source(slab: int, bits: int) -> int:
    """The word that holds a slab."""
    return slab // 5 if bits == 3 else 0


@triton.constexpr_function
def _shift(slab: int, bits: int) -> int:
    """By how much its fields are moved down to come below bit 10."""
    if bits == 3:
        return 9 * (slab % 5 // 3)
    return 8 * (slab % 2)


@triton.constexpr_function
def start(slab: int, bits: int) -> int:
    """The bit at which they begin then."""
    if bits == 3:
        return 6 if slab == 15 else slab % 5 % 3 * 3
    return slab // 2 * bits


@triton.constexpr_function
def _mask(slab: int, bits: int) -> int:
    """Where they are then."""
    return (2**bits - 1) << start(slab, bits)


@triton.constexpr_function
def _base(slab: int, bits: int) -> int:
    """The bits of the power of two that they are added to."""
    return 0x6400 - (start(slab, bits) << 10)


@triton.constexpr_function
def _select(slab: int, bits: int) -> str:
    """PTX that makes a pair of weights, $0, of a pair of words: of $1, or for 3 bits of three pairs $1, $2, $3."""
    if bits == 8:  # bytes 0 and 2, or 1 and 3, each under the byte 0x64
        return f"prmt.b32 $0, $1, 0x64646464, {0x4341 if slab % 2 else 0x4240};"
    if bits == 3 and slab == 15:  # the top bit of each word, moved to bits 6, 7 and 8
        low = "shr.b32 t, $1, 9; lop3.b32 t, t, 0x00400040, 0x4C004C00, 0xea;"
        middle = "shr.b32 u, $2, 8; lop3.b32 t, u, 0x00800080, t, 0xea;"
        return f"{{ .reg .b32 t, u; {low} {middle} shr.b32 u, $3, 7; lop3.b32 $0, u, 0x01000100, t, 0xea; }}"
    source, shift = f"${1 + _source(slab, bits)}", _shift(slab, bits)
    mask, base = _mask(slab, bits) * 0x10001, _base(slab, bits) * 0x10001
    if shift == 0:
        return f"lop3.b32 $0, {source}, {mask}, {base}, 0xea;"
    return f"{{ .reg .b32 t; shr.b32 t, {source}, {shift}; lop3.b32 $0, t, {mask}, {base}, 0xea; }}"


@triton.jit
def magic(
    words: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    slab: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """2**(10 − start) + code: fp16, of the shape of the tile of words int16.

    Args:
        second, third: for 3 bits, the tiles of the other two words; otherwise not looked at.
        ASM: two weights an instruction, in PTX; otherwise the same in Triton's own operations, for the interpreter.
    """
    if ASM:
        if BITS == 3:
            value = tl.inline_asm_elementwise(
                _select(slab, BITS), "=r,r,r,r", [words, second, third], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            value = tl.inline_asm_elementwise(
                _select(slab, BITS), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        if BITS == 3 and slab == 15:
            bits = ((words >> 9) & 0x40) | ((second >> 8) & 0x80) | ((third >> 7) & 0x100)
        elif _source(slab, BITS) == 0:
            bits = (words >> _shift(slab, BITS)) & _mask(slab, BITS)
        elif _source(slab, BITS) == 1:
            bits = (second >> _shift(slab, BITS)) & _mask(slab, BITS)
        else:
            bits = (third >> _shift(slab, BITS)) & _mask(slab, BITS)
        value = (bits | _base(slab, BITS)).to(tl.float16, bitcast=True)
    return value


@triton.jit
def offset(slab: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """By how much the decoded numbers of these slabs are too large: 2**(10 − start), fp32."""
    first = tl.where(slab == 15, 6, slab % 5 % 3 * 3) if BITS == 3 else slab // 2 * BITS
    return ((137 - first) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(pair: tl.tensor) -> tl.tensor:
    """Scales and zeros fp32, of int32 that hold two fp16 numbers each."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def field(words: tl.tensor, second: tl.tensor, third: tl.tensor, slab: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """The codes of a slab: int32, of the shape of the tile of words int16; see `magic`."""
    if BITS == 3 and slab == 15:
        code = ((words >> 15) & 1) | ((second >> 14) & 2) | ((third >> 13) & 4)
    elif _source(slab, BITS) == 0:
        code = (words >> (_shift(slab, BITS) + start(slab, BITS))) & ((1 << BITS) - 1)
    elif _source(slab, BITS) == 1:
        code = (second >> (_shift(slab, BITS) + start(slab, BITS))) & ((1 << BITS) - 1)
    else:
        code = (third >> (_shift(slab, BITS) + start(slab, BITS))) & ((1 << BITS) - 1)
    return code.to(tl.int32)


@triton.constexpr_function
def lookup_code(slab: int, bits: int) -> str:
    """PTX: two fp16 entries, $0, of tables of eight, for the codes of 2 or 3 bits in $1, or in $1 to $3.

    The tables of the first and of the second weight, which may differ: low bytes of entries 0–3 in $4 and $5, of
    entries 4–7 in $6 and $7, high bytes in $8 to $11.
    """
    if bits == 3 and slab == 15:
        low = "shr.b32 t, $1, 15; and.b32 t, t, 0x00010001; shr.b32 u, $2, 14; lop3.b32 t, u, 0x00020002, t, 0xea;"
        codes = f"{low} shr.b32 u, $3, 13; lop3.b32 t, u, 0x00040004, t, 0xea;"
    else:
        shift, mask = _shift(slab, bits) + start(slab, bits), (2**bits - 1) * 0x10001
        codes = f"shr.b32 t, ${1 + _source(slab, bits)}, {shift}; and.b32 t, t, {mask};"
    first = "prmt.b32 p, $4, $6, t; prmt.b32 q, $8, $10, t;"
    second = "prmt.b32 r, $5, $7, t; prmt.b32 s, $9, $11, t;"
    pick = f"shr.b32 u, t, 12; or.b32 t, t, u; {first} {second}"  # the codes in the two lowest nibbles
    merge = "prmt.b32 u, p, q, 0x0040; prmt.b32 r, r, s, 0x0051; prmt.b32 $0, u, r, 0x5410;"
    return f"{{ .reg .b32 t, u, p, q, r, s; {codes} {pick} {merge} }}"


@triton.constexpr_function
def lookup_four_code() -> str:
    """PTX: the fp16 entries of two words' eight codes of 4 bits, $0 to $3, one slab each; the words are in $4.

    The tables of the first and of the second word, which may differ, in turn: low bytes of entries 0–3 in $5 and $6,
    and so on to $11 and $12, high bytes in $13 to $20.
    """
    lines = ["shr.b32 w1, $4, 16; mov.b32 w0, $4;"]
    for word in (0, 1):
        lines.append(f"and.b32 t, w{word}, 0x7777; shr.b32 u, w{word}, 1; lop3.b32 u, u, 0x4444, 0x3210, 0xea;")
        for kind, first in (("l", 5), ("h", 13)):
            a, b, c, d = (f"${first + 2 * i + word}" for i in range(4))
            lines.append(f"prmt.b32 p, {a}, {b}, t; prmt.b32 q, {c}, {d}, t; prmt.b32 {kind}{word}, p, q, u;")
        lines.append(f"prmt.b32 a{word}, l{word}, h{word}, 0x5140; prmt.b32 b{word}, l{word}, h{word}, 0x7362;")
    # Nibble i of a word is its slab: 0, 2, 1 and 3, see `kernels.triton.layout`.
    lines.append("prmt.b32 $0, a0, a1, 0x5410; prmt.b32 $2, a0, a1, 0x7632;")
    lines.append("prmt.b32 $1, b0, b1, 0x5410; prmt.b32 $3, b0, b1, 0x7632;")
    return "{ .reg .b32 w0, w1, t, u, p, q, l0, h0, l1, h1, a0, b0, a1, b1; " + " ".join(lines) + " }"


@triton.jit
def lookup(
    words: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    l0: tl.tensor,
    l1: tl.tensor,
    h0: tl.tensor,
    h1: tl.tensor,
    slab: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """The entries, fp16, that a slab's codes of 2 or 3 bits name; tables as `kernels.triton.codebook` has them."""
    arguments = [words, second, third, l0, l1, h0, h1]
    constraints: tl.constexpr = "=r,r,r,r,r,r,r,r,r,r,r,r"
    return tl.inline_asm_elementwise(
        lookup_code(slab, BITS), constraints, arguments, dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def lookup_four(
    words: tl.tensor,
    l0: tl.tensor,
    l1: tl.tensor,
    l2: tl.tensor,
    l3: tl.tensor,
    h0: tl.tensor,
    h1: tl.tensor,
    h2: tl.tensor,
    h3: tl.tensor,
) -> tl.tensor:
    """The entries, fp16, that the four slabs' codes of 4 bits name: four tensors."""
    arguments = [words, l0, l1, l2, l3, h0, h1, h2, h3]
    constraints: tl.constexpr = "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r"
    return tl.inline_asm_elementwise(
        lookup_four_code(), constraints, arguments, dtype=FOUR_HALVES, is_pure=True, pack=2
    )
