"""What the bench compares: our kernels and what others offer for the same product, each with weights of its own.

Each holds so many copies of its matrix that together they are several times the last cache, and takes the next at
every call, as a model takes another linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.activations import TokenScale, integers
from kernels.bench import ggml
from kernels.cpu.pages import huge
from kernels.linear import Inputs
from kernels.packed import PackedInteger
from kernels.packing import row_bytes

GROUP = 128
TORCH = "torch"
ROTATION = 2**27
"""Bytes that the copies of one matrix take together at least."""


@dataclass(frozen=True)
class Contender:
    """A product x · Wᵀ.

    Args:
        multiply: copy number to y [tokens, out].
        exact: what y stands for, fp64: the product of the same weights without roundings on the way.
        tolerance: of ‖y − exact‖ over ‖exact‖, for what the kernel rounds: inputs, sums, results.
        bytes: of one copy of the matrix, scales and zeros included.
        copies: of it.
        peer: whose kernel it is; empty for ours.
    """

    multiply: Callable[[int], Tensor]
    exact: Tensor
    tolerance: float
    bytes: int
    copies: int
    peer: str = ""

    def __call__(self, call: int) -> Tensor:
        """With the copy that is next."""
        return self.multiply(call % self.copies)

    def error(self) -> float:
        """‖y − exact‖ over ‖exact‖ of the first copy."""
        return float((self.multiply(0).double() - self.exact).norm() / self.exact.norm())


@dataclass(frozen=True)
class Task:
    """The product to compute: x fp32 [tokens, in], and random integers of 8 bits to cut codes from, [out, in]."""

    x: Tensor
    integers: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.integers.shape[0], self.integers.shape[1]


def task(out: int, columns: int, tokens: int, seed: int = 0) -> Task:
    """Random data."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (out, columns), dtype=torch.uint8, generator=generator)
    return Task(torch.randn(tokens, columns, generator=generator), codes)


def contenders(given: Task) -> dict[str, Contender]:
    """All of them by name; ggml's only where it is found."""
    found: dict[str, Contender] = {}
    for bits in (2, 3, 4, 8):
        found[f"W{bits}A8"] = ours(given, bits, torch.float32, TokenScale(integers(8)))
        found[f"W{bits}A16 bf16"] = ours(given, bits, torch.bfloat16, None)
        found[f"W{bits}A16 fp32"] = ours(given, bits, torch.float32, None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found[f"F.linear {str(dtype)[6:]}"] = dense(given, dtype)
    found |= {"int4pack": int4pack(given), "int8pack": int8pack(given)}
    found |= {"_int_mm": int_mm(given), "oneDNN u8s8": onednn(given)}
    if ggml.library() is not None:
        found["llama.cpp Q4_K"] = llama_cpp(given)
    return found


def copies(size: int) -> int:
    """Of a matrix of so many bytes."""
    return max(2, ceil(ROTATION / size))


def ours(given: Task, bits: int, dtype: torch.dtype, inputs: Inputs | None) -> Contender:
    """Our kernel, with fp16 scales and packed zeros for groups of 128, on huge pages."""
    (out, columns), generator = given.shape, torch.Generator().manual_seed(bits)
    groups = -(-columns // GROUP)
    zeros = torch.randint(256, (1, row_bytes(out * groups, bits)), dtype=torch.uint8, generator=generator)
    size = row_bytes(columns, bits)

    def draw(copy: int) -> PackedInteger:
        codes = given.integers[:, :size].roll(copy, 0).contiguous()
        scale = (torch.rand(out, groups, generator=generator) + 0.5).half()
        packed = PackedInteger(codes, scale, zeros.clone(), bits=bits, shape=given.shape, group_size=GROUP)
        huge(packed)
        return packed

    matrices = [draw(copy) for copy in range(copies(out * size))]
    x = given.x.to(dtype)
    seen = x if inputs is None else inputs(x)
    exact = seen.double() @ matrices[0].dequantize().double().T
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    stored = matrices[0].stored_bits() // 8
    return Contender(lambda i: dispatch.multiply(matrices[i], x, None, inputs), exact, tolerance, stored, len(matrices))


def dense(given: Task, dtype: torch.dtype) -> Contender:
    """torch's own product."""
    weights = _rotated(_weight(given).to(dtype))
    x = given.x.to(dtype)
    exact, tolerance = x.double() @ weights[0].double().T, 1e-4 if dtype == torch.float32 else 1e-2
    return Contender(lambda i: F.linear(x, weights[i]), exact, tolerance, weights[0].nbytes, len(weights), TORCH)


def int4pack(given: Task) -> Contender:
    """torch's 4-bit kernel, in bf16, for which it is made: weight = (code − 8) · scale + zero."""
    out, columns = given.shape
    codes = (given.integers & 15).int()
    scale = torch.rand(columns // GROUP, out, 1).add(0.5)
    grid = torch.cat([scale, torch.rand_like(scale)], 2).bfloat16()
    packed = _rotated(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
    x = given.x.bfloat16()
    spread = grid.double().repeat_interleave(GROUP, 0)
    weight = (codes.double() - 8) * spread[..., 0].T + spread[..., 1].T

    def multiply(i: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[i], GROUP, grid)

    return Contender(multiply, x.double() @ weight.T, 1e-2, packed[0].nbytes + grid.nbytes, len(packed), TORCH)


def int8pack(given: Task) -> Contender:
    """torch's 8-bit kernel for bf16 inputs, with a scale a row."""
    weights, scale = _rotated(_signed(given)), torch.rand(given.shape[0]).add(0.5).bfloat16()
    x = given.x.bfloat16()
    exact = x.double() @ (weights[0].double() * scale.double().unsqueeze(1)).T

    def multiply(i: int) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, weights[i], scale)

    return Contender(multiply, exact, 1e-2, weights[0].nbytes, len(weights), TORCH)


def int_mm(given: Task) -> Contender:
    """torch's product of int8 matrices to int32, with inputs rounded before."""
    weights, x = _rotated(_signed(given)), _rounded(given).to(torch.int8)
    exact = x.double() @ weights[0].double().T
    return Contender(lambda i: torch._int_mm(x, weights[i].t()), exact, 0.0, weights[0].nbytes, len(weights), TORCH)


def onednn(given: Task) -> Contender:
    """oneDNN's product with a scale a row, with inputs rounded before, to 8 bits with a zero of 128: it wants those."""
    out, _ = given.shape
    signed, scale, step = _rotated(_signed(given)), torch.rand(out).add(0.5), 0.05
    x = (_rounded(given) + 128).to(torch.uint8)
    packed = [torch.ops.onednn.qlinear_prepack(weight, list(x.shape)) for weight in signed]
    zeros = torch.zeros(out, dtype=torch.int64)
    exact = step * (x.double() - 128) @ (signed[0].double() * scale.double().unsqueeze(1)).T

    def multiply(i: int) -> Tensor:
        rest: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, result in fp32 as it is
        return torch.ops.onednn.qlinear_pointwise(x, step, 128, packed[i], scale, zeros, *rest)

    return Contender(multiply, exact, 1e-4, signed[0].nbytes, len(signed), "oneDNN")


def llama_cpp(given: Task) -> Contender:
    """llama.cpp's 4-bit k-quant, which rounds inputs to 8 bits in blocks of 256."""
    weight = _weight(given)
    first = ggml.Product(weight, len(given.x))
    products = [first, *(ggml.Product(weight, len(given.x), first) for _ in range(copies(first.bytes) - 1))]
    exact = given.x.double() @ weight.double().T
    return Contender(lambda i: products[i](given.x), exact, 0.15, first.bytes, len(products), "llama.cpp")


def _weight(given: Task) -> Tensor:
    """About standard normal: fp32."""
    return (given.integers.float() - 127.5) / 74


def _signed(given: Task) -> Tensor:
    return (given.integers.short() - 128).clamp_(min=-127).to(torch.int8)


def _rounded(given: Task) -> Tensor:
    """Integers from −127 to 127."""
    return (given.x * (127 / given.x.abs().amax(1, keepdim=True))).round()


def _rotated(weight: Tensor) -> Sequence[Tensor]:
    return [weight, *(weight.clone() for _ in range(copies(weight.nbytes) - 1))]
