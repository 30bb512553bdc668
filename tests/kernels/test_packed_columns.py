"""Columns in 16 bits: what they replace, what they add to storage, and indices of wide matrices."""

import pytest
import torch
from torch import Tensor

from kernels.linear import QuantLinear
from kernels.packed import PackedDense, PackedInteger
from kernels.packed_columns import PackedColumns
from kernels.packed_sum import INDEX_LIMIT
from kernels.packing import pack

OUT, COLUMNS = 6, 20
PLACES = [0, 7, 19]


def integers() -> tuple[PackedInteger, Tensor]:
    """Codes, and the matrix that they stand for."""
    codes = torch.randint(16, (OUT, COLUMNS), generator=torch.Generator().manual_seed(1))
    scale = torch.full((OUT, 1), 0.25)
    base = PackedInteger(pack(codes, 4), scale.half(), None, bits=4, shape=(OUT, COLUMNS), group_size=COLUMNS)
    return base, 0.25 * (codes - 8)


def kept(dtype: torch.dtype = torch.float16, count: int = len(PLACES), out: int = OUT) -> Tensor:
    return torch.randn(out, count, generator=torch.Generator().manual_seed(2)).to(dtype)


def mask(columns: int = COLUMNS, places: list[int] = PLACES) -> Tensor:
    return torch.zeros(columns, dtype=torch.bool).index_fill(0, torch.tensor(places, dtype=torch.int64), True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_columns_stand_in_place_of_the_codes(dtype: torch.dtype) -> None:
    base, matrix = integers()
    columns = kept(dtype)
    packed = PackedColumns.of(base, PackedDense(columns), mask())
    decoded = packed.dequantize()
    for column in range(COLUMNS):
        expected = columns[:, PLACES.index(column)].float() if column in PLACES else matrix[:, column]
        assert torch.equal(decoded[:, column], expected)
    assert torch.equal(base.dequantize(), matrix)
    assert (packed.shape, packed.bits) == ((OUT, COLUMNS), 4)


@pytest.mark.parametrize("places", [[], list(range(COLUMNS))])
def test_none_or_all_columns_may_be_kept(places: list[int]) -> None:
    base, matrix = integers()
    columns = kept(count=len(places))
    decoded = PackedColumns.of(base, PackedDense(columns), mask(places=places)).dequantize()
    assert torch.equal(decoded, columns.float() if places else matrix)


def test_a_kept_column_is_stored_once_and_with_one_place() -> None:
    base, _ = integers()
    packed = PackedColumns.of(base, PackedDense(kept()), mask())
    assert packed.stored_bits() == base.stored_bits() + len(PLACES) * (16 * OUT + 16)


@pytest.mark.parametrize(("columns", "dtype"), [(INDEX_LIMIT, torch.int16), (INDEX_LIMIT + 1, torch.int32)])
def test_the_last_column_of_a_wide_matrix_has_a_place(columns: int, dtype: torch.dtype) -> None:
    base = PackedDense(torch.zeros(1, columns, dtype=torch.float16))
    packed = PackedColumns.of(base, PackedDense(kept(count=1, out=1)), mask(columns, [columns - 1]))
    assert packed.index.dtype == dtype
    assert torch.equal(packed.dequantize()[:, -1], kept(count=1, out=1)[:, 0].float())


def test_a_linear_computes_with_the_kept_columns() -> None:
    base, matrix = integers()
    matrix[:, PLACES] = kept().float()
    x, bias = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(4)), torch.ones(OUT)
    linear = QuantLinear(PackedColumns.of(base, PackedDense(kept()), mask()), bias)
    torch.testing.assert_close(linear(x), x @ matrix.T + bias)


def test_columns_of_another_number_or_height_are_refused() -> None:
    base, _ = integers()
    for columns in (kept(count=2), kept(out=OUT + 1)):
        with pytest.raises(ValueError, match="do not fit 3 places"):
            PackedColumns.of(base, PackedDense(columns), mask())
