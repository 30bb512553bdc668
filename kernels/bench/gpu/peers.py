"""Other implementations: what PyTorch has built in, and libraries where they can be imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.gpu.contenders import Contender, Maker
from kernels.bench.gpu.shapes import Shape

GROUP = 128
LEAST = 32  # tokens to which `_int_mm` and `_scaled_mm` are padded


def tinygemm(shape: Shape, tokens: int) -> Contender:
    """`_weight_int4pack_mm`: weight = (code − 8) · scale + zero."""
    del tokens
    rows, columns = shape[:2]

    def fresh() -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(16, (rows, columns), dtype=torch.uint8, device="cuda")
        packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        numbers = torch.rand(columns // GROUP, rows, 2, device="cuda").mul_(0.02).add_(0.005).bfloat16()
        return packed, numbers, codes[:0]

    codes = torch.randint(16, (rows, columns), dtype=torch.uint8, device="cuda")
    _, numbers, _ = fresh()
    first = (torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8), numbers, codes[:0])

    def truth() -> Tensor:
        step, zero = numbers.float().permute(2, 1, 0).unsqueeze(-1)  # [rows, groups, 1]
        return ((codes.float().view(rows, -1, GROUP) - 8) * step + zero).flatten(1)

    size = rows * columns // 2 + numbers.nbytes
    call = lambda x, w: torch._weight_int4pack_mm(x, w[0], GROUP, w[1])  # noqa: E731
    return Contender("torch int4pack g128", size, call, first, fresh, truth)


def int_mm(shape: Shape, tokens: int) -> Contender:
    """`_int_mm` on inputs that are rounded already, without scales: less work than W8A8 has."""
    rows, columns = shape[:2]
    inputs = torch.randint(-127, 128, (max(tokens, LEAST), columns), dtype=torch.int8, device="cuda")

    def fresh() -> Tensor:
        return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device="cuda")

    first = fresh()
    call = lambda _, w: torch._int_mm(inputs, w.t())  # noqa: E731
    return Contender("torch _int_mm, product only", first.nbytes, call, first, fresh, lambda: torch.empty(0))


def scaled_mm(shape: Shape, tokens: int) -> Contender:
    """`_scaled_mm` with scales per token and channel, on inputs that are rounded already."""
    rows, columns = shape[:2]
    size = max(tokens, LEAST)
    inputs = torch.randn(size, columns, device="cuda").to(torch.float8_e4m3fn)
    left, right = torch.rand(size, 1, device="cuda"), torch.rand(1, rows, device="cuda")

    def fresh() -> Tensor:
        return torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)

    def call(_: Tensor, weight: Tensor) -> Tensor:
        return torch._scaled_mm(inputs, weight.t(), scale_a=left, scale_b=right, out_dtype=torch.bfloat16)

    first = fresh()
    return Contender("torch _scaled_mm, product only", first.nbytes, call, first, fresh, lambda: torch.empty(0))


def compiled_int8(shape: Shape, tokens: int) -> Contender:
    """torch.compile of a weight-only linear."""
    del tokens
    rows, columns = shape[:2]
    scale = torch.rand(rows, device="cuda").mul_(0.02).bfloat16()

    def fresh() -> Tensor:
        return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device="cuda")

    first = fresh()
    call = torch.compile(lambda x, w: F.linear(x, w.to(x.dtype)) * scale, dynamic=False)
    name = "torch.compile W8A16 channel"
    return Contender(name, first.nbytes, call, first, fresh, lambda: first.float() * scale.float()[:, None])


def gemlite(shape: Shape, tokens: int) -> Contender:
    """GemLite's W4A16."""
    del tokens
    rows, columns = shape[:2]
    core: Any = import_module("gemlite.core")
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8, device="cuda")
    scale = torch.rand(rows * columns // GROUP, 1, device="cuda").mul_(0.02).add_(0.005).half()
    zero = torch.randint(16, scale.shape, device="cuda").half()

    def fresh() -> Any:
        layer = core.GemLiteLinearTriton(4, GROUP, columns, rows, core.DType.FP16, core.DType.FP16)
        layer.pack(codes, scale, zero, bias=None)
        return layer

    def truth() -> Tensor:
        return ((codes.float().view(-1, GROUP) - zero.float()) * scale.float()).view(rows, columns)

    size = rows * columns // 2 + 2 * scale.nbytes
    call = lambda x, layer: layer(x.half())  # noqa: E731
    return Contender("gemlite W4A16 g128", size, call, fresh(), fresh, truth)


def bitsandbytes(shape: Shape, tokens: int) -> Contender:
    """bitsandbytes' NF4, blocks of 64."""
    del tokens
    library: Any = import_module("bitsandbytes")

    def fresh() -> tuple[Tensor, Any]:
        matrix = torch.randn(shape[:2], dtype=torch.bfloat16, device="cuda")
        packed: tuple[Tensor, Any] = library.functional.quantize_4bit(matrix, quant_type="nf4")
        return packed

    first = fresh()
    size = first[0].nbytes + first[1].absmax.nbytes
    call = lambda x, w: library.matmul_4bit(x, w[0].t(), w[1])  # noqa: E731
    truth = lambda: library.functional.dequantize_4bit(*first).float()  # noqa: E731
    return Contender("bitsandbytes NF4", size, call, first, fresh, truth)


def torchao(shape: Shape, tokens: int) -> Contender:
    """torchao's weight-only int4."""
    del tokens
    library: Any = import_module("torchao.quantization")

    def fresh() -> torch.nn.Module:
        layer = torch.nn.Linear(shape.columns, shape.rows, bias=False, dtype=torch.bfloat16, device="cuda")
        library.quantize_(layer, library.Int4WeightOnlyConfig(group_size=GROUP))
        return layer

    first = fresh()
    size = shape.rows * shape.columns // 2 + 4 * shape.rows * shape.columns // GROUP
    call = lambda x, layer: layer(x)  # noqa: E731
    return Contender("torchao int4 g128", size, call, first, fresh, lambda: torch.empty(0))


PEERS: tuple[Maker, ...] = (tinygemm, int_mm, scaled_mm, gemlite, bitsandbytes, torchao, compiled_int8)
