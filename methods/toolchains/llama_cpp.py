"""llama.cpp's k-quants, by the C code that `llama-quantize` calls, as packaged in llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.packed import Packed
from kernels.packed_superblock import SUPER_BLOCK
from methods.base import Parts, register
from methods.budget import Budget
from methods.network import Network, hooks
from methods.toolchains.base import Toolchain, Work
from methods.toolchains.llama_cpp_blocks import BLOCKS, from_blocks

IMPORTS = ("ctypes",)
NUMBER = {width: 8 + width for width in BLOCKS}  # of a type, in ggml.h
BATCH = 8  # sequences that are run at once to measure importances


@register("tool_llama_cpp")
@dataclass(frozen=True)
class ToolLlamaCpp(Toolchain):
    """Every linear in the k-quant of the budget's width, as in our `kquant`.

    Of llama.cpp only ggml is built, and of that only what quantizes, which saves minutes.

    Args:
        imatrix: weigh errors by the mean square of the input on calibration text, as `llama-quantize --imatrix`.
    """

    imatrix: bool = True

    requirements: ClassVar[tuple[str, ...]] = (
        "llama-cpp-python==0.3.36",
        "--config-settings=cmake.source-dir=vendor/llama.cpp/ggml",
        f"--config-settings=cmake.define.CMAKE_PROJECT_INCLUDE={__file__.removesuffix('.py')}.cmake",
        "--config-settings=cmake.define.GGML_CPU=OFF",
        "--config-settings=cmake.define.GGML_BUILD_TESTS=OFF",
        "--config-settings=cmake.define.GGML_BUILD_EXAMPLES=OFF",
        "--config-settings=wheel.install-dir=llama_cpp",
    )
    in_original_coordinates: ClassVar[bool] = True

    @property
    def parts(self) -> Parts:
        return Parts("k-quant")

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is None and budget.bits not in BLOCKS:
            return f"k-quants have {min(BLOCKS)} to {max(BLOCKS)} bits, and the budget names {budget.bits}"
        ragged = [columns for _, columns in network.shapes if columns % SUPER_BLOCK]
        if reason is None and ragged:
            return f"llama.cpp has k-quants for multiples of {SUPER_BLOCK} columns only, and a linear has {ragged[0]}"
        return reason

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {"bits": budget.bits, "imatrix": self.imatrix}

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """The tool's blocks in our layout, which must stand for the tool's own numbers."""
        assert budget.bits is not None
        packed, weight = from_blocks(tensors["blocks"], budget.bits), tensors["weight"]
        if not torch.allclose(packed.dequantize(), weight, rtol=1e-5, atol=1e-6 * float(weight.abs().max())):
            raise ValueError(f"its weights are not what its q{budget.bits}_k blocks stand for")
        return packed


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`: ggml's blocks, and the numbers that ggml makes of them."""
    width, library = settings["bits"], _library()
    decode = getattr(library, f"dequantize_row_q{width}_K")
    importances = _mean_squares(model, work) if settings["imatrix"] else {}

    def quantized(name: str) -> dict[str, Tensor]:
        weight = model.get_parameter(f"{name}.weight").detach().float().contiguous()
        rows, columns = weight.shape
        importance = importances.get(name)
        given = importance.data_ptr() if importance is not None and importance.any() else None
        blocks = torch.empty(rows, columns // SUPER_BLOCK * BLOCKS[width].bytes, dtype=torch.uint8)
        library.ggml_quantize_chunk(NUMBER[width], weight.data_ptr(), blocks.data_ptr(), 0, rows, columns, given)
        again = torch.empty_like(weight)
        decode(blocks.data_ptr(), again.data_ptr(), weight.numel())
        return {f"{name}/weight": again, f"{name}/blocks": blocks}

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return {key: tensor for found in pool.map(quantized, work.linears) for key, tensor in found.items()}


def _library() -> Any:
    """ggml, loaded without the package around it, which wants all of llama.cpp."""
    package = find_spec("llama_cpp")
    assert package is not None
    assert package.submodule_search_locations is not None
    library: Any = ctypes.CDLL(f"{package.submodule_search_locations[0]}/lib/libggml-base.so")
    address, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, count, count, count, address]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    for width in BLOCKS:
        decode = getattr(library, f"dequantize_row_q{width}_K")
        decode.argtypes, decode.restype = [address, address, count], None
    return library


@torch.no_grad()
def _mean_squares(model: nn.Module, work: Work) -> dict[str, Tensor]:
    """What llama-imatrix measures: the mean square of every linear's inputs, fp32 [in]."""
    found = {n: torch.zeros(model.get_parameter(f"{n}.weight").shape[1]) for n in work.linears}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            found[name] += args[0].flatten(0, -2).square().sum(0)

        return hook

    with hooks([model.get_submodule(name).register_forward_pre_hook(add(name)) for name in work.linears]):
        for batch in work.tokens.split(BATCH):
            model(input_ids=batch, use_cache=False)
    return {name: total / work.tokens.numel() for name, total in found.items()}
