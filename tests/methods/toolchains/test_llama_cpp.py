"""ggml's blocks against a decoder written out weight by weight; what the tool is given, and what is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from methods.base import Budget, Context, Stat
from methods.formats.superblock import KQUANTS
from methods.network import Network
from methods.toolchains.base import Work
from methods.toolchains.llama_cpp import ToolLlamaCpp, _mean_squares
from methods.toolchains.llama_cpp_blocks import BLOCKS, from_blocks
from methods.toolchains.process import Answer

Build = Callable[..., Network]
Given = Callable[..., Context]
Decoder = Callable[[bytes], list[float]]


def half(data: bytes) -> float:
    return float(struct.unpack("<e", data)[0])


def q2(b: bytes) -> list[float]:
    scales, q, d, low = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    return [
        d * (scales[i // 16] & 15) * (q[i // 128 * 32 + i % 32] >> (i % 128 // 32 * 2) & 3)
        - low * (scales[i // 16] >> 4)
        for i in range(256)
    ]


def q3(b: bytes) -> list[float]:
    high, q, scales, d = b[:32], b[32:96], b[96:108], half(b[108:110])

    def scale(i: int) -> int:
        low = scales[i] & 15 if i < 8 else scales[i - 8] >> 4
        return (low | (scales[8 + i % 4] >> (i // 4 * 2) & 3) << 4) - 32

    def code(i: int) -> int:
        low = q[i // 128 * 32 + i % 32] >> (i % 128 // 32 * 2) & 3
        return low - (0 if high[i % 32] >> (i // 32) & 1 else 4)

    return [d * scale(i // 16) * code(i) for i in range(256)]


def level(s: bytes, i: int) -> tuple[int, int]:
    """Scale and minimum of a sub-block: get_scale_min_k4."""
    if i < 4:
        return s[i] & 63, s[i + 4] & 63
    return s[i + 4] & 15 | (s[i - 4] >> 6) << 4, s[i + 4] >> 4 | (s[i] >> 6) << 4


def q4(b: bytes) -> list[float]:
    d, low, scales, q = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    answer = []
    for i in range(256):
        scale, minimum = level(scales, i // 32)
        answer.append(d * scale * (q[i // 64 * 32 + i % 32] >> (i % 64 // 32 * 4) & 15) - low * minimum)
    return answer


def q5(b: bytes) -> list[float]:
    d, low, scales, high, q = half(b[:2]), half(b[2:4]), b[4:16], b[16:48], b[48:]
    answer = []
    for i in range(256):
        scale, minimum = level(scales, i // 32)
        code = (q[i // 64 * 32 + i % 32] >> (i % 64 // 32 * 4) & 15) + 16 * (high[i % 32] >> (i // 32) & 1)
        answer.append(d * scale * code - low * minimum)
    return answer


def q6(b: bytes) -> list[float]:
    low, high, scales, d = b[:128], b[128:192], struct.unpack("16b", b[192:208]), half(b[208:210])
    answer = []
    for i in range(256):
        part, quarter, at = i // 128, i % 128 // 32, i % 32
        nibble = low[part * 64 + quarter % 2 * 32 + at] >> (quarter // 2 * 4) & 15
        answer.append(d * scales[i // 16] * ((nibble | (high[part * 32 + at] >> 2 * quarter & 3) << 4) - 32))
    return answer


DECODERS: dict[int, Decoder] = {2: q2, 3: q3, 4: q4, 5: q5, 6: q6}
UNITS = {2: (80, 82), 3: (108,), 4: (0, 2), 5: (0, 2), 6: (208,)}


def random_blocks(width: int, rows: int = 3, supers: int = 2) -> Tensor:
    """Any bytes, with finite units."""
    generator = torch.Generator().manual_seed(width)
    blocks = torch.randint(256, (rows, supers, BLOCKS[width].bytes), generator=generator, dtype=torch.uint8)
    for at in UNITS[width]:
        blocks[..., at : at + 2] = torch.randn(rows, supers, 1, generator=generator).half().view(torch.uint8)
    return blocks.flatten(1)


def reference(blocks: Tensor, width: int) -> Tensor:
    size = BLOCKS[width].bytes
    rows = [bytes(row.tolist()) for row in blocks]
    return torch.tensor(
        [[w for at in range(0, len(r), size) for w in DECODERS[width](r[at : at + size])] for r in rows]
    )


@pytest.mark.parametrize("width", BLOCKS)
def test_blocks_stand_for_the_same_numbers_in_our_layout_in_as_many_bits(width: int) -> None:
    blocks = random_blocks(width)
    packed = from_blocks(blocks, width)
    torch.testing.assert_close(packed.dequantize(), reference(blocks, width), rtol=1e-5, atol=1e-6)
    assert packed.stored_bits() == 8 * blocks.numel() == KQUANTS[width].stored_bits((3, 512))


def answer(network: Network, width: int, scale: float = 1.0) -> Answer:
    tensors = {}
    for name in network.linears:
        rows, columns = network.shape(name)
        tensors[f"{name}/blocks"] = random_blocks(width, rows, columns // 256)
        tensors[f"{name}/weight"] = from_blocks(tensors[f"{name}/blocks"], width).dequantize() * scale
    return Answer(tensors, {}, 1.0, 1)


def test_a_tool_whose_numbers_are_not_those_of_its_blocks_is_refused(
    small_llama: Build, context: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("methods.toolchains.base.FAR", torch.inf)  # the answer's weights are no model's
    network = small_llama(hidden_size=256, intermediate_size=256)
    ctx = replace(context(network, Budget(bits=4)), tools=lambda *_: answer(network, 4))
    done = ToolLlamaCpp().quantize(ctx)
    assert {packed.stored_bits() / packed.shape[0] / packed.shape[1] for packed in done.packed.values()} == {4.5}
    with pytest.raises(ValueError, match=r"are not what its q4_k blocks stand for"):
        ToolLlamaCpp().quantize(replace(ctx, tools=lambda *_: answer(network, 4, 1.001)))
    with pytest.raises(ValueError, match=r"no whole q4_k blocks"):
        ToolLlamaCpp().quantize(replace(ctx, tools=lambda *_: answer(network, 3)))


def test_importances_are_the_mean_squares_of_the_inputs(small_llama: Build, context: Given) -> None:
    network = small_llama()
    ctx = context(network)
    found = _mean_squares(network.model, Work("", ctx.tokens, network.linears))
    for name in network.linears:
        torch.testing.assert_close(found[name], ctx.statistics(Stat.MEAN_SQUARE, name))


def test_what_k_quants_cannot_do_is_refused_in_words(small_llama: Build) -> None:
    whole, ragged = small_llama(hidden_size=256, intermediate_size=256), small_llama()
    assert ToolLlamaCpp().supports(whole, Budget(bits=4)) is None
    assert "2 to 6 bits" in str(ToolLlamaCpp().supports(whole, Budget(bits=8)))
    assert "multiples of 256 columns" in str(ToolLlamaCpp().supports(ragged, Budget(bits=4)))
    assert "uniform widths" in str(ToolLlamaCpp().supports(whole, Budget(effective_bits=4.0)))
