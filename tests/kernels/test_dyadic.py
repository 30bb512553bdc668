import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kernels.dyadic import PackedDyadic, dyadic, requantize, symmetric_scale
from kernels.linear import QuantLinear
from kernels.packed import PackedInteger
from kernels.packing import pack, row_bytes

OUT, COLUMNS = 7, 70
INT32 = 2**31


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_up(number: Fraction) -> int:
    """Nearest integer, halves towards +∞: in exact arithmetic."""
    return math.floor(number + Fraction(1, 2))


def half_even(number: Fraction) -> int:
    """Python rounds fractions exactly, halves to even."""
    return round(number)


def integer(bits: int, scale: Tensor | None = None, codes: Tensor | None = None) -> PackedInteger:
    """Symmetric codes, one scale a row; random where not given."""
    codes = torch.randint(2**bits, (OUT, COLUMNS), generator=random(bits)) if codes is None else codes
    scale = 0.001 + 0.01 * torch.rand(len(codes), 1, generator=random(1)) if scale is None else scale
    shape = (codes.shape[0], codes.shape[1])
    return PackedInteger(pack(codes, bits), scale.half(), None, bits=bits, shape=shape, group_size=shape[1])


def layer(bits: int = 8, output_bits: int = 8, bias: Tensor | None = None) -> tuple[PackedInteger, PackedDyadic]:
    """Inputs in ±4, outputs in ±3 before saturation at output_bits."""
    packed = integer(bits)
    return packed, PackedDyadic(
        packed, symmetric_scale(4, 8), symmetric_scale(3, output_bits), output_bits=output_bits, bias=bias
    )


def multipliers() -> Tensor:
    """Log-uniform over the whole range, the neighbourhood of powers of two, and exact halves of the mantissa."""
    exponents = torch.rand(4000, generator=random(), dtype=torch.float64) * 126 - 96.5
    powers = 2.0 ** torch.arange(-96, 30, dtype=torch.float64)
    near = [powers * (1 + sign * 2.0**-k) for sign in (-1, 1) for k in (30, 31, 32, 33, 34, 40, 52)]
    return torch.cat([2**exponents, powers, *near])


def test_a_dyadic_number_is_the_multiplier_to_31_bits_with_halves_rounded_up() -> None:
    values = multipliers()
    mantissa, shift = dyadic(values)
    assert (mantissa.dtype, shift.dtype) == (torch.int32, torch.int8)
    for value, m, e in zip(values.tolist(), mantissa.tolist(), shift.tolist(), strict=True):
        assert 2**30 <= m < 2**31
        assert 1 <= e <= 127
        assert abs(Fraction(m, 2**e) / Fraction(value) - 1) <= Fraction(1, 2**31)
        fraction, exponent = math.frexp(value)
        assert Fraction(m, 2**e) == Fraction(half_up(Fraction(fraction) * 2**31), 2 ** (31 - exponent))


def test_multipliers_with_few_bits_are_exact_and_shapes_are_kept() -> None:
    values = torch.tensor([[0.75, 2.0**-97, 3 * 2.0**-40], [1.0, 2.0**29, 1023 / 1024]])
    mantissa, shift = dyadic(values)
    assert mantissa.shape == shift.shape == values.shape
    assert torch.equal(mantissa.double() / 2.0 ** shift.double(), values.double())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, 2.0**30, 2.0**30 * (1 - 2.0**-40), 2.0**-98])
def test_multipliers_that_have_no_dyadic_form_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        dyadic(torch.tensor([0.5, bad], dtype=torch.float64))


def test_requantization_equals_exact_fractions_over_all_shifts_and_signs() -> None:
    mantissa, shift = dyadic(multipliers())
    edges = torch.tensor([-INT32, -INT32 + 1, -3, -1, 0, 1, 2, INT32 - 1])
    draws = torch.randint(-INT32, INT32, (4, len(mantissa)), generator=random(2))
    accumulator = torch.cat([edges.unsqueeze(1).expand(-1, len(mantissa)), draws, draws >> 20])
    result = requantize(accumulator, mantissa, shift)
    for row, outputs in zip(accumulator.tolist(), result.tolist(), strict=True):
        for a, m, e, q in zip(row, mantissa.tolist(), shift.tolist(), outputs, strict=True):
            assert q == (2 * a * m + 2**e) // 2 ** (e + 1)  # ⌊am/2^e + 1/2⌋ in unbounded integers


def test_halves_go_towards_plus_infinity_on_both_sides_of_zero() -> None:
    mantissa, shift = dyadic(torch.tensor([0.5]))
    accumulator = torch.tensor([[-7], [-5], [-3], [-1], [1], [3], [5]], dtype=torch.int32)
    result = requantize(accumulator, mantissa, shift)
    assert result.dtype == torch.int64
    assert result.flatten().tolist() == [-3, -2, -1, 0, 1, 2, 3]


def test_requantization_takes_no_floats() -> None:
    with pytest.raises(ValueError, match="float"):
        requantize(torch.ones(1), *dyadic(torch.ones(1)))


def brute_force(packed: PackedInteger, made: PackedDyadic, x: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output codes in Python's integers and fractions, from the definition: [tokens, out]."""
    input_scale, output_scale = Fraction(float(made.input_scale)), Fraction(float(made.output_scale))
    offset, top = 2 ** (int(packed.bits) - 1), 2 ** (made.output_bits - 1)
    outputs = []
    for token in x.tolist():
        codes = [min(max(half_even(Fraction(value) / input_scale), -128), 127) for value in token]
        row_outputs = []
        for row, weights in enumerate(packed.unpacked_codes().tolist()):
            unit = Fraction(float(packed.scale[row, 0])) * input_scale
            fraction, exponent = math.frexp(unit / output_scale)
            total = sum((w - offset) * c for w, c in zip(weights, codes, strict=True))
            total += 0 if bias is None else half_even(Fraction(float(bias[row])) / unit)
            multiplier = Fraction(half_up(Fraction(fraction) * 2**31), 2**31) * Fraction(2) ** exponent
            row_outputs.append(min(max(half_up(total * multiplier), -top), top - 1))
        outputs.append(row_outputs)
    return torch.tensor(outputs)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("output_bits", [8, 16, 32])
@pytest.mark.parametrize("biased", [False, True])
def test_forward_equals_the_definition_in_exact_arithmetic(bits: int, output_bits: int, biased: bool) -> None:
    bias = torch.randn(OUT, generator=random(3)) if biased else None
    packed, made = layer(bits, output_bits, bias)
    x = 2 * torch.randn(9, COLUMNS, generator=random(4))  # some beyond ±4: they saturate
    expected = brute_force(packed, made, x, bias)
    assert torch.equal(made(x.double()), expected.double() * made.output_scale.double())


def test_inputs_and_outputs_saturate_at_the_ends_of_their_signed_ranges() -> None:
    packed = integer(8, torch.ones(1, 1), torch.tensor([[129]]))  # the weight 1
    inside = PackedDyadic(packed, 1.0, 1.0, output_bits=16)
    assert inside(torch.tensor([[1e30], [-1e30], [math.inf]])).flatten().tolist() == [127, -128, 127]
    narrow = PackedDyadic(packed, 1.0, 1.0, output_bits=4)
    assert narrow(torch.tensor([[100.0], [-100.0], [-8.0], [7.0]])).flatten().tolist() == [7, -8, -8, 7]


def test_the_largest_accumulators_of_32_bit_outputs_keep_their_value() -> None:
    columns = 2**17 - 1  # −128 · −128 · columns is just below 2^31
    packed = integer(8, torch.ones(1, 1), torch.zeros(1, columns, dtype=torch.int64))
    made = PackedDyadic(packed, 1.0, 1.0, output_bits=32)
    x = torch.full((1, columns), -128.0, dtype=torch.float64)
    assert made(x).item() == 128 * 128 * columns
    assert made(-x).item() == -128 * 127 * columns
    codes = torch.randint(256, (1, columns), generator=random(13))
    inputs = torch.randint(100, 128, (1, columns), generator=random(14))
    made = PackedDyadic(integer(8, torch.ones(1, 1), codes // 2), 1.0, 1.0, output_bits=32)
    expected = sum((c // 2 - 128) * x for c, x in zip(codes[0].tolist(), inputs[0].tolist(), strict=True))
    assert made(inputs.double()).item() == expected
    assert abs(expected) > 2**24
    with pytest.raises(ValueError, match="32 bits"):
        PackedDyadic(integer(8, torch.ones(1, 1), torch.zeros(1, columns + 1, dtype=torch.int64)), 1, 1, output_bits=32)


def test_forward_equals_the_simulation_where_multipliers_have_few_bits() -> None:
    scale = torch.tensor([1, 3, 5, 7, 9, 11, 13]).unsqueeze(1) / 1024
    packed = integer(8, scale)
    made = PackedDyadic(packed, 1 / 32, 1 / 16, output_bits=16, bias=torch.randn(OUT, generator=random(5)))
    x = torch.randn(4000, COLUMNS, generator=random(6))
    assert torch.equal(made(x), made.simulate(x, packed.scale[:, 0]))


@pytest.mark.parametrize(("output_bits", "fraction"), [(8, 1e-3), (16, 1e-3), (32, 1)])
def test_forward_is_within_one_unit_of_the_simulation_and_rarely_off(output_bits: int, fraction: float) -> None:
    packed, made = layer(8, output_bits)
    x = torch.randn(8000, COLUMNS, generator=random(7), dtype=torch.float64)
    units = (made(x) - made.simulate(x, packed.scale[:, 0])) / made.output_scale
    assert units.abs().max() <= 1.001
    assert (units.abs() > 0.5).double().mean() <= fraction
    assert made(x).unique().numel() > 200


def test_the_output_is_the_float_product_up_to_both_roundings() -> None:
    bias = torch.randn(OUT, generator=random(8))
    packed, made = layer(4, 16, bias)
    x = torch.rand(50, COLUMNS, generator=random(9)) - 0.5
    weight = packed.dequantize()
    bound = 0.5001 * (
        made.input_scale * weight.abs().sum(1) + made.output_scale + made.input_scale * packed.scale[:, 0]
    )
    error = (made(x) - (x @ weight.T + bias)).abs()
    assert (error <= bound).all()
    assert error.max() > 0.1 * bound.min()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("output_bits", [8, 32])
def test_the_weight_is_recovered_exactly_without_storing_its_scales(bits: int, output_bits: int) -> None:
    packed, made = layer(bits, output_bits)
    assert torch.equal(made.dequantize(), packed.dequantize())


def test_stored_bits_are_codes_mantissas_shifts_and_two_scales() -> None:
    codes = 8 * OUT * row_bytes(COLUMNS, 4)
    assert layer(4)[1].stored_bits() == codes + OUT * (32 + 8) + 2 * 32
    assert layer(4, bias=torch.zeros(OUT))[1].stored_bits() == codes + OUT * (32 + 8) + 2 * 32  # biases count apart


def test_zero_rows_and_zero_inputs_give_the_bias() -> None:
    codes = torch.randint(256, (OUT, COLUMNS), generator=random(10))
    codes[2] = 128
    scale = torch.full((OUT, 1), 0.01)
    scale[2] = 2.0**-24  # the smallest that fp16 can store
    bias = torch.linspace(-1, 1, OUT)
    bias[2] = 0.5
    made = PackedDyadic(integer(8, scale, codes), 1 / 64, 1 / 127, output_bits=8, bias=bias)
    tolerance = {"rtol": 0, "atol": 0.5 * (0.01 / 64 + 1 / 127) + 1e-6}  # the bias is rounded twice
    torch.testing.assert_close(made(torch.zeros(3, COLUMNS)), bias.expand(3, OUT), **tolerance)
    x = torch.randn(3, COLUMNS, generator=random(11))
    torch.testing.assert_close(made(x)[:, 2], bias[2].expand(3), **tolerance)
    unbiased = PackedDyadic(integer(8, scale, codes), 1 / 64, 1 / 127, output_bits=8)
    assert not unbiased(torch.zeros(3, COLUMNS)).any()


def test_leading_dimensions_and_dtypes_are_kept() -> None:
    _, made = layer(output_bits=16)  # more bits than bf16 has
    linear = QuantLinear(made)
    x = torch.randn(2, 3, COLUMNS, generator=random(12)).bfloat16()
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 3, OUT)
    assert torch.equal(y, made(x.float().view(6, COLUMNS)).view(2, 3, OUT).bfloat16())
    assert made(x[:0]).shape == (0, 3, OUT)


def test_what_integers_cannot_express_is_refused() -> None:
    packed, made = layer(4)
    with pytest.raises(ValueError, match="zero points"):
        asymmetric = PackedInteger(
            packed.codes, packed.scale, pack(torch.zeros(1, OUT), 4), bits=4, shape=packed.shape, group_size=COLUMNS
        )
        PackedDyadic(asymmetric, 1, 1, output_bits=8)
    with pytest.raises(ValueError, match="per output channel"):
        grouped = PackedInteger(
            packed.codes, packed.scale.expand(-1, 2), None, bits=4, shape=packed.shape, group_size=COLUMNS // 2
        )
        PackedDyadic(grouped, 1, 1, output_bits=8)
    for scales in ((0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="positive and finite"):
            PackedDyadic(packed, *scales, output_bits=8)
    for output_bits in (1, 33):
        with pytest.raises(ValueError, match="bits"):
            PackedDyadic(packed, 1, 1, output_bits=output_bits)
    with pytest.raises(ValueError, match="row 3"):
        PackedDyadic(packed, 1, 1, output_bits=8, bias=torch.tensor([0, 0, 0, 1e30, 0, 0, 0]))
    with pytest.raises(ValueError, match="its own bias"):
        QuantLinear(made, torch.zeros(OUT))(torch.zeros(1, COLUMNS))
    with pytest.raises(FloatingPointError, match="NaN"):
        made(torch.full((1, COLUMNS), math.nan))
