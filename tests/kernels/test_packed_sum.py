from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.linear import QuantLinear
from kernels.packed import PackedDense, PackedInteger
from kernels.packed_sum import INDEX_LIMIT, PackedLowRank, PackedSparse, PackedSum
from kernels.packing import pack

OUT, COLUMNS = 6, 20


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that fp16 represents."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


def some(density: float, out: int = OUT, columns: int = COLUMNS) -> Tensor:
    """A mask with an empty first, middle and last row."""
    mask = torch.rand(out, columns, generator=torch.Generator().manual_seed(3)) < density
    mask[[0, 3, -1]] = False
    return mask


def integers() -> tuple[PackedInteger, Tensor]:
    """Codes, and the matrix that they stand for."""
    codes = torch.randint(16, (OUT, COLUMNS), generator=torch.Generator().manual_seed(1))
    scale = torch.full((OUT, 1), 0.25)
    base = PackedInteger(pack(codes, 4), scale.half(), None, bits=4, shape=(OUT, COLUMNS), group_size=COLUMNS)
    return base, 0.25 * (codes - 8)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_sparse_holds_the_masked_entries_and_zeros_elsewhere(density: float) -> None:
    matrix, mask = normal(OUT, COLUMNS), some(density)
    packed = PackedSparse.of(matrix, mask)
    assert torch.equal(packed.dequantize(), matrix * mask)
    assert packed.shape == (OUT, COLUMNS)


def test_sparse_keeps_full_rows_and_zeros_that_the_mask_names() -> None:
    matrix, mask = normal(OUT, COLUMNS), torch.ones(OUT, COLUMNS, dtype=torch.bool)
    matrix[2] = 0
    packed = PackedSparse.of(matrix, mask)
    assert torch.equal(packed.dequantize(), matrix)
    assert packed.values.numel() == OUT * COLUMNS


def test_a_row_has_the_entries_from_its_start_to_the_next() -> None:
    matrix, mask = normal(OUT, COLUMNS), some(0.3)
    packed = PackedSparse.of(matrix, mask)
    starts = packed.row_start.tolist()
    assert starts[0] == 0 and starts[-1] == len(packed.values) == int(mask.sum())
    for row, (start, stop) in enumerate(pairwise(starts)):
        columns = [column for column in range(COLUMNS) if mask[row, column]]
        assert packed.columns[start:stop].tolist() == columns
        assert packed.values[start:stop].tolist() == [float(matrix[row, column]) for column in columns]


@pytest.mark.parametrize("density", [0.0, 0.3])
def test_a_sparse_number_costs_32_bits_and_a_row_32(density: float) -> None:
    mask = some(density)
    packed = PackedSparse.of(normal(OUT, COLUMNS), mask)
    assert packed.stored_bits() == (16 + 16) * int(mask.sum()) + 32 * (OUT + 1)


@pytest.mark.parametrize(("columns", "index"), [(INDEX_LIMIT, torch.int16), (INDEX_LIMIT + 1, torch.int32)])
def test_long_rows_have_wide_indices(columns: int, index: torch.dtype) -> None:
    mask = torch.zeros(4, columns, dtype=torch.bool)
    mask[1, -1] = mask[2, 0] = mask[2, -2] = True
    matrix = normal(4, columns)
    packed = PackedSparse.of(matrix, mask)
    assert packed.columns.dtype == index
    assert torch.equal(packed.dequantize(), matrix * mask)


def test_low_rank_is_a_product() -> None:
    left, right = normal(OUT, 3), normal(3, COLUMNS, seed=1)
    packed = PackedLowRank(PackedDense(left.half()), PackedDense(right.half()))
    torch.testing.assert_close(packed.dequantize(), left @ right)
    assert packed.shape == (OUT, COLUMNS)
    assert packed.stored_bits() == 16 * 3 * (OUT + COLUMNS)


def test_low_rank_factors_may_be_quantized() -> None:
    left, expected = integers()
    right = normal(COLUMNS, 5)
    packed = PackedLowRank(left, PackedDense(right.half()))
    torch.testing.assert_close(packed.dequantize(), expected @ right)
    assert packed.bits == 4


def corrections() -> dict[str, tuple[PackedSparse | PackedLowRank, Tensor]]:
    """Corrections, and the matrices that they stand for."""
    matrix, left, right = normal(OUT, COLUMNS), normal(OUT, 2), normal(2, COLUMNS, seed=1)
    return {
        "sparse": (PackedSparse.of(matrix, some(0.3)), matrix * some(0.3)),
        "empty": (PackedSparse.of(matrix, some(0.0)), torch.zeros(OUT, COLUMNS)),
        "low rank": (PackedLowRank(PackedDense(left.half()), PackedDense(right.half())), left @ right),
    }


@pytest.mark.parametrize("kind", corrections())
def test_a_sum_adds_matrices_and_what_they_store(kind: str) -> None:
    (base, matrix), (correction, added) = integers(), corrections()[kind]
    packed = PackedSum(base, correction)
    torch.testing.assert_close(packed.dequantize(), matrix + added)
    assert packed.stored_bits() == base.stored_bits() + correction.stored_bits() > base.stored_bits()
    assert packed.bits == 4 and packed.shape == (OUT, COLUMNS)


@pytest.mark.parametrize("kind", corrections())
@pytest.mark.parametrize("shape", [(COLUMNS,), (7, COLUMNS), (2, 3, COLUMNS)])
def test_forward_is_multiplication_with_the_sum(kind: str, shape: tuple[int, ...]) -> None:
    (base, matrix), (correction, added) = integers(), corrections()[kind]
    x, bias = normal(*shape, seed=5), normal(OUT, seed=6)
    linear = QuantLinear(PackedSum(base, correction), bias)
    torch.testing.assert_close(linear(x), x @ (matrix + added).T + bias)
    torch.testing.assert_close(QuantLinear(correction)(x), x @ added.T)
    assert QuantLinear(PackedSum(base, correction))(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", corrections())
def test_a_state_dict_holds_all_that_dequantize_reads(kind: str) -> None:
    packed = PackedSum(integers()[0], corrections()[kind][0])
    expected = packed.dequantize()
    other = PackedSum(integers()[0], corrections()[kind][0])
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dequantize(), expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    base, _ = integers()
    with pytest.raises(ValueError, match="corrected"):
        PackedSum(base, PackedSparse.of(normal(OUT, COLUMNS + 1), torch.ones(OUT, COLUMNS + 1, dtype=torch.bool)))
    with pytest.raises(ValueError, match="product"):
        PackedLowRank(PackedDense(normal(OUT, 3).half()), PackedDense(normal(2, COLUMNS).half()))
