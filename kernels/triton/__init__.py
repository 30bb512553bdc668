"""Multiplication by packed matrices on GPUs, in Triton.

Every kernel here computes Yᵀ = Ŵ Xᵀ: weights are the left operand of the tensor cores, decoded in registers and never
written to shared memory, and tokens, however few, are the right one ("swapped" operands, as in Machete and Marlin).
A format has a module of its own with the same three functions, from which a dispatch table is made:

    supports(packed, x)             can this module multiply `packed` with x? None, or why not, in words
    prepare(packed)                 the tensors that the kernel reads; done once, exact
    multiply(prepared, x, bias)     y [..., out] in the dtype of x [..., in]

Importing `kernels.triton` does not need triton; importing its modules does.
"""

from __future__ import annotations

from importlib.util import find_spec


def missing() -> str | None:
    """None where Triton is installed, else one sentence on what to do."""
    if find_spec("triton") is None:
        return "the GPU kernels need Triton; install it with `pip install 'hawq-bench[gpu]'`"
    return None
