"""The compiled library and the structures it takes, field by field as in csrc/abi.h."""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.cpu.build import LEVELS, BuildError, library
from kernels.packed import PackedInteger

logger = logging.getLogger(__name__)

MIDDLE, CODES, HALVES = range(3)
_described: WeakKeyDictionary[PackedInteger, Described] = WeakKeyDictionary()
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Matrix(ctypes.Structure):
    """A packed matrix."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("zero_form", ctypes.c_int32),
    )


class Call(ctypes.Structure):
    """Inputs and outputs of a product."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("largest", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Library:
    """The library, loaded.

    Args:
        level: the kernels to run, see `LEVELS`: the best that this machine can, or lower.
    """

    functions: Any
    level: int

    def multiply(self, packed: PackedInteger, x: Tensor, step: Tensor | None, largest: int) -> Tensor:
        """x [tokens, in], contiguous, times the matrix: fp32 [tokens, out].

        Args:
            step: fp32 [tokens], the scales by which inputs are rounded; None takes those of `TokenScale`.
            largest: integer that an input is rounded to; 0 leaves inputs as they are.
        """
        y = torch.empty(len(x), packed.shape[0])
        matrix, threads = _matrix(packed), torch.get_num_threads()
        steps = None if step is None else step.data_ptr()
        call = Call(x.data_ptr(), steps, y.data_ptr(), len(x), DTYPES[x.dtype], largest, threads)
        self.functions.multiply(ctypes.byref(matrix), ctypes.byref(call), self.level)
        return y

    def dequantize(self, packed: PackedInteger, first: int, last: int, out: Tensor) -> None:
        """Rows [first, last) to `out` [last − first, in], fp32 or bf16: `PackedInteger.dequantize`, bit for bit."""
        matrix, threads = _matrix(packed), torch.get_num_threads()
        pointer, dtype = ctypes.c_void_p(out.data_ptr()), DTYPES[out.dtype]
        self.functions.dequantize(ctypes.byref(matrix), first, last, pointer, dtype, threads, self.level)

    def read(self, space: Tensor) -> None:
        """Read a contiguous tensor of bytes from end to end, which tells how fast the machine can."""
        pointer = ctypes.c_void_p(space.data_ptr())
        self.functions.read_all(pointer, ctypes.c_int64(space.nbytes), torch.get_num_threads(), self.level)


@cache
def load(level: int | None = None) -> Library | None:
    """The library, or None where it cannot be built: one warning says why.

    Args:
        level: of `LEVELS`; None takes HAWQ_CPU_LEVEL, else the best of this machine.

    Raises:
        ValueError: this machine cannot run kernels of that level.
    """
    try:
        functions = ctypes.CDLL(str(library()))
    except (BuildError, OSError) as error:
        logger.warning("The CPU kernels cannot be built, torch's operations take their place: %s", error)
        return None
    functions.read_all.restype = ctypes.c_uint64
    functions.dequantize.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, ctypes.c_void_p, *[ctypes.c_int32] * 3]
    best = int(functions.level())
    wanted = int(os.environ.get("HAWQ_CPU_LEVEL", best)) if level is None else level
    if not 0 <= wanted <= best:
        raise ValueError(f"kernels of level {wanted} do not run here: choose 0 to {best} ({LEVELS[best]})")
    logger.info("CPU kernels for %s", LEVELS[wanted])
    return Library(functions, wanted)


@dataclass(frozen=True)
class Described:
    """A matrix as the library sees it, and the tensors that it points into."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    matrix: Matrix


def _matrix(packed: PackedInteger) -> Matrix:
    """Described once, and again when a tensor has been replaced, as by `.to`."""
    codes, scale, zero = packed.codes, packed.scale, packed.zero
    known = _described.get(packed)
    if known is None or known.codes is not codes or known.scale is not scale or known.zero is not zero:
        known = _described[packed] = Described(codes, scale, zero, _describe(packed))
    return known.matrix


def _describe(packed: PackedInteger) -> Matrix:
    zero, (rows, columns) = packed.zero, packed.shape
    form = MIDDLE if zero is None else CODES if zero.dtype == torch.uint8 else HALVES
    assert packed.codes.device.type == "cpu"
    assert packed.scale.dtype == torch.float16
    return Matrix(
        packed.codes.data_ptr(),
        packed.scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        rows,
        columns,
        packed.codes.shape[1],
        packed.scale.shape[1],
        min(packed.group_size, columns),
        int(packed.bits),
        form,
    )
