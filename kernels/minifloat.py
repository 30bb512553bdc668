"""Numbers of 4, 6 and 8 bits: what each code stands for, and the code nearest to a number.

Sources: E4M3 and E5M2, Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433); E2M1, E3M2, E2M3,
INT8 and E8M0, OCP Microscaling Formats (MX) Specification v1.0, section 5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor


class Code(ABC):
    """A meaning for every code of `bits` bits."""

    @property
    @abstractmethod
    def bits(self) -> int: ...

    @abstractmethod
    def values(self) -> Tensor:
        """What the codes 0, 1, … stand for: fp32 [2**bits]."""

    def decode(self, codes: Tensor) -> Tensor:
        """What `codes`, uint8 of any shape, stand for: fp32 of that shape."""
        return _table(self, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


class Element(Code):
    """A signed number format, symmetric around zero."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def max(self) -> float:
        """The largest finite value."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """The codes, uint8, of the numbers nearest to `x`, fp32 of any shape.

        Half-way cases go to the even code. Whatever exceeds ±max, infinities too, becomes ±max. A NaN becomes
        NaN if the format has one, and otherwise ±max.
        """

    def snap(self, x: Tensor) -> Tensor:
        """The numbers nearest to `x`, fp32 of any shape."""
        return self.decode(self.encode(x))


class Special(Enum):
    """What the magnitudes beyond the largest finite value stand for."""

    NONE = "there are none: every code is a finite number"
    NAN = "the one code of all ones is NaN"
    IEEE = "the largest exponent is infinity, with fraction zero, or else NaN"


@dataclass(frozen=True)
class MiniFloat(Element):
    """Sign, exponent and fraction, from the high bit to the low, with subnormals as in IEEE 754.

    A code with exponent field e > 0 and fraction field f stands for ±2**(e − bias) · (1 + f / 2**mantissa_bits),
    one with e = 0 for ±2**(1 − bias) · f / 2**mantissa_bits; zero is signed. Codes without sign are ordered like
    the numbers, so that rounding is a search and "even" a property of the code.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: Special

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def name(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def top(self) -> int:
        """The code of the largest finite value."""
        beyond = {Special.NONE: 0, Special.NAN: 1, Special.IEEE: 2**self.mantissa_bits}
        return 2 ** (self.bits - 1) - 1 - beyond[self.special]

    @property
    def max(self) -> float:
        return self._value(self.top)

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal."""
        return self._value(1)

    def values(self) -> Tensor:
        return torch.tensor([self._value(code) for code in range(2**self.bits)])

    def encode(self, x: Tensor) -> Tensor:
        magnitude = torch.bucketize(x.abs(), _thresholds(self, x.device), out_int32=True).to(torch.uint8)
        sign_bit = 2 ** (self.bits - 1)
        magnitude.masked_fill_(x.isnan(), sign_bit - 1)  # all ones: NaN where there is one, else the largest value
        return magnitude | x.signbit().to(torch.uint8) * sign_bit

    def _value(self, code: int) -> float:
        negative, magnitude = divmod(code, 2 ** (self.bits - 1))
        sign = -1.0 if negative else 1.0
        if magnitude > self.top:
            infinite = self.special is Special.IEEE and magnitude == self.top + 1
            return sign * (math.inf if infinite else math.nan)
        exponent, fraction = divmod(magnitude, 2**self.mantissa_bits)
        if exponent:
            fraction += 2**self.mantissa_bits
        return sign * fraction * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits)


@dataclass(frozen=True)
class FixedPoint(Element):
    """Multiples of 2**-fraction_bits in two's complement: sign, `integer_bits`, `fraction_bits`.

    `encode` never yields the lowest number, which has no positive counterpart; the MX specification (section 5.3)
    allows leaving it unused.
    """

    integer_bits: int
    fraction_bits: int

    @property
    def bits(self) -> int:
        return 1 + self.integer_bits + self.fraction_bits

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def max(self) -> float:
        return (2 ** (self.bits - 1) - 1) / 2**self.fraction_bits

    def values(self) -> Tensor:
        half = 2 ** (self.bits - 1)
        return ((torch.arange(2 * half) + half) % (2 * half) - half) / 2**self.fraction_bits

    def snap(self, x: Tensor) -> Tensor:
        """Without the detour over codes, since inputs are rounded at every call."""
        steps = torch.round(x * 2**self.fraction_bits).nan_to_num(nan=torch.inf)
        return steps.clamp(-self.max * 2**self.fraction_bits, self.max * 2**self.fraction_bits) / 2**self.fraction_bits

    def encode(self, x: Tensor) -> Tensor:
        steps = torch.round(x * 2**self.fraction_bits)
        largest = 2 ** (self.bits - 1) - 1
        return (steps.nan_to_num(nan=largest).clamp(-largest, largest).int() & (2**self.bits - 1)).to(torch.uint8)


@dataclass(frozen=True)
class PowerOfTwo(Code):
    """E8M0: the powers of two from 2**-127 to 2**127, without sign and without zero; code 255 is NaN."""

    BIAS: ClassVar[int] = 127

    @property
    def bits(self) -> int:
        return 8

    def values(self) -> Tensor:
        return torch.tensor([2.0 ** (code - self.BIAS) for code in range(255)] + [math.nan])

    def encode(self, exponent: Tensor) -> Tensor:
        """The codes, uint8, of 2**exponent for integer exponents, limited to −127 … 127."""
        return (exponent.clamp(-self.BIAS, self.BIAS) + self.BIAS).to(torch.uint8)


E4M3 = MiniFloat(4, 3, 7, Special.NAN)
E5M2 = MiniFloat(5, 2, 15, Special.IEEE)
E2M1 = MiniFloat(2, 1, 1, Special.NONE)
E3M2 = MiniFloat(3, 2, 3, Special.NONE)
E2M3 = MiniFloat(2, 3, 1, Special.NONE)
MX_INT8 = FixedPoint(1, 6)
E8M0 = PowerOfTwo()


@cache
def _table(code: Code, device: torch.device) -> Tensor:
    return code.values().to(device)


@cache
def _thresholds(fmt: MiniFloat, device: torch.device) -> Tensor:
    """The largest fp32 that rounds to code i, for every finite positive code but the last: fp32 [top].

    Half-way points need one bit more than the format has, so fp32 holds them exactly. An even code keeps the
    half-way point above it; an odd code ends just below.
    """
    values = fmt.values()[: fmt.top + 1]
    middle = (values[1:] + values[:-1]) / 2
    odd = torch.arange(fmt.top) % 2 == 1
    return torch.where(odd, torch.nextafter(middle, torch.zeros(())), middle).to(device)
