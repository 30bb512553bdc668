"""From rounded linears to integer-only ones, as HAWQ-V3 deploys them; the arithmetic is in `kernels.dyadic`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.dyadic import INPUT_BITS, PackedDyadic, symmetric_scale
from kernels.packed import Packed, PackedInteger
from methods.base import Stat, Statistics
from methods.formats.integer import Integer
from methods.network import Network, hooks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DyadicInteger(Integer):
    """Symmetric codes with one scale for each output channel, counted as `PackedDyadic` stores them: 40 bits of
    dyadic multiplier a channel instead of 16 bits of scale, and two scales of the tensor's borders."""

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, _ = shape
        return super().stored_bits(shape) + (40 - 16) * out + 2 * 32


def to_integer_only(
    network: Network,
    packed: Mapping[str, Packed],
    input_max: Mapping[str, float],
    output_max: Mapping[str, float],
    output_bits: int,
) -> dict[str, PackedDyadic]:
    """Give every packed linear 8-bit inputs, `output_bits`-bit outputs and its own integer bias.

    Ranges are static and symmetric, one for each tensor: max|x| becomes code 127, max|y| the largest of
    `output_bits` signed bits. Linears that share an input share its maximum, and so its codes. The `QuantLinear`
    of a result takes no other bias.

    Args:
        network: where the biases come from.
        packed: linear name to symmetric codes with a scale for each output channel.
        input_max, output_max: linear name to max|x| and max|y| over calibration tokens, see `input_maxima` and
            `output_maxima`. A maximum of 0 is replaced by 1 and logged: nothing was seen that says better.
        output_bits: 2 to 32.

    Raises:
        ValueError: codes of another kind, or a maximum that is negative or not finite, with the linear's name.
    """
    result = {}
    for name, weight in packed.items():
        try:
            if not isinstance(weight, PackedInteger):
                raise ValueError(f"integer-only linears need integer codes, not {type(weight).__name__}")
            result[name] = PackedDyadic(
                weight,
                symmetric_scale(_range(input_max[name], "input", name), INPUT_BITS),
                symmetric_scale(_range(output_max[name], "output", name), output_bits),
                output_bits=output_bits,
                bias=network.linear(name).bias,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return result


def input_maxima(network: Network, statistics: Statistics) -> dict[str, float]:
    """Linear name to max|x| of its input over calibration tokens; the method declares `Stat.MAX_ABS`."""
    return {name: float(statistics(Stat.MAX_ABS, name).max()) for name in network.linears}


@torch.no_grad()
def output_maxima(network: Network, tokens: Tensor, batch_size: int = 8) -> dict[str, float]:
    """Linear name to max|y| of its output, bias included, over tokens int64 [sequences, length].

    One forward pass through the network as it stands: of rounded weights, if rounding has overwritten them. A
    linear that no token reaches (an expert) has 0.
    """
    device = next(network.model.parameters()).device
    maxima = {name: torch.zeros((), device=network.linear(name).weight.device) for name in network.linears}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            del module, args
            if y.numel():
                maxima[name] = torch.maximum(maxima[name], y.abs().amax().float())

        return hook

    with hooks([network.linear(name).register_forward_hook(observe(name)) for name in network.linears]):
        for batch in tokens.split(batch_size):
            network.logits(batch.to(device))
    return {name: float(maximum) for name, maximum in maxima.items()}


def _range(maximum: float, side: str, linear: str) -> float:
    if maximum == 0:
        log.warning("the %s of %s was zero throughout calibration: its range is set to ±1", side, linear)
        return 1.0
    return maximum
