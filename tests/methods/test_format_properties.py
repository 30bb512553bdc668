"""What holds for every number format and every matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, Code, Element
from methods.formats.base import Format, Grid
from methods.formats.integer import WIDTHS, Integer
from methods.formats.registry import FORMATS

NAMED = [fmt for name, fmt in FORMATS.items() if name != "dense16"]
GROUPS = [(0, False), (0, True), (32, False), (32, True)]  # group size and symmetry; all of them at 3 bits
INTEGERS = [Integer(width, *GROUPS[width % 4]) for width in WIDTHS] + [Integer(3, *group) for group in GROUPS[:3]]
CODED = [*NAMED, *INTEGERS]

formats = pytest.mark.parametrize("fmt", CODED, ids=lambda fmt: fmt.name)
every = pytest.mark.parametrize("fmt", [*CODED, FORMATS["dense16"]], ids=lambda fmt: fmt.name)

MAGNITUDES = (1e-40, 1e-30, 1e-8, 1e-3, 1.0, 100.0)
UNUSED = {name: 128 for name in FORMATS if name.startswith("mxint8")}  # the lowest number, which has no counterpart
SHAPES = [(1, 1), (3, 8), (2, 31), (2, 64), (3, 80), (1, 257), (2, 300)]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Small matrices with what breaks formats: zero blocks, single outliers, signed zeros, subnormals, one sign."""
    out, columns = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(out, columns, generator=generator) * draw(st.sampled_from(MAGNITUDES))
    kind = draw(st.sampled_from(["plain", "zero block", "zero row", "zeros", "outlier", "signed zeros", "one sign"]))
    if kind == "zero block":
        weight[:, : -(-columns // 2)] = 0
    elif kind == "zero row":
        weight[-1] = 0
    elif kind == "zeros":
        weight.zero_()
    elif kind == "outlier":
        weight[0, draw(st.integers(0, columns - 1))] *= 50
    elif kind == "signed zeros":
        weight[:, ::3] = -0.0
    elif kind == "one sign":
        weight = draw(st.sampled_from([1, -1])) * weight.abs()
    return weight


def checked(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True)


def points(fmt: Format, grid: Grid, like: Tensor) -> Tensor:
    """All that the codes of each weight can stand for: fp64 [codes, out, in], infinite where that is no number."""
    codes = [code for code in range(2 ** round(fmt.bits)) if code != UNUSED.get(fmt.name)]
    values = torch.stack([grid.decode(torch.full_like(like, code, dtype=torch.uint8)) for code in codes])
    return values.double().nan_to_num(nan=torch.inf)


@formats
@checked(12)
@given(weight=matrices(), factor=st.sampled_from([0.0, 1e-3, 3.0, 1e4, -1e4]))
def test_every_weight_takes_the_nearest_number_there_is(fmt: Format, weight: Tensor, factor: float) -> None:
    """Also weights that the grid was not fitted to, which saturate."""
    grid = fmt.fit(weight)
    values = points(fmt, grid, weight)
    rounding = 1e-6 * torch.where(values.isfinite(), values, 0).abs().amax(0) + 1e-44
    for w in (weight, factor * weight):
        least = (values - w.double()).abs().amin(0)
        error = (grid.snap(w).double() - w.double()).abs()
        assert (error <= least * (1 + 1e-6) + rounding).all()


@every
@checked(25)
@given(weight=matrices())
def test_packing_keeps_the_rounded_matrix_in_the_promised_bits(fmt: Format, weight: Tensor) -> None:
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert packed.shape == tuple(weight.shape)
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    stored = sum(8 * buffer.numel() * buffer.element_size() for buffer in packed.state_dict().values())
    assert stored == packed.stored_bits() == fmt.stored_bits((weight.shape[0], weight.shape[1]))


@every
@checked(15)
@given(weight=matrices())
def test_grid_points_are_rounded_to_themselves_and_zero_rows_are_zero(fmt: Format, weight: Tensor) -> None:
    grid = fmt.fit(weight)
    snapped = grid.snap(weight)
    assert snapped.dtype == torch.float32
    assert snapped.isfinite().all()
    assert torch.equal(grid.snap(snapped), snapped)
    assert not snapped[(weight == 0).all(1)].any()


@formats
@checked(8)
@given(weight=matrices(), data=st.data())
def test_column_ranges_and_permutations_agree_with_the_whole_matrix(
    fmt: Format, weight: Tensor, data: st.DataObject
) -> None:
    columns = weight.shape[1]
    start = data.draw(st.integers(0, columns - 1))
    stop = data.draw(st.integers(start + 1, columns))
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(start))
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    assert torch.equal(grid.encode(weight[:, start:stop], start), codes[:, start:stop])
    assert torch.equal(grid.decode(codes[:, start:stop], start), grid.decode(codes)[:, start:stop])
    assert torch.equal(grid.permuted(order).encode(weight[:, order]), codes[:, order])
    assert torch.equal(grid.permuted(order).pack(codes[:, order], order).dequantize(), grid.decode(codes))


@every
@checked(8)
@given(weight=matrices(), factor=st.sampled_from([0.5, 1.0, 2.0]), data=st.data())
def test_a_refitted_group_is_stored_as_it_is_read(
    fmt: Format, weight: Tensor, factor: float, data: st.DataObject
) -> None:
    grid = fmt.fit(weight)
    group = data.draw(st.integers(0, (weight.shape[1] - 1) // grid.group_size))
    columns = slice(group * grid.group_size, (group + 1) * grid.group_size)
    before = grid.snap(weight)
    grid.refit(group, factor * weight[:, columns])
    codes = grid.encode(weight)
    after = grid.decode(codes)
    assert torch.equal(grid.pack(codes).dequantize(), after)
    before[:, columns] = after[:, columns]
    assert torch.equal(before, after)


@checked(25)
@given(weight=matrices())
def test_dense_weights_are_16_bit_floats(weight: Tensor) -> None:
    snapped = FORMATS["dense16"].fit(weight).snap(weight)
    assert torch.equal(snapped, weight.half().float()) or torch.equal(snapped, weight.bfloat16().float())


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        (E4M3, "float8_e4m3fn"),
        (E5M2, "float8_e5m2"),
        (E2M1, "float4_e2m1fn"),
        (E3M2, "float6_e3m2fn"),
        (E2M3, "float6_e2m3fn"),
        (E8M0, "float8_e8m0fnu"),
    ],
)
def test_tables_are_those_of_ml_dtypes(code: Code, dtype: str) -> None:
    theirs = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype))
    table = np.arange(2**code.bits, dtype=np.uint8).view(theirs).astype(np.float32)
    np.testing.assert_array_equal(code.values().numpy(), table)


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (E4M3, "float8_e4m3fn"),
        (E5M2, "float8_e5m2"),
        (E2M1, "float4_e2m1fn"),
        (E3M2, "float6_e3m2fn"),
        (E2M3, "float6_e2m3fn"),
    ],
)
def test_rounding_is_that_of_ml_dtypes(element: Element, dtype: str) -> None:
    theirs = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype))
    middle = (element.values()[:, None] + element.values()) / 2  # with all half-way cases
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) * element.max / 3, middle.flatten()])
    x = x[x.abs() <= element.max]
    np.testing.assert_array_equal(element.snap(x).numpy(), x.numpy().astype(theirs).astype(np.float32))
