"""Round all linears of a network according to a plan of formats."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.packed import Packed
from methods.base import Context, Stat
from methods.formats.base import Format
from methods.formats.dense import Dense
from methods.network import Group, Network
from methods.rounding.base import Rounder, Rounding
from methods.rounding.nearest import round_to_nearest
from methods.stream import BlockStream, gram_matrices

STREAMS = ("quantized", "full")


def quantize_network(
    ctx: Context,
    plan: Mapping[str, Format],
    rounding: Rounding,
    stream: str = "quantized",
    true_sequential: bool = False,
) -> dict[str, Packed]:
    """Round every linear and overwrite its weight with what was stored; returns linear name to packed weight.

    A rounding that needs the Gram matrix gets it block by block over `ctx.tokens`, so no statistics of the
    harness are used and memory holds one block's. Linears with the same input share it, and its
    factorization.

    Args:
        plan: a format for every linear. Dense ones are not quantized, whatever the rounding.
        stream: whose hidden states calibrate a block: those after the `quantized` preceding blocks (as GPTQ
            does), or those of the `full`-precision model. Irrelevant to roundings without data.
        true_sequential: collect the Gram matrices anew for each group, after the preceding groups of the same
            block have been quantized (GPTQ's option of this name).

    Raises:
        ValueError: a linear without a format, or options that contradict each other.
    """
    missing = [name for name in ctx.network.linears if name not in plan]
    if missing:
        raise ValueError(f"the plan gives no format to {', '.join(missing)}; give one to every linear")
    check_stream(stream, true_sequential)
    if Stat.GRAM in rounding.needs:
        return _streamed(ctx, plan, rounding, stream, true_sequential)
    rounder = rounding.given(None)
    packed: dict[str, Packed] = {}
    for group in ctx.track(ctx.network.groups, "rounding"):
        packed |= _round_group(ctx.network, group, plan, rounder)
    return packed


def check_stream(stream: str, true_sequential: bool) -> None:
    """ValueError, if the options of `quantize_network` contradict each other."""
    if stream not in STREAMS:
        raise ValueError(f"unknown stream {stream!r}: there are {' and '.join(STREAMS)}")
    if true_sequential and stream != "quantized":
        raise ValueError("true_sequential calibrates on quantized weights: combine it with stream=quantized")


def _streamed(
    ctx: Context, plan: Mapping[str, Format], rounding: Rounding, stream: str, true_sequential: bool
) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    source = BlockStream(ctx.network, ctx.tokens)
    for index, block in enumerate(ctx.track(ctx.network.blocks, "rounding")):
        stages = [(group,) for group in block.groups] if true_sequential else [block.groups]
        for groups in stages:
            grams, outputs = gram_matrices(source, index, groups)
            for group in groups:
                rounder = rounding.given(grams.pop(group.name))
                packed |= _round_group(ctx.network, group, plan, rounder)
        source.inputs = outputs if stream == "full" else source.run(index)
    return packed


def _round_group(network: Network, group: Group, plan: Mapping[str, Format], rounder: Rounder) -> dict[str, Packed]:
    packed = {}
    for name in group.linears:
        fmt = plan[name]
        rounded = (round_to_nearest if isinstance(fmt, Dense) else rounder)(network.weight(name), fmt)
        network.overwrite(name, rounded.weight)
        packed[name] = rounded.packed
    return packed
