"""llama.cpp's product with k-quants, by ggml's shared libraries where a build is found.

HAWQ_GGML names the folder that has libggml-base and libggml-cpu, as a build of llama.cpp or its Python package has.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

F32, Q4_K = 0, 12  # numbers of types in ggml.h
POOL = 2**20  # bytes of a context without data

Address, Count = ctypes.c_void_p, ctypes.c_int64


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True)
class Library:
    """ggml's two libraries."""

    base: Any
    cpu: Any


@cache
def library() -> Library | None:
    """The libraries in HAWQ_GGML; None where they are not."""
    folder = os.environ.get("HAWQ_GGML")
    if not folder:
        return None
    paths = [Path(folder) / f"libggml-{part}.so" for part in ("base", "cpu")]
    if not all(path.exists() for path in paths):
        return None
    base, cpu = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths)
    return Library(_declared(base), _declared_cpu(cpu))


def _declared(base: Any) -> Any:
    base.ggml_init.argtypes, base.ggml_init.restype = [_Parameters], Address
    base.ggml_new_tensor_2d.argtypes, base.ggml_new_tensor_2d.restype = [Address, ctypes.c_int, Count, Count], Address
    base.ggml_mul_mat.argtypes, base.ggml_mul_mat.restype = [Address] * 3, Address
    base.ggml_new_graph.argtypes, base.ggml_new_graph.restype = [Address], Address
    base.ggml_build_forward_expand.argtypes = [Address, Address]
    base.ggml_get_data.argtypes, base.ggml_get_data.restype = [Address], Address
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, Address, Address, Count, Count, Count, Address]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes, base.ggml_row_size.restype = [ctypes.c_int, Count], ctypes.c_size_t
    base.ggml_free.argtypes = base.ggml_reset.argtypes = [Address]
    return base


def _declared_cpu(cpu: Any) -> Any:
    cpu.ggml_cpu_init.argtypes = []
    cpu.ggml_graph_compute_with_ctx.argtypes = [Address, Address, ctypes.c_int]
    cpu.ggml_cpu_init()
    return cpu


class Product:
    """x [tokens, in] times the transposed matrix, fp32 [tokens, out], in a type of ggml's.

    Args:
        weight: fp32 [out, in].
        like: another product with the same weight, whose codes are copied; making them takes long.
        kind: `Q4_K` or another number of a type.
    """

    def __init__(self, weight: Tensor, tokens: int, like: Product | None = None, kind: int = Q4_K) -> None:
        found = library()
        assert found is not None
        base, (rows, columns) = found.base, weight.shape
        self._library = found
        self.bytes = base.ggml_row_size(kind, columns) * rows
        size = self.bytes + 4 * tokens * (8 * columns + 2 * rows) + POOL
        self._context = base.ggml_init(_Parameters(size, None, False))
        codes = base.ggml_new_tensor_2d(self._context, kind, columns, rows)
        self._x = base.ggml_new_tensor_2d(self._context, F32, columns, tokens)
        y = base.ggml_mul_mat(self._context, codes, self._x)
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, y)
        self._codes = base.ggml_get_data(codes)
        if like is None:
            weight = weight.float().contiguous()
            base.ggml_quantize_chunk(kind, weight.data_ptr(), self._codes, 0, rows, columns, None)
        else:
            ctypes.memmove(self._codes, like._codes, self.bytes)
        self._work = base.ggml_init(_Parameters(2 * size, None, False))
        self._y, self._shape = base.ggml_get_data(y), (tokens, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """One product; the result is overwritten by the next."""
        base = self._library.base
        ctypes.memmove(base.ggml_get_data(self._x), x.data_ptr(), x.nbytes)
        base.ggml_reset(self._work)
        self._library.cpu.ggml_graph_compute_with_ctx(self._work, self._graph, torch.get_num_threads())
        tokens, rows = self._shape
        memory = (ctypes.c_float * (tokens * rows)).from_address(self._y)
        return torch.frombuffer(memory, dtype=torch.float32).view(tokens, rows)

    def __del__(self) -> None:
        for context in (self._context, self._work):
            self._library.base.ggml_free(context)
