from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor

from kernels.minifloat import E2M1, E4M3, E8M0
from kernels.packed import Packed
from kernels.packed_float import PackedFloat
from kernels.packing import pack
from kernels.triton import float4
from kernels.triton.float4 import add_multiplied, multiply, prepare, supports
from kernels.triton.launch import Regime

HALF = 1e-3  # fp16 results
SMALL = Regime(16, 16, 64, 4, 2)
Error = Callable[[Tensor, Tensor], float]
Check = Callable[[ModuleType, Packed], None]


def random_packed(random: Generator, group: int, columns: int) -> PackedFloat:
    codes = torch.randint(16, (70, columns), generator=random, dtype=torch.uint8)
    groups = -(-columns // group)
    if group == 32:
        scale, code, tensor = torch.randint(115, 125, (70, groups), generator=random), E8M0, None
    else:
        scale, code, tensor = torch.randint(127, (70, groups), generator=random), E4M3, torch.tensor(0.003)
    options = {"element": E2M1, "scale_code": code, "shape": (70, columns), "group_size": group}
    return PackedFloat(pack(codes, 4), scale.to(torch.uint8), tensor, **options)


@pytest.mark.parametrize("columns", [256, 300, 16])
@pytest.mark.parametrize("group", [16, 32])
def test_a_product_equals_that_of_the_decoded_matrix(random: Generator, error: Error, group: int, columns: int) -> None:
    packed = random_packed(random, group, columns)
    x, bias = torch.randn(2, 3, columns, generator=random).half(), torch.randn(70, generator=random).half()
    assert supports(packed, x) is None
    truth = x.double() @ packed.dequantize().double().t() + bias.double()
    assert error(multiply(prepare(packed), x, bias), truth) < HALF


def test_every_number_and_every_scale_is_exact() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(126, 1)
    scale = torch.arange(126, dtype=torch.uint8)[:, None]
    options = {"element": E2M1, "scale_code": E4M3, "shape": (126, 16), "group_size": 16}
    packed = PackedFloat(pack(codes, 4), scale, None, **options)
    result = add_multiplied(prepare(packed), torch.eye(16), None, SMALL)
    assert torch.equal(result, packed.dequantize().t())


def test_a_sum_that_several_programs_share_and_many_tokens(random: Generator, check_shared: Check) -> None:
    check_shared(float4, random_packed(random, 16, 768))


def test_what_is_not_supported_is_said(random: Generator) -> None:
    packed = random_packed(random, 16, 64)
    assert "16 bits" in str(supports(packed, torch.zeros(1, 64)))
    packed.group_size = 64
    assert "columns" in str(supports(packed, torch.zeros(1, 64).half()))
    packed.scale_code = None
    assert "only E2M1" in str(supports(packed, torch.zeros(1, 64).half()))
