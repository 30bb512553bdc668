"""Every kernel in every configuration that is launched, for compiling ahead of time.

`python -m kernels.triton.variants` compiles all of them and prints what the machine code spends on a weight, beside
the budget of a GPU: what its schedulers can issue while its memory delivers a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kernels.triton import codebook, eight_bit, float4, nearest_plane, weight_only
from kernels.triton.assembly import Assembly, compiled


@dataclass(frozen=True)
class GPU:
    """Rates of a GPU.

    Args:
        capability: its generation.
        issue: thread instructions a second, clock · processors · 128.
        memory: bytes a second.
    """

    name: str
    capability: int
    issue: float
    memory: float

    def budget(self, bits: float) -> float:
        """Instructions per weight of so many bits at which schedulers and memory keep pace."""
        return self.issue * bits / 8 / self.memory


A100 = GPU("A100", 80, 1.41e9 * 108 * 128, 2.0e12)  # NVIDIA A100 80 GB data sheet
H200 = GPU("H200", 90, 1.98e9 * 132 * 128, 4.8e12)  # NVIDIA H200 data sheet
B200 = GPU("B200", 100, 1.97e9 * 148 * 128, 8.0e12)  # NVIDIA B200 data sheet
GPUS = (A100, H200, B200)


@dataclass(frozen=True)
class Variant:
    """One configuration of a kernel.

    Args:
        bits: that the kernel reads per weight, scales included; 0 if it reads no weights.
        tokens: of a tile.
        tile: weights of a tile.
        product: how the tensor cores' instruction begins, by capability.
        quick: one of the main ones, worth compiling every time.
        slack: what a quick one may spend on a weight, relative to the budget of an H200.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    aligned: tuple[str, ...] = ()
    bits: float = 0
    tokens: int = 0
    tile: int = 0
    product: Mapping[int, str] = field(default_factory=dict)
    quick: bool = False
    slack: float = 1.1

    def compiled(self, gpu: GPU) -> Assembly:
        """For this GPU."""
        return compiled(self.kernel, self.types, self.constants, self.aligned, gpu.capability, self.warps)

    def per_weight(self, code: Assembly) -> float:
        """Thread instructions that its machine code spends on a weight."""
        return code.per_weight(self.tokens, self.tile / self.warps)


HALF_PRODUCT = {80: "HMMA.16816.F32", 90: "HGMMA", 100: "UTCHMMA"}
ENDING = {"partial": "*fp32", "arrived": "*i32", "addend": "*bf16", "out": "*bf16"}
HALVES = {"halves": "*fp16", "sums": "*fp32", "factor": "*fp32"}


def weight_only_variants() -> Iterator[Variant]:
    """W{2,3,4,8}A16."""
    types = HALVES | ENDING | {"words": "*i16", "pairs": "*i32"}
    for bits in weight_only.WIDTHS:
        for group in (128, 64, 32, 0):
            for tile in weight_only.REGIMES:
                block = weight_only.block(bits, group or 4096, 4096)
                parts = max(1, block // group) if group else 1
                constants = {
                    "BITS": bits, "BLOCK": block, "PARTS": parts, "SPAN": 1 if group else 0, "TOKENS": tile.tokens,
                    "ROWS": tile.rows, "SPLIT": 4, "STAGES": tile.stages, "ADD": True, "ASM": True,
                }  # fmt: skip
                yield Variant(
                    f"W{bits}A16 g{group or 'channel'} M{tile.limit}",
                    weight_only._multiply,
                    types,
                    constants,
                    tile.warps,
                    ("N", "padded"),
                    bits + (32 / group if group else 0),
                    tile.tokens,
                    tile.rows * block,
                    HALF_PRODUCT,
                    quick=group == 128 and tile.limit == 16,
                )


EIGHT_PRODUCT = {
    "int8": {80: "IMMA.16832", 90: "IGMMA", 100: "UTCIMMA"},
    "fp8": {90: "QGMMA", 100: "UTCQMMA"},
}


def eight_bit_variants() -> Iterator[Variant]:
    """W8A8, W4A8 and FP8."""
    for name, bits, group in (("W8A8", 8, 0), ("W8A8", 8, 128), ("W4A8", 4, 0), ("W4A8", 4, 128), ("FP8", 8, 0)):
        number = "fp8" if name == "FP8" else "int8"
        element = "*fp8e4nv" if name == "FP8" else "*i8"
        types = {"inputs": element, "token_scale": "*fp32", "sums": "*fp32", "codes": element, "pairs": "*i32"}
        for tile in eight_bit.REGIMES:
            constants = {
                "BITS": bits, "BLOCK": 128, "PARTS": 1, "SPAN": 1 if group else 0, "FLOAT": name == "FP8",
                "TOKENS": tile.tokens, "ROWS": tile.rows, "SPLIT": 4, "STAGES": tile.stages, "ADD": True, "ASM": True,
            }  # fmt: skip
            yield Variant(
                f"{name} g{group or 'channel'} M{min(tile.limit, tile.tokens)}",
                eight_bit._multiply,
                types | ENDING | {"factor": "fp32"},
                constants,
                tile.warps,
                ("N", "padded"),
                bits + (32 / group if group else 0),
                tile.tokens,
                tile.rows * 128,
                EIGHT_PRODUCT[number],
                quick=tile.limit == 16,
            )


def codebook_variants() -> Iterator[Variant]:
    """Look-up tables."""
    types = {"halves": "*fp16", "factor": "*fp32", "words": "*i16", "codebook": "*fp16", "tables": "*i32"} | ENDING
    for bits in codebook.WIDTHS:
        for tile in codebook.REGIMES:
            constants = {
                "BITS": bits, "BLOCK": codebook.BLOCK, "TOKENS": tile.tokens, "ROWS": tile.rows, "SPLIT": 4,
                "STAGES": tile.stages, "ADD": True, "ASM": True,
            }  # fmt: skip
            yield Variant(
                f"codebook{bits} M{tile.limit}", codebook._multiply, types, constants, tile.warps, ("N", "padded"),
                bits, tile.tokens, tile.rows * codebook.BLOCK, HALF_PRODUCT,
                quick=tile.limit == 16 and bits > 2, slack=1.4 if bits == 4 else 2.5,
            )  # fmt: skip


def float4_variants() -> Iterator[Variant]:
    """NVFP4 and MXFP4."""
    types = {"halves": "*fp16", "factor": "*fp32", "words": "*i16", "scales": "*i32", "whole": "fp32"} | ENDING
    for group in float4.GROUPS:
        for tile in float4.REGIMES:
            constants = {
                "GROUP": group, "STRIDE": float4.STRIDE, "EXPONENTS": group == 32, "TOKENS": tile.tokens,
                "ROWS": tile.rows, "SPLIT": 4, "STAGES": tile.stages, "ADD": True, "ASM": True,
            }  # fmt: skip
            yield Variant(
                f"{'MX' if group == 32 else 'NV'}FP4 M{tile.limit}", float4._multiply, types, constants, tile.warps,
                ("N", "padded"), 4 + 8 / group, tile.tokens, tile.rows * float4.STRIDE, HALF_PRODUCT,
                quick=tile.limit == 16, slack=1.5,
            )  # fmt: skip


def helper_variants() -> Iterator[Variant]:
    """Kernels around the products, without tensor cores."""
    tensors = ("target", "step", "low", "high", "gains", "multiples", "points")
    none = {gpu.capability: "" for gpu in GPUS}
    constants = {"COLUMNS": 128, "ROWS": nearest_plane.THREADS}
    types = dict.fromkeys(tensors, "*fp32")
    yield Variant("GPTQ columns", nearest_plane._columns, types, constants, 1, product=none, quick=True)


def variants() -> Iterator[Variant]:
    """All."""
    yield from weight_only_variants()
    yield from eight_bit_variants()
    yield from codebook_variants()
    yield from float4_variants()
    yield from helper_variants()


def main() -> None:
    print(f"{'kernel':24}{'GPU':>6}{'registers':>10}{'spills':>7}{'product':>12}{'per weight':>11}{'budget':>7}")
    for variant in variants():
        for gpu in (gpu for gpu in GPUS if gpu.capability in variant.product):
            code = variant.compiled(gpu)
            spent = f"{variant.per_weight(code):.2f}" if variant.tokens else ""
            budget = f"{gpu.budget(variant.bits):.2f}" if variant.bits else ""
            product = next((name for name in code.loop if "MMA" in name), "none")
            row = f"{variant.name:24}{gpu.name:>6}{code.registers:>10}{code.spills!s:>7}"
            print(f"{row} {product.split('.F32')[0]:>14}{spent:>9}{budget:>7}", flush=True)


if __name__ == "__main__":
    main()
