import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, MX_INT8, Element, MiniFloat

FLOATS = {"e2m1": E2M1, "e3m2": E3M2, "e2m3": E2M3, "e4m3": E4M3, "e5m2": E5M2}
BIAS = {"e2m1": 1, "e3m2": 3, "e2m3": 1, "e4m3": 7, "e5m2": 15}
LARGEST = {"e2m1": 6, "e3m2": 28, "e2m3": 7.5, "e4m3": 448, "e5m2": 57344}
SMALLEST = {"e2m1": 0.5, "e3m2": 2.0**-4, "e2m3": 2.0**-3, "e4m3": 2.0**-9, "e5m2": 2.0**-16}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ELEMENTS: list[Element] = [*FLOATS.values(), MX_INT8]

numbers = st.floats(width=32, allow_nan=False)


def by_definition(name: str, code: int) -> float:
    """IEEE 754's reading of the bits, with the exceptions of the OCP formats."""
    exponent_bits, mantissa_bits = int(name[1]), int(name[3])
    bits = f"{code:0{1 + exponent_bits + mantissa_bits}b}"
    sign, exponent, fraction = bits[0], bits[1 : 1 + exponent_bits], bits[1 + exponent_bits :]
    if name == "e5m2" and exponent == "11111":
        value = math.inf if fraction == "00" else math.nan
    elif name == "e4m3" and bits[1:] == "1111111":
        value = math.nan
    elif int(exponent, 2) == 0:
        value = float(Fraction(int(fraction, 2), 2**mantissa_bits) * Fraction(2) ** (1 - BIAS[name]))
    else:
        significand = 1 + Fraction(int(fraction, 2), 2**mantissa_bits)
        value = float(significand * Fraction(2) ** (int(exponent, 2) - BIAS[name]))
    return -value if sign == "1" else value


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, with NaN equal to NaN, and −0 different from 0."""
    numbers = torch.equal(a.nan_to_num(nan=9e9), b.nan_to_num(nan=9e9))
    return numbers and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.signbit() & (a == 0), b.signbit() & (b == 0))


def nearest_even(x: Tensor, values: Tensor) -> Tensor:
    """By exhaustive search in fp64: the value nearest to each |x|, of two the one with the even code."""
    values = values[: len(values) // 2].double()
    values = values[values.isfinite()]
    distance = (x.abs().double()[:, None] - values).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    odd = torch.arange(len(values)) % 2
    return (nearest.double() * (2 - odd)).argmax(1)


def around_half_way(values: Tensor) -> Tensor:
    """All half-way points of neighboring values, the fp32 numbers next to them, and the values, of both signs."""
    finite = values[values.isfinite()].unique()
    middle = (finite[1:] + finite[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.tensor(toward)) for toward in (math.inf, -math.inf))
    return torch.cat([finite, middle, up, down])


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_stands_for_what_the_definition_says(name: str) -> None:
    fmt = FLOATS[name]
    expected = torch.tensor([by_definition(name, code) for code in range(2**fmt.bits)])
    assert same(fmt.values(), expected)
    assert (fmt.name, fmt.max, fmt.smallest) == (name, LARGEST[name], SMALLEST[name])


def test_the_positive_values_of_fp4() -> None:
    assert E2M1.values()[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("name", TORCH)
def test_fp8_codes_are_those_of_torch(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert same(FLOATS[name].decode(codes), codes.view(TORCH[name]).float())


@pytest.mark.parametrize("name", TORCH)
def test_fp8_rounding_is_that_of_torch(name: str) -> None:
    fmt, generator = FLOATS[name], torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * torch.exp2(torch.randint(-20, 9, (20000,), generator=generator))
    x = torch.cat([spread, around_half_way(fmt.values()), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    x = x[x.abs() <= fmt.max]  # beyond, torch has infinities and NaN
    assert torch.equal(fmt.encode(x), x.to(TORCH[name]).view(torch.uint8))


@pytest.mark.parametrize("fmt", FLOATS.values(), ids=FLOATS)
def test_rounding_takes_the_nearest_and_of_two_the_even_code(fmt: MiniFloat) -> None:
    x = around_half_way(fmt.values())
    codes = fmt.encode(x).int()
    half = 2 ** (fmt.bits - 1)
    assert torch.equal(codes % half, nearest_even(x, fmt.values()).int())
    assert torch.equal(codes >= half, x.signbit())


def test_half_way_points_of_fp4() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.decode(E2M1.encode(x)).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_no_number_is_rounded_twice() -> None:
    above = torch.tensor([2.5]).nextafter(torch.tensor([3.0]))  # to fewer bits first, this would become a tie
    assert E2M1.decode(E2M1.encode(above)).item() == 3


def test_integer_elements_are_multiples_of_a_64th_without_the_lowest() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(MX_INT8.decode(codes), codes.view(torch.int8) / 64)
    x = torch.arange(-300, 301) / 128  # multiples of half a step
    steps = torch.tensor([max(-127, min(127, round(i / 2))) for i in range(-300, 301)])  # Python's ties go to even
    assert torch.equal(MX_INT8.encode(x).view(torch.int8).long(), steps)
    assert (MX_INT8.name, MX_INT8.bits, MX_INT8.max) == ("int8", 8, 2 - 2**-6)


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: fmt.name)
def test_what_is_too_large_becomes_the_largest_value(fmt: Element) -> None:
    x = torch.tensor([1.0001 * fmt.max, 3e38, math.inf])
    assert fmt.decode(fmt.encode(x)).tolist() == [fmt.max] * 3
    assert fmt.decode(fmt.encode(-x)).tolist() == [-fmt.max] * 3


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: fmt.name)
def test_nan_stays_nan_where_there_is_one(fmt: Element) -> None:
    decoded = fmt.decode(fmt.encode(torch.tensor([math.nan]))).item()
    assert math.isnan(decoded) if fmt in (E4M3, E5M2) else abs(decoded) == fmt.max


@pytest.mark.parametrize("fmt", FLOATS.values(), ids=FLOATS)
def test_zero_keeps_its_sign(fmt: MiniFloat) -> None:
    assert fmt.encode(torch.tensor([0.0, -0.0])).tolist() == [0, 2 ** (fmt.bits - 1)]
    assert fmt.encode(torch.tensor([fmt.smallest / 2, fmt.smallest * 0.51])).tolist() == [0, 1]


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: fmt.name)
def test_encoding_inverts_decoding(fmt: Element) -> None:
    values = fmt.values()
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)[values.abs() <= fmt.max]
    assert len(codes) >= 2**fmt.bits - 8
    assert torch.equal(fmt.encode(fmt.decode(codes)), codes)


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: fmt.name)
@settings(max_examples=40, deadline=None)
@given(st.lists(numbers, min_size=2, max_size=20))
def test_rounding_is_monotone_odd_and_within_half_a_step(fmt: Element, drawn: list[float]) -> None:
    x = torch.tensor(drawn).sort().values
    rounded = fmt.decode(fmt.encode(x))
    assert (rounded.diff() >= 0).all()
    assert torch.equal(fmt.decode(fmt.encode(-x)), -rounded)
    finite = fmt.values()[fmt.values().abs() <= fmt.max].unique()
    above = finite[torch.searchsorted(finite, x).clamp(max=len(finite) - 1)]
    below = finite[(torch.searchsorted(finite, x, right=True) - 1).clamp(min=0)]
    inside = x.abs() <= fmt.max
    error = (rounded.double() - x.double()).abs()
    assert (error <= (above.double() - below.double()) / 2)[inside].all()
    assert (rounded.abs() == fmt.max)[~inside].all()


def test_scales_of_mx_are_the_powers_of_two_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert same(E8M0.decode(codes), codes.view(torch.float8_e8m0fnu).float())
    exponents = torch.arange(-127, 128)
    assert torch.equal(E8M0.encode(exponents), codes[:255])
    assert E8M0.decode(E8M0.encode(exponents)).double().log2().equal(exponents.double())
    assert E8M0.encode(torch.tensor([-200, 200])).tolist() == [0, 254]
