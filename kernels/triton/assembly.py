"""Compiling a kernel for a GPU that is not there, and reading the machine code.

What matters is the number of thread instructions that the loop over columns spends on a weight: memory delivers
weights at one rate, the schedulers issue instructions at another, and a kernel that spends more than their ratio
cannot reach the memory's roof.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP = 32
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LABEL = re.compile(r"^\.(L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);")
BRANCH = re.compile(r"`\(\.(L_x_\d+)\)")
WARP_PRODUCT = re.compile(r"^[HIQ]MMA\.(?:SP\.)?(?:16816|16832)\b")  # 16 rows × 8 tokens × 16 or 32 columns, one warp
GROUP_PRODUCT = re.compile(r"^[HIQ]GMMA\.(\d+)x(\d+)x(\d+)")  # rows × tokens × columns, four warps


@dataclass(frozen=True)
class Assembly:
    """The machine code of one kernel.

    Args:
        lines: mnemonic and operands of each instruction; a label is a mnemonic without operands, None.
        registers: of a thread.
    """

    lines: tuple[tuple[str, str | None], ...]
    registers: int

    @cached_property
    def loop(self) -> tuple[str, ...]:
        """The mnemonics of the loop that has most of the tensor cores' instructions and no loop inside with as many."""
        labels = {name: i for i, (name, operands) in enumerate(self.lines) if operands is None}
        bodies = []
        for end, (name, operands) in enumerate(self.lines):
            target = BRANCH.search(operands or "")
            if name.startswith("BRA") and target and labels.get(target[1], end) < end:
                body = self.lines[labels[target[1]] : end + 1]
                bodies.append(tuple(mnemonic for mnemonic, rest in body if rest is not None))
        return max(bodies, key=lambda body: (sum("MMA" in name for name in body), -len(body)), default=())

    @property
    def spills(self) -> bool:
        """Do registers go through memory?"""
        return self.has("STL") or self.has("LDL")

    def has(self, mnemonic: str) -> bool:
        """Is there an instruction that begins so?"""
        return any(name.startswith(mnemonic) for name, operands in self.lines if operands is not None)

    def per_weight(self, tokens: int, tile: float) -> float:
        """Thread instructions of the loop per weight.

        Args:
            tokens: that a program multiplies a tile of weights with.
            tile: weights of an iteration per warp, where the tensor cores' instructions do not tell how often the
                compiler unrolled the loop.
        """
        weights = sum(_weights(name, tokens) for name in self.loop) or tile
        return len(self.loop) * WARP / weights


def _weights(mnemonic: str, tokens: int) -> float:
    """Weights that an instruction of a tensor core takes in for each warp, once for all tokens."""
    if found := GROUP_PRODUCT.match(mnemonic):
        rows, width, columns = map(int, found.groups())
        return rows / 4 * columns * width / tokens
    if WARP_PRODUCT.match(mnemonic):
        return 16 * (32 if "16832" in mnemonic else 16) * 8 / tokens
    return 0.0


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
    capability: int,
    warps: int,
) -> Assembly:
    """Compile with no GPU present.

    Args:
        kernel: a function decorated with `triton.jit`.
        types: of its pointers, in Triton's notation; all are taken to be aligned to 16 bytes. Whatever is neither
            here nor a constant is an int32.
        constants: its compile-time constants.
        aligned: integers that are multiples of 16.
        capability: of the GPU, such as 90 for Hopper.
        warps: of a program.
    """
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name in aligned or types.get(name, "").startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = _read("nvdisasm", "-c", file.name)
        usage = _read("cuobjdump", "-res-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    return Assembly(tuple(_parsed(listing)), int(registers[1]) if registers else 0)


def _parsed(listing: str) -> list[tuple[str, str | None]]:
    lines: list[tuple[str, str | None]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            lines.append((label[1], None))
        elif instruction := INSTRUCTION.search(line):
            lines.append((instruction[1], instruction[2]))
    return lines


def _read(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
