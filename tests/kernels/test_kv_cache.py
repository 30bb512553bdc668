"""Rows of cached keys and values: brute-force nearest grid points, sizes, layout."""

import pytest
import torch
from torch import Tensor

from kernels.kv_cache import ROW_FORMATS, AffineRows, Float8Rows


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_numbers_take_the_nearest_of_the_grid_between_the_extremes(bits: int) -> None:
    x = rows(2, 3, 5, 24) + 3
    fmt = AffineRows(bits)
    decoded = fmt.decode(fmt.encode(x), 24)
    low = x.amin(-1, keepdim=True).half().float()
    step = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    points = low + step * torch.arange(2**bits)  # [2, 3, 5, codes]
    nearest = (points.unsqueeze(-2) - x.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((decoded - x).abs(), nearest)
    assert (nearest <= step / 2 + low.abs() * 2**-11 + step * 2**bits * 2**-11).all()


def test_two_extremes_and_constants_are_kept_to_fp16() -> None:
    two = torch.tensor([[[[-1.5, 2.25, 2.25, -1.5]]]])
    for bits in (2, 4, 8):
        decoded = AffineRows(bits).decode(AffineRows(bits).encode(two), 4)
        torch.testing.assert_close(decoded, two, atol=2e-3, rtol=0)
    for value in (0.0, 1.0, -3.3, 1e-4):
        constant = torch.full((1, 1, 2, 8), value)
        decoded = AffineRows(4).decode(AffineRows(4).encode(constant), 8)
        torch.testing.assert_close(decoded, constant, atol=1e-6, rtol=2**-10)


def test_fp8_agrees_with_the_hardware_type_and_saturates() -> None:
    x = 20 * rows(2, 2, 4, 16)
    fmt = Float8Rows()
    assert torch.equal(fmt.decode(fmt.encode(x), 16), x.to(torch.float8_e4m3fn).float())
    assert fmt.decode(fmt.encode(torch.tensor([[[[1e4, -1e4]]]])), 2).tolist() == [[[[448.0, -448.0]]]]


@pytest.mark.parametrize("name", ROW_FORMATS)
@pytest.mark.parametrize("width", [64, 80, 128, 10])
def test_a_row_takes_the_promised_bytes(name: str, width: int) -> None:
    fmt = ROW_FORMATS[name]
    stored = fmt.encode(rows(2, 3, 4, width))
    assert stored.dtype == torch.uint8
    assert stored.shape == (2, 3, 4, fmt.row_bytes(width))
    assert fmt.decode(stored, width).shape == (2, 3, 4, width)


def test_sizes_by_hand() -> None:
    sizes = {"int8": 64 + 4, "int4": 32 + 4, "int3": 24 + 4, "int2": 16 + 4, "fp8": 64}
    assert {name: ROW_FORMATS[name].row_bytes(64) for name in sizes} == sizes


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_rows_are_independent_and_any_layout_and_dtype_will_do(name: str) -> None:
    fmt, x = ROW_FORMATS[name], rows(2, 5, 3, 16)
    whole = fmt.encode(x)
    assert torch.equal(fmt.encode(x[:, 2:4]), whole[:, 2:4])
    assert torch.equal(fmt.encode(x.transpose(1, 2)), whole.transpose(1, 2))  # as models hand keys over
    assert torch.equal(fmt.decode(whole.transpose(1, 2), 16), fmt.decode(whole, 16).transpose(1, 2))
    half = x.bfloat16()
    assert torch.equal(fmt.encode(half), fmt.encode(half.float()))
