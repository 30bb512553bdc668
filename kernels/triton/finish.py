"""The end of every kernel: parts of a sum over columns that several programs computed come together."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
    total: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    addend: tl.tensor,
    addend_stride: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Write out[m, n] = Σ over the programs of a tile of `total` [n, m], plus the addend.

    The program that arrives last adds up what all have left, in the order of the columns, so that results do not
    depend on who is faster.

    Args:
        partial: fp32 [SPLIT, M, N], scratch.
        arrived: int32, one per tile: 0 before and after.
        addend: [M, N] with rows `addend_stride` apart, 0 for a bias; not looked at unless ADD.
    """
    mask = (n < N)[:, None] & (m < M)[None, :]
    place = m[None, :].to(tl.int64) * N + n[:, None]
    if SPLIT == 1:
        _write(total, place, mask, n, m, addend, addend_stride, out, ADD)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + tl.program_id(2).to(tl.int64) * M * N + place, total, mask=mask)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrived + tile, 0)
            whole = tl.full(total.shape, 0, tl.float32)
            for part in range(SPLIT):
                source = partial + tl.cast(part, tl.int64) * M * N + place
                whole += tl.load(source, mask=mask, other=0, cache_modifier=".cg")
            _write(whole, place, mask, n, m, addend, addend_stride, out, ADD)


@triton.jit
def _write(
    total: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    addend: tl.tensor,
    addend_stride: tl.tensor,
    out: tl.tensor,
    ADD: tl.constexpr,
) -> None:
    if ADD:
        total += tl.load(addend + m[None, :].to(tl.int64) * addend_stride + n[:, None], mask=mask, other=0).to(
            tl.float32
        )
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
