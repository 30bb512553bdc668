"""What the hardware at hand can do, measured: the roofs that kernels are compared with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bench.gpu.replay import captured, interleaved

BYTES = 2**31
SIDE = 8192
CHUNK = 8192
ROUNDS = 10


@triton.jit
def _read(source: tl.tensor, target: tl.tensor, count: tl.tensor, CHUNK: tl.constexpr) -> None:
    total = tl.full((CHUNK,), 0, tl.int32)
    for start in range(tl.program_id(0) * CHUNK, count, tl.num_programs(0) * CHUNK):
        total ^= tl.load(source + start + tl.arange(0, CHUNK))
    tl.store(target + tl.program_id(0), tl.sum(total, 0))


def ceilings() -> dict[str, float]:
    """Bytes a second that are read, and operations a second of large products, a product being two: by name."""
    source = torch.randint(2**31 - 1, (BYTES // 4,), dtype=torch.int32, device="cuda")
    programs = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    target = torch.empty(programs, dtype=torch.int32, device="cuda")
    half = [torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    byte = [torch.randint(-128, 128, (SIDE, SIDE), dtype=torch.int8, device="cuda") for _ in range(2)]
    calls = {
        "read": lambda: _read[(programs,)](source, target, BYTES // 4, CHUNK=CHUNK, num_warps=16),
        "bf16": lambda: half[0] @ half[1].t(),
        "int8": lambda: torch._int_mm(byte[0], byte[1].t()),
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        small = [matrix.to(torch.float8_e4m3fn) for matrix in half]

        def fp8() -> Tensor:
            product: Tensor = torch._scaled_mm(
                small[0], small[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return product

        calls["fp8"] = fp8
    times = interleaved([captured([call] * 2) for call in calls.values()], ROUNDS)
    work = {name: BYTES if name == "read" else 2 * SIDE**3 for name in calls}
    return {name: work[name] / (time / 2 * 1e-6) for name, time in zip(calls, times, strict=True)}
