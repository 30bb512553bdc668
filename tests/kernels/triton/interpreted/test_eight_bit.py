from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from kernels.activations import TokenScale, integers
from kernels.minifloat import E4M3
from kernels.packed import PackedInteger
from kernels.packed_affine import PackedAffine
from kernels.packed_float import PackedFloat
from kernels.packing import pack
from kernels.triton.eight_bit import add_multiplied, multiply, prepare, supports
from kernels.triton.launch import Regime
from kernels.triton.rounding import rounded

HALF = 1e-3  # fp16 results
SMALL = Regime(16, 16, 64, 4, 2)
Error = Callable[[Tensor, Tensor], float]
ROUNDINGS = {torch.int8: TokenScale(integers(8)), torch.float8_e4m3fn: TokenScale(E4M3)}


def random_packed(random: Generator, bits: int, columns: int, group: int, zeros: bool = True) -> PackedInteger:
    groups = -(-columns // group)
    codes = torch.randint(2**bits, (70, columns), generator=random, dtype=torch.uint8)
    scale = (torch.rand(70, groups, generator=random) * 0.02 + 0.005).half()
    zero = torch.randint(2**bits, (1, 70 * groups), generator=random, dtype=torch.uint8)
    stored = pack(zero, bits) if zeros else None
    return PackedInteger(pack(codes, bits), scale, stored, bits=bits, shape=(70, columns), group_size=group)


def random_float(random: Generator, columns: int) -> PackedFloat:
    codes = E4M3.encode(torch.randn(70, columns, generator=random) * 100)
    scale = (torch.rand(70, 1, generator=random) * 0.02 + 0.005).half()
    options = {"element": E4M3, "scale_code": None, "shape": (70, columns), "group_size": columns}
    return PackedFloat(pack(codes, 8), scale, torch.tensor(0.25), **options)


def truth(packed: PackedInteger | PackedFloat, x: Tensor, dtype: torch.dtype) -> Tensor:
    """With inputs rounded as the layer would, and everything after it exact."""
    return ROUNDINGS[dtype](x.float()).double() @ packed.dequantize().double().t()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_tokens_are_rounded_as_the_layer_rounds_them(random: Generator, dtype: torch.dtype) -> None:
    x = torch.randn(6, 2100, generator=random) * torch.logspace(-6, 3, 6)[:, None]
    x[3], x[4, ::2] = 0, x[4, 0]
    result = rounded(x.half(), 2112, 32, dtype, 8)
    assert torch.equal(result.codes.float()[:6, :2100] * result.scale[:6, None], ROUNDINGS[dtype](x.half().float()))
    assert not result.codes.float()[6:].any()
    assert not result.codes.float()[:, 2100:].any()
    if dtype == torch.int8:
        assert torch.equal(result.sums, result.codes.float().unflatten(1, (-1, 32)).sum(2).t())


def test_every_fp8_number_and_every_halfway_case_is_rounded_to_even() -> None:
    values = E4M3.values()[:127]
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values.flip(0), middles, torch.nextafter(middles, values[1:])])[None]
    result = rounded(x, 384, 32, torch.float8_e4m3fn, 1)
    assert result.scale.item() == 1
    assert torch.equal(result.codes.float()[:, : x.shape[1]], E4M3.snap(x))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("bits", "columns", "group"),
    [(8, 256, 300), (8, 200, 200), (8, 256, 128), (8, 384, 256), (8, 300, 64), (8, 160, 32),
     (4, 256, 300), (4, 130, 130), (4, 384, 128), (4, 200, 64), (4, 160, 32), (4, 512, 256)],
)  # fmt: skip
def test_integers(random: Generator, error: Error, bits: int, columns: int, group: int, zeros: bool) -> None:
    packed = random_packed(random, bits, columns, group, zeros)
    x, bias = torch.randn(5, columns, generator=random).half(), torch.randn(70, generator=random).half()
    assert supports(packed, x, TokenScale(integers(8))) is None
    result = add_multiplied(prepare(packed), x, bias.expand(1, -1), SMALL)
    assert result.dtype == torch.float16
    assert error(result, truth(packed, x, torch.int8) + bias.double()) < HALF


def test_an_integer_product_is_exact_but_for_its_last_rounding(random: Generator) -> None:
    packed = random_packed(random, 8, 512, 512, zeros=False)
    packed.scale.fill_(1)
    x = torch.randint(-127, 128, (3, 512), generator=random)
    x[:, 0] = 127
    result = add_multiplied(prepare(packed), x.float(), None, SMALL)
    assert torch.equal(result.double(), x.double() @ packed.dequantize().double().t())


@pytest.mark.parametrize("columns", [256, 72])
def test_fp8(random: Generator, error: Error, columns: int) -> None:
    packed, x = random_float(random, columns), torch.randn(2, 3, columns, generator=random).half()
    assert supports(packed, x, TokenScale(E4M3)) is None
    assert error(multiply(prepare(packed), x), truth(packed, x, torch.float8_e4m3fn)) < HALF


@pytest.mark.parametrize("group", [128, 512])
def test_a_sum_that_several_programs_share(random: Generator, error: Error, group: int) -> None:
    packed, x = random_packed(random, 4, 512, group), torch.randn(17, 512, generator=random).half()
    prepared = prepare(packed)
    for _ in range(2):
        assert error(add_multiplied(prepared, x, None, SMALL, 3), truth(packed, x, torch.int8)) < HALF
    assert not prepared.arrived.any()


def test_what_is_not_supported_is_said(random: Generator) -> None:
    packed, x = random_packed(random, 8, 128, 128), torch.zeros(1, 128).half()
    assert "rounded to int8" in str(supports(packed, x, None))
    assert "rounded to int8" in str(supports(packed, x, TokenScale(integers(6))))
    assert "rounded to e4m3" in str(supports(random_float(random, 128), x, TokenScale(integers(8))))
    assert "do not fit" in str(supports(random_packed(random, 4, 128, 24), x, TokenScale(integers(8))))
    assert "only integers" in str(supports(random_packed(random, 3, 128, 128), x, TokenScale(integers(8))))
    real = PackedAffine(packed.codes, packed.scale, packed.scale, bits=8, shape=(70, 128), group_size=128)
    assert "whole numbers" in str(supports(real, x, TokenScale(integers(8))))
