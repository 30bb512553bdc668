import pytest
import torch
from torch import Tensor

from kernels.packed_normal_float import DYNAMIC, NF4_LEVELS, PackedNormalFloat
from kernels.packing import pack, row_bytes

OUT, COLUMNS, BLOCKS = 5, 64 * 60 + 20, 61  # 305 blocks: one second-level block and a part

doubles = pytest.mark.parametrize("double", [False, True])


def build(double: bool, seed: int = 0) -> tuple[PackedNormalFloat, Tensor]:
    """Random codes, and the matrix they stand for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (OUT, COLUMNS), generator=generator, dtype=torch.uint8)
    factor, mean = torch.rand(2, generator=generator) + 0.5, torch.rand((), generator=generator)
    stored = (
        torch.randint(256, (OUT, BLOCKS), generator=generator, dtype=torch.uint8) if double else torch.rand(OUT, BLOCKS)
    )
    scale = stored
    if double:
        values = [DYNAMIC.levels[code] * factor[i // 256] + mean for i, code in enumerate(stored.flatten().tolist())]
        scale = torch.stack(values).view(OUT, BLOCKS)
    expected = torch.tensor(NF4_LEVELS.levels)[codes.long()] * scale.repeat_interleave(64, 1)[:, :COLUMNS]
    second = (factor, mean) if double else (None, None)
    return PackedNormalFloat(pack(codes, 4), stored, *second, shape=(OUT, COLUMNS), group_size=64), expected


@doubles
def test_codes_stand_for_levels_times_scales(double: bool) -> None:
    packed, expected = build(double)
    torch.testing.assert_close(packed.dequantize(), expected)


@doubles
def test_stored_bits_count_codes_and_scales(double: bool) -> None:
    packed, _ = build(double)
    scales = 8 * OUT * BLOCKS + 3 * 32 if double else 32 * OUT * BLOCKS
    assert packed.stored_bits() == 8 * OUT * row_bytes(COLUMNS, 4) + scales


@doubles
def test_a_state_dict_holds_all_that_dequantize_reads(double: bool) -> None:
    packed, expected = build(double)
    other, _ = build(double, seed=1)
    assert not torch.equal(other.dequantize(), packed.dequantize())
    other.load_state_dict(packed.state_dict())
    torch.testing.assert_close(other.dequantize(), expected)
