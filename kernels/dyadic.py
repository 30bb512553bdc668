"""The integer-only linear of HAWQ-V3 (Yao et al., ICML 2021, arXiv 2011.10680, section 3.1).

With weights W = S_w q_w and inputs x = S_x q_x the output in units of S_y is q_y = Int(M · Σ q_w q_x) with
M = S_w S_x / S_y. Written as a dyadic number M ≈ m / 2^e, the multiplication by M becomes an integer multiplication
and a shift. In the paper's networks integers pass from layer to layer. The operators between a transformer's linears
(norms, softmax, activations) are floating-point, so here each linear has two borders: x is divided by S_x when it
enters, q_y multiplied by S_y when it leaves, and nothing in between is a floating-point multiplication.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed import Packed, PackedInteger
from kernels.packing import unpack

INPUT_BITS = 8
MANTISSA_BITS = 31
LEAST_SHIFT, GREATEST_SHIFT = 1, 127  # at least one bit to round off, at most what int8 holds
ACCUMULATOR_MAX = 2**31 - 1


def symmetric_scale(maximum: float, bits: int) -> float:
    """The step, a float that fp32 represents, of signed `bits`-bit codes whose largest stands for `maximum`."""
    return float(torch.tensor(maximum / (2 ** (bits - 1) - 1), dtype=torch.float32))


def dyadic(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """m and e with multiplier ≈ m / 2^e, a relative error of at most 2^-31.

    m is the mantissa in [1/2, 1) times 2^31, halves rounded up, as in the official code; a mantissa that rounds to
    2^31 becomes 2^30 with an e smaller by one, so that m fits in 31 bits and a sign.

    Args:
        multiplier: floats of any shape.

    Returns:
        m: int32 in [2^30, 2^31), and e: int8 in [1, 127], of the same shape.

    Raises:
        ValueError: a multiplier outside [2^-97, 2^30), where e would leave its range.
    """
    multiplier = multiplier.double()
    fraction, exponent = torch.frexp(multiplier)
    mantissa = torch.floor(fraction * 2**MANTISSA_BITS + 0.5)
    carry = mantissa == 2**MANTISSA_BITS
    shift = MANTISSA_BITS - exponent - carry.int()
    valid = (multiplier > 0) & multiplier.isfinite() & (shift >= LEAST_SHIFT) & (shift <= GREATEST_SHIFT)
    if not valid.all():
        raise ValueError(
            f"the multiplier {float(multiplier[~valid][0])} is outside [2^-97, 2^30); choose scales whose ratio "
            "S_w·S_x/S_y lies inside"
        )
    return torch.where(carry, mantissa / 2, mantissa).int(), shift.to(torch.int8)


def requantize(accumulator: Tensor, mantissa: Tensor, shift: Tensor) -> Tensor:
    """⌊accumulator · mantissa / 2^shift + 1/2⌋ in 64-bit integers: round to nearest, halves towards +∞.

    The rule is the same on both sides of zero (2.5 to 3, −2.5 to −2), because an arithmetic shift is a division
    rounded down. The official simulation rounds halves to even; they differ only on exact halves.

    Args:
        accumulator: int32 or int64 [..., out], with |accumulator| <= 2^31.
        mantissa, shift: int [out], as `dyadic` returns them.

    Returns:
        int64 [..., out], not clamped.
    """
    if accumulator.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"accumulators are int32 or int64, not {accumulator.dtype}; requantization knows no floats")
    # The product is below 2^62 in magnitude: adding half cannot overflow, and any shift from 63 on gives 0.
    shift = shift.long().clamp(max=63)
    half = torch.ones_like(shift) << (shift - 1)
    return (accumulator.long() * mantissa.long() + half) >> shift


class PackedDyadic(Packed):
    """A linear from 8-bit inputs to `output_bits`-bit outputs that multiplies, adds and shifts integers only.

    Stored are the codes, m (int32) and e (int8) of each output channel, both border scales (fp32) and the bias
    (int32, in units of S_w S_x). Weight scales are not stored: inference does not need them, and S_w = M S_y / S_x
    recovers them.

    Args:
        packed: symmetric codes with one scale for each output channel.
        input_scale: S_x > 0, static and per tensor; inputs beyond 127 S_x or −128 S_x saturate.
        output_scale: S_y > 0, static and per tensor; outputs saturate at the ends of `output_bits` signed bits.
        output_bits: 2 to 32.
        bias: floats [out], rounded to multiples of S_w S_x, or None.

    Raises:
        ValueError: codes of another kind, impossible scales, or a row whose sum could exceed 32 bits.
    """

    bias_name = "bias"

    codes: Tensor
    mantissa: Tensor
    shift: Tensor
    bias: Tensor | None
    input_scale: Tensor
    output_scale: Tensor

    def __init__(
        self,
        packed: PackedInteger,
        input_scale: float,
        output_scale: float,
        *,
        output_bits: int,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(packed, input_scale, output_scale, output_bits)
        self.bits, self.shape, self.output_bits = packed.bits, packed.shape, output_bits
        device = packed.codes.device
        self.register_buffer("codes", packed.codes)
        self.register_buffer("input_scale", torch.tensor(input_scale, dtype=torch.float32, device=device))
        self.register_buffer("output_scale", torch.tensor(output_scale, dtype=torch.float32, device=device))
        unit = packed.scale[:, 0].double() * self.input_scale  # [out], of the accumulator
        mantissa, shift = dyadic(unit / self.output_scale)
        self.register_buffer("mantissa", mantissa)
        self.register_buffer("shift", shift)
        whole = None if bias is None else torch.round(bias.detach().to(unit) / unit)
        self._check_accumulators(whole)
        self.register_buffer("bias", None if whole is None else whole.int())

    def dequantize(self) -> Tensor:
        """Exactly the matrix of the `PackedInteger`: a relative error of 2^-31 vanishes when S_w becomes fp32."""
        multiplier = self.mantissa * torch.exp2(-self.shift.double())
        scale = multiplier * self.output_scale / self.input_scale  # [out]
        return self.signed_codes().float().mul_(scale.float().unsqueeze(1))

    def signed_codes(self) -> Tensor:
        """int16 [out, in], from −2^(bits−1) to 2^(bits−1) − 1."""
        return unpack(self.codes, int(self.bits), self.shape[1]).short().sub_(2 ** (int(self.bits) - 1))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x.

        Raises:
            ValueError: a floating-point bias is given besides the integer one.
            FloatingPointError: x contains NaN, which no code can stand for.
        """
        if bias is not None:
            raise ValueError("an integer-only linear adds its own bias; pass it to PackedDyadic instead of QuantLinear")
        return self._leave(requantize(self.accumulate(x), self.mantissa, self.shift), x.dtype)

    def simulate(self, x: Tensor, weight_scale: Tensor) -> Tensor:
        """The reference for `forward`: the same layer with the real multiplier in fp64 instead of a dyadic one.

        With outputs of up to 16 bits the two differ only where M times the accumulator is within 2^-16 of a half,
        and then by one unit S_y; with 32 bits the error of M alone can make a unit.

        Args:
            x: [..., in].
            weight_scale: S_w [out] of the `PackedInteger`.
        """
        multiplier = weight_scale.double() * self.input_scale / self.output_scale
        return self._leave(torch.floor(self.accumulate(x) * multiplier + 0.5), x.dtype)

    def accumulate(self, x: Tensor) -> Tensor:
        """Σ q_w q_x and the bias: int64 [..., out], of x [..., in].

        The integers are multiplied as fp64, because GPUs have no int32 matrix product in torch. This is exact in
        any order of summation: every partial sum is an integer that the constructor bounded by 2^31 < 2^53.
        """
        if x.isnan().any():
            raise FloatingPointError("the input of an integer-only linear contains NaN, which has no code")
        top = 2 ** (INPUT_BITS - 1)
        codes = torch.round(x.double() / self.input_scale).clamp_(-top, top - 1)
        bias = None if self.bias is None else self.bias.double()
        return F.linear(codes, self.signed_codes().double(), bias).long()

    def _leave(self, output: Tensor, dtype: torch.dtype) -> Tensor:
        """Whole multiples of S_y, saturated, as floats."""
        top = 2 ** (self.output_bits - 1)
        return output.clamp_(-top, top - 1).double().mul_(self.output_scale).to(dtype)

    def _check_accumulators(self, bias: Tensor | None) -> None:
        """ValueError, if an input exists with which a row's sum, or a part of it, leaves 32 bits."""
        bound = 2 ** (INPUT_BITS - 1) * self.signed_codes().abs().sum(1)  # int64 [out]
        total = bound if bias is None else bound + bias.abs()
        fits = total <= ACCUMULATOR_MAX  # false for NaN
        if not fits.all():
            row = int((~fits).nonzero()[0])
            raise ValueError(
                f"the sum of row {row} could reach {float(total[row]):.3g} and leave 32 bits; keep this linear in 16 "
                "bits, or enlarge the scale of a row whose bias is that much larger than its weights"
            )


def _check(packed: PackedInteger, input_scale: float, output_scale: float, output_bits: int) -> None:
    if packed.zero is not None:
        raise ValueError("integer-only linears have no zero points; quantize symmetrically")
    if packed.scale.shape[1] != 1:
        raise ValueError(
            f"integer-only linears have one scale a row, not {packed.scale.shape[1]}; quantize per output channel "
            "(group size 0)"
        )
    for name, scale in (("input", input_scale), ("output", output_scale)):
        if not 0 < scale < math.inf:
            raise ValueError(f"the {name} scale {scale} is not positive and finite; derive it from calibration data")
    if not 2 <= output_bits <= 32:
        raise ValueError(f"outputs have 2 to 32 bits, not {output_bits}")
