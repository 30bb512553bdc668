"""Which kernel multiplies with a packed matrix: a table of rules, of which the first that fits decides.

`using("reference")`, or HAWQ_KERNEL=reference in the environment, sets the choice; each new one is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels import triton
from kernels.cpu import linear as cpu
from kernels.packed import Packed, PackedInteger
from kernels.packed_affine import PackedAffine

if TYPE_CHECKING:  # the layer imports this
    from kernels.linear import Inputs

logger = logging.getLogger(__name__)

REFERENCE = "reference"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Multiply: TypeAlias = "Callable[[Packed, Tensor, Tensor | None, Inputs | None], Tensor]"
Refuses: TypeAlias = "Callable[[Packed, Tensor, Inputs | None], str | None]"


@dataclass(frozen=True)
class Kernel:
    """A way to multiply.

    Args:
        refuses: why it cannot multiply an input with a matrix; None if it can.
    """

    multiply: Multiply
    refuses: Refuses


@dataclass(frozen=True)
class Rule:
    """Where a kernel is the one to take: all that is named here must fit, and what is None fits anything.

    Args:
        kernel: of `KERNELS`.
        device: type of the input's.
        packed: classes of the matrix; subclasses do not count.
        integers: whether inputs are rounded to integers of at most 8 bits.
        dtypes: of the input.
        tokens: how many.
    """

    kernel: str
    device: str
    packed: tuple[type[Packed], ...] | None = None
    integers: bool | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    tokens: range | None = None

    def fits(self, packed: Packed, x: Tensor, inputs: Inputs | None) -> bool:
        """Whether the kernel is to take this product."""
        return (
            x.device.type == self.device
            and (self.packed is None or type(packed) in self.packed)
            and (self.integers is None or cpu.rounds_to_integers(inputs) == self.integers)
            and (self.dtypes is None or x.dtype in self.dtypes)
            and (self.tokens is None or x.shape[:-1].numel() in self.tokens)
        )


def _reference(packed: Packed, x: Tensor, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
    """By torch's operations, from the matrix dequantized."""
    y: Tensor = packed(x if inputs is None else inputs(x), bias)
    return y


def _of_integers(multiply: Callable[[PackedInteger, Tensor, Tensor | None, Inputs | None], Tensor]) -> Multiply:
    def checked(packed: Packed, x: Tensor, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
        assert isinstance(packed, PackedInteger)
        return multiply(packed, x, bias, inputs)

    return checked


def _cpu_refuses(packed: Packed, x: Tensor, inputs: Inputs | None) -> str | None:
    del inputs
    if x.device.type != "cpu" or x.dtype not in FLOATS:
        return f"inputs are {x.dtype} on {x.device}"
    return cpu.refuses(packed)


def _triton(packed: Packed, x: Tensor, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
    from kernels.triton import linear  # imports Triton, which takes a second and is not everywhere

    return linear.multiply(packed, x, bias, inputs)


def _triton_refuses(packed: Packed, x: Tensor, inputs: Inputs | None) -> str | None:
    if reason := triton.missing():
        return reason
    from kernels.triton import linear

    return linear.refuses(packed, x, inputs)


KERNELS: dict[str, Kernel] = {
    REFERENCE: Kernel(_reference, lambda *_: None),
    "cpu": Kernel(_of_integers(cpu.multiply), _cpu_refuses),
    "cpu-dequantized": Kernel(_of_integers(cpu.multiply_dequantized), _cpu_refuses),
    "triton": Kernel(_triton, _triton_refuses),
}
INTEGERS = (PackedInteger, PackedAffine)
FEW = 32
"""Tokens up to which decoding weights for every token is faster than dequantizing them; no rule tells more apart."""
RULES = (
    Rule("cpu", "cpu", INTEGERS, True, FLOATS),
    Rule("cpu", "cpu", INTEGERS, False, FLOATS, range(FEW + 1)),
    Rule("cpu-dequantized", "cpu", INTEGERS, False, FLOATS),
    Rule("triton", "cuda", dtypes=(torch.bfloat16, torch.float16)),
)
FROM_ENVIRONMENT = os.environ.get("HAWQ_KERNEL")
_chosen: ContextVar[str] = ContextVar("kernel")
_choices: WeakKeyDictionary[Packed, dict[tuple[Hashable, ...], str]] = WeakKeyDictionary()


def multiply(packed: Packed, x: Tensor, bias: Tensor | None = None, inputs: Inputs | None = None) -> Tensor:
    """x [..., in], rounded by `inputs`, times the transposed matrix: [..., out], in the dtype of x.

    Raises:
        ValueError: the kernel that was asked for does not take the matrix, or there is none of that name.
    """
    return KERNELS[choose(packed, x, inputs)].multiply(packed, x, bias, inputs)


def choose(packed: Packed, x: Tensor, inputs: Inputs | None = None) -> str:
    """The kernel for a product, of `KERNELS`. Products that are differentiated have the reference's gradients."""
    wanted = _chosen.get(FROM_ENVIRONMENT)
    if wanted is not None:
        return _asked_for(wanted, packed, x, inputs)
    if torch.is_grad_enabled() and x.requires_grad:
        return REFERENCE
    situation = x.device, x.dtype, min(x.shape[:-1].numel(), FEW + 1), inputs
    known = _choices.setdefault(packed, {})
    if situation not in known:
        known[situation] = _choice(packed, x, inputs)
    return known[situation]


def _choice(packed: Packed, x: Tensor, inputs: Inputs | None) -> str:
    """By the rules; logged."""
    name = next((rule.kernel for rule in RULES if rule.fits(packed, x, inputs)), REFERENCE)
    reason = KERNELS[name].refuses(packed, x, inputs)
    name = REFERENCE if reason else name
    _log(name, reason, type(packed).__name__, packed.bits, x.device.type, x.dtype, cpu.rounds_to_integers(inputs))
    return name


@contextmanager
def using(kernel: str) -> Iterator[None]:
    """Take this kernel for every product inside the context."""
    _known(kernel)
    token = _chosen.set(kernel)
    try:
        yield
    finally:
        _chosen.reset(token)


def _asked_for(kernel: str, packed: Packed, x: Tensor, inputs: Inputs | None) -> str:
    if reason := _known(kernel).refuses(packed, x, inputs):
        raise ValueError(f"the kernel {kernel!r} was asked for, but {reason}; {REFERENCE!r} takes any matrix")
    return kernel


def _known(kernel: str) -> Kernel:
    if kernel not in KERNELS:
        raise ValueError(f"there is no kernel {kernel!r}: choose from {', '.join(KERNELS)}")
    return KERNELS[kernel]


@cache
def _log(
    kernel: str, reason: str | None, packed: str, bits: float, device: str, dtype: torch.dtype, ints: bool
) -> None:
    """Once for each choice."""
    inputs = "integers" if ints else str(dtype).removeprefix("torch.")
    because = f", since {reason}" if reason else ""
    logger.info("%s of %g bits × %s on %s: kernel %s%s", packed, bits, inputs, device, kernel, because)
