"""Every width, form of inputs, group size and level of kernels against float64 and integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.activations import InputRounding, StaticScale, TensorScale, TokenScale, integers
from kernels.cpu import library, linear
from kernels.cpu.pages import huge
from kernels.packed import PackedInteger
from kernels.packed_affine import PackedAffine
from kernels.packing import pack

LIBRARY = library.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no C++ compiler")
LEVELS = range(LIBRARY.level + 1) if LIBRARY else ()
EPSILON = 2.0**-24
SHAPES = [(4, 128), (7, 256), (19, 300), (5, 40), (9, 511), (2, 384)]
GROUPS = [32, 64, 128, 256, 2048, 48]
KINDS = ["symmetric", "zeros", "affine"]
INPUT_ERROR = {torch.float32: 2.0**-16, torch.bfloat16: 0.0, torch.float16: 0.0}


@pytest.fixture(params=LEVELS, ids=lambda level: f"level{level}", autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Kernels of each level, whose outputs start as NaN."""
    chosen = library.load(request.param)
    monkeypatch.setattr(linear, "load", lambda: chosen)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options))
    yield request.param


def random_packed(kind: str, bits: int, shape: tuple[int, int], group_size: int, seed: int = 0) -> PackedInteger:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-shape[1] // group_size)
    codes = pack(torch.randint(2**bits, shape, generator=generator), bits)
    scale = (torch.rand(shape[0], groups, generator=generator) + 0.01).half()
    if kind == "affine":
        zero = (2**bits * torch.rand(shape[0], groups, generator=generator) - 1).half()
        return PackedAffine(codes, scale, zero, bits=bits, shape=shape, group_size=group_size)
    integer = torch.randint(2**bits, (1, shape[0] * groups), generator=generator)
    zero = None if kind == "symmetric" else pack(integer, bits)
    return PackedInteger(codes, scale, zero, bits=bits, shape=shape, group_size=group_size)


def magnitude(packed: PackedInteger, x: Tensor) -> Tensor:
    """Σ s·(c + |z|)·|x|: what rounding errors of all sums are relative to, fp64 [tokens, out]."""
    group = torch.arange(packed.shape[1]) // packed.group_size
    scale, zero = packed.scale.double()[:, group], packed.unpacked_zero().double()[:, group]
    return x.double().abs() @ (scale * (packed.unpacked_codes() + zero.abs())).T


def assert_within(y: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert y.isfinite().all()
    error = (y.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).nan_to_num().max():.3g} times the bound"


def additions(packed: PackedInteger) -> int:
    """In any chain of sums: one a column at most."""
    return 8 + packed.shape[1] // 8


def draw(tokens: int, columns: int, seed: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", list(INPUT_ERROR))
def test_float_inputs(bits: int, group_size: int, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        packed = random_packed(KINDS[seed % 3], bits, shape, group_size, seed)
        bias = draw(1, shape[0], seed + 50)[0]
        for tokens in (1, 5, 12):
            x = draw(tokens, shape[1], seed + 100).to(dtype)
            expected = x.double() @ packed.dequantize().double().T + bias
            bound = (INPUT_ERROR[dtype] + additions(packed) * EPSILON) * magnitude(packed, x)
            y = linear.multiply(packed, x, bias, None)
            assert y.dtype == dtype
            if dtype != torch.float32:
                bound = bound + torch.finfo(dtype).eps * expected.abs()
            assert_within(y, expected, bound + EPSILON * (expected.abs() + bias.abs()))


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("inputs", [TokenScale(integers(8)), TensorScale(integers(4))])
def test_rounded_inputs(bits: int, group_size: int, inputs: InputRounding) -> None:
    for seed, shape in enumerate(SHAPES):
        packed = random_packed(KINDS[seed % 3], bits, shape, group_size, seed)
        for tokens in (1, 5, 12):
            x = draw(tokens, shape[1], seed + 100) * torch.arange(1, tokens + 1).unsqueeze(1)
            step = inputs.scale(x)
            rounded = inputs.element.snap(x / step).double() * step.double()
            expected = rounded @ packed.dequantize().double().T
            y = linear.multiply(packed, x, None, inputs)
            assert_within(y, expected, additions(packed) * EPSILON * magnitude(packed, rounded))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 2048])
@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_integers_are_exact(bits: int, group_size: int, tokens: int) -> None:
    """With scales that are powers of two, all sums are whole numbers below 2**24: fp32 is exact."""
    for shape in SHAPES[:4]:
        packed = random_packed("zeros", bits, shape, group_size)
        packed.scale = torch.full_like(packed.scale, 0.5)
        whole = torch.randint(-127, 128, (tokens, shape[1]), generator=torch.Generator().manual_seed(bits))
        group = torch.arange(shape[1]) // group_size
        centered = packed.unpacked_codes().int() - packed.unpacked_zero().int()[:, group]
        expected = whole @ centered.long().T
        y = linear.multiply(packed, whole * 0.25, None, StaticScale(integers(8), 127 * 0.25))
        assert torch.equal(y, expected * 0.125)


def test_dequantized_rows_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK", 4 * 1024)  # several parts, the last of them shorter
    for bits in range(1, 9):
        for kind, shape in zip(KINDS, SHAPES[2:5], strict=True):
            packed = random_packed(kind, bits, shape, 64, bits)
            weight = linear.multiply_dequantized(packed, torch.eye(shape[1]), None, None).T
            assert torch.equal(weight, packed.dequantize())
            half = linear.multiply_dequantized(packed, torch.eye(shape[1]).bfloat16(), None, None).T
            assert torch.equal(half, packed.dequantize().bfloat16())


def test_two_threads_compute_what_one_computes() -> None:
    packed, before = random_packed("zeros", 3, (77, 640), 128), torch.get_num_threads()
    x = draw(20, 640, 0)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(
                [
                    linear.multiply(packed, x[:n], None, inputs)
                    for inputs in (None, TokenScale(integers(8)))
                    for n in (1, 20)
                ]
            )
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_shapes_zeros_and_numbers_that_are_none() -> None:
    packed, inputs = random_packed("zeros", 4, (8, 128), 32), TokenScale(integers(8))
    assert linear.multiply(packed, torch.ones(128), None, inputs).shape == (8,)
    assert linear.multiply(packed, torch.ones(2, 3, 128), None, None).shape == (2, 3, 8)
    assert linear.multiply(packed, torch.ones(0, 128), None, inputs).shape == (0, 8)
    assert torch.equal(linear.multiply(packed, torch.zeros(1, 128), None, inputs), torch.zeros(1, 8))
    for bad in (torch.nan, torch.inf):
        x = torch.ones(2, 128)
        x[0, 77] = bad
        for form in (None, inputs):
            y = linear.multiply(packed, x, None, form)
            assert not y[0].isfinite().any()
            assert y[1].isfinite().all()


def test_large_and_small_halves_are_read_exactly() -> None:
    packed = random_packed("symmetric", 8, (4, 128), 32)
    packed.scale = torch.tensor([[65504.0, 6e-8, 6.1e-5, 1.0]] * 4).half()
    weight = linear.multiply_dequantized(packed, torch.eye(128), None, None).T
    assert torch.equal(weight, packed.dequantize())


def test_huge_pages_leave_buffers_equal() -> None:
    packed = random_packed("zeros", 8, (2048, 1152), 128)
    codes = packed.codes.clone()
    huge(packed)
    assert torch.equal(packed.codes, codes)
    assert packed.codes.data_ptr() % 2**21 == 0
    assert "codes" in packed.state_dict()


def test_what_is_refused() -> None:
    packed = random_packed("zeros", 4, (8, 128), 32)
    assert linear.refuses(packed) is None
    packed.group_index = torch.zeros(128, dtype=torch.int16)
    assert "neighbours" in str(linear.refuses(packed))
    strided = random_packed("zeros", 4, (8, 256), 32)
    strided.codes = strided.codes[:, ::2]
    assert "contiguous" in str(linear.refuses(strided))
