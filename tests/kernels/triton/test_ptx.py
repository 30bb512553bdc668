"""The interpreter cannot run inline PTX, so the few instructions that decode codes are carried out here one by one."""

import re

import numpy as np
import pytest
import torch

from kernels.minifloat import E2M1
from kernels.triton import decode, eight_bit, float4
from kernels.triton.codebook import byte_tables
from kernels.triton.layout import slab, words


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit i of the table is the result where the bits of a, b and c are those of i."""
    ones = 2**32 - 1
    picks = [(a if i & 4 else a ^ ones) & (b if i & 2 else b ^ ones) & (c if i & 1 else c ^ ones) for i in range(8)]
    return sum(pick for i, pick in enumerate(picks) if table >> i & 1)


def prmt(a: int, b: int, selector: int) -> int:
    pool = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
    picks = [selector >> 4 * i & 15 for i in range(4)]
    return sum((255 * (pool[p & 7] >> 7) if p & 8 else pool[p]) << 8 * i for i, p in enumerate(picks))


OPERATIONS = {
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "shr.b32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & 2**32 - 1,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "mov.b32": lambda a: a,
}


def execute(ptx: str, **registers: int) -> dict[str, int]:
    """Registers after the code, of those before; $0 is called r0."""
    for line in re.sub(r"\.reg [^;]*;|[{}]", "", ptx.replace("$", "r")).split(";"):
        if not line.strip():
            continue
        name, operands = line.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = OPERATIONS[name](*(registers.get(s) if s in registers else int(s, 0) for s in sources))
    return registers


def halves(register: int) -> list[float]:
    """The two fp16 numbers in it."""
    return np.array([register], np.uint32).view(np.float16).tolist()


def two_columns(bits: int, block: int) -> tuple[torch.Tensor, list[int]]:
    """Random codes of one block, and the words that hold columns 0 and 1 of every slab, in pairs."""
    codes = torch.randint(2**bits, (1, block), dtype=torch.uint8)
    row = words(codes, bits, block)[0].view(torch.int32) & 0xFFFFFFFF
    return codes[0].view(-1, slab(bits, block))[:, :2], row.tolist()[:: slab(bits, block) // 2]


@pytest.mark.parametrize(("bits", "block"), [(2, 256), (3, 256), (4, 128), (4, 256), (8, 128)])
def test_codes_become_halves(bits: int, block: int) -> None:
    codes, pairs = two_columns(bits, block)
    for j, expected in enumerate(codes.tolist()):
        result = execute(decode._select.fn(j, bits), **{f"r{i + 1}": pair & 2**32 - 1 for i, pair in enumerate(pairs)})
        base = 2 ** (10 - decode.start.fn(j, bits))
        assert halves(result["r0"]) == [base + code for code in expected]


@pytest.mark.parametrize("high", [0, 1])
def test_nibbles_become_bytes(high: int) -> None:
    code = "and.b32 $0, $1, 0xf0f0f0f0;" if high else eight_bit.HIGH_OF_LOW.value
    packed = np.random.default_rng().integers(256, size=4, dtype=np.uint8)
    result = np.array([execute(code, r1=int(packed.view(np.uint32)[0]))["r0"]], np.uint32).view(np.int8)
    nibbles = (packed >> 4 if high else packed & 15).astype(int)
    assert result.tolist() == [16 * (n - 16 if n > 7 else n) for n in nibbles]


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_of_two_and_three_bits_are_looked_up(bits: int) -> None:
    codes, pairs = two_columns(bits, 256)
    table = torch.randn(2, 2**bits).half()  # another one for the second column, as no row has
    flat = [int(entry) & 0xFFFFFFFF for entry in byte_tables(table).flatten()]
    for j, expected in enumerate(codes.tolist()):
        registers = {f"r{i + 1}": pair & 2**32 - 1 for i, pair in enumerate(pairs)} | {
            f"r{i + 4}": entry for i, entry in enumerate(flat)
        }
        result = execute(decode.lookup_code.fn(j, bits), **registers)
        assert halves(result["r0"]) == [table[i, code].item() for i, code in enumerate(expected)]


def test_codes_of_four_bits_are_looked_up() -> None:
    codes, pairs = two_columns(4, 256)
    table = torch.randn(2, 16).half()
    flat = [int(entry) & 0xFFFFFFFF for entry in byte_tables(table).flatten()]
    registers = {"r4": pairs[0] & 2**32 - 1} | {f"r{i + 5}": entry for i, entry in enumerate(flat)}
    result = execute(decode.lookup_four_code.fn(), **registers)
    for j, expected in enumerate(codes.tolist()):
        assert halves(result[f"r{j}"]) == [table[i, code].item() for i, code in enumerate(expected)]


def test_four_bit_floats_become_halves() -> None:
    codes, pairs = two_columns(4, 64)
    for j, expected in enumerate(codes):
        result = execute(float4.place.fn(j), r1=pairs[0])
        assert halves(result["r0"]) == (E2M1.decode(expected) * 2**-14).tolist()
