"""The matrices that are multiplied with: linears of published models, q/k/v and gate/up fused as they are served."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """rows × columns = out × in."""

    rows: int
    columns: int
    linear: str


SHAPES = (
    Shape(4096, 4096, "Llama-3-8B o_proj"),
    Shape(28672, 4096, "Llama-3-8B gate_up"),
    Shape(4096, 14336, "Llama-3-8B down"),
    Shape(6144, 4096, "Llama-3-8B qkv"),
    Shape(8192, 8192, "Llama-3-70B o_proj"),
    Shape(57344, 8192, "Llama-3-70B gate_up"),
    Shape(8192, 28672, "Llama-3-70B down"),
    Shape(10240, 8192, "Llama-3-70B qkv"),
    Shape(28672, 8192, "Llama-3-70B gate"),
    Shape(14336, 4096, "Llama-3-8B gate"),
    Shape(22016, 4096, "Llama-2-7B gate_up"),
    Shape(4096, 11008, "Llama-2-7B down"),
    Shape(11008, 4096, "Llama-2-7B gate"),
    Shape(12288, 4096, "Llama-2-7B qkv"),
    Shape(5120, 5120, "Qwen2.5-14B o_proj"),
    Shape(3584, 3584, "Qwen2.5-7B o_proj"),
    Shape(4608, 3584, "Qwen2.5-7B qkv"),
    Shape(37888, 3584, "Qwen2.5-7B gate_up"),
    Shape(3584, 18944, "Qwen2.5-7B down"),
    Shape(128256, 4096, "Llama-3-8B lm_head"),
)
"""Those that most matter come first: the time may not suffice for all."""

TOKENS = (1, 16, 64, 256, 1024)
EFFORT = {1: 20, 16: 8, 64: 8, 256: 4, 1024: 2}
"""How many of the shapes are taken at each number of tokens."""
