"""The number formats of NVIDIA's Model Optimizer: what it is told, what is read back from it, and how that is stored.

NVFP4 needs a GPU there. Without one the format is computed here, from its definition (`methods.formats.floats`), and
handed to the tool as a backend of quantizers, which the tool provides for: an emulation of its CUDA operator. The
tool sets block scales below 1e-5 to 1, and with them the block to zero; the emulation keeps such blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import InputRounding, StaticScale, integers
from kernels.minifloat import E2M1, E4M3, Element
from kernels.packed import Packed
from kernels.packed_float import PackedFloat, decoded_scale
from kernels.packed_tensor_float import PackedTensorFloat
from kernels.packing import pack
from methods.formats.floats import NVFP4
from methods.formats.integer import Integer
from methods.toolchains.base import on_grid

EMULATION = "nvfp4_emulation"
OFF_ELEMENT = 1e-3
"""What a weight may miss its floating-point number by, relatively: tools multiply by reciprocals."""


class Numbers(ABC):
    """What one of the tool's quantizers rounds to."""

    bits: int

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The quantizer, as the tool is told."""

    @abstractmethod
    def read(self, quantizer: Any, weight: Tensor) -> dict[str, Tensor]:
        """The scales of a calibrated quantizer for `weight` [out, in]; in the tool's process."""

    @abstractmethod
    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        """Weights rounded by the tool, by the scales that `read` found; ValueError if they are no such numbers."""

    @abstractmethod
    def rounding(self, maximum: float) -> InputRounding:
        """What rounds inputs whose largest magnitude in the calibration text was `maximum`."""

    @abstractmethod
    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits of a packed matrix of this shape [out, in]."""


@dataclass(frozen=True)
class Integers(Numbers):
    """Symmetric integers with one scale a group, an output channel (0), or, for inputs, for all.

    Of inputs beyond the calibrated range the tool uses one more negative number than we do.
    """

    bits: int
    group_size: int = 0

    @property
    def config(self) -> dict[str, Any]:
        if self.group_size:
            return {"num_bits": self.bits, "block_sizes": {-1: self.group_size, "type": "static"}}
        return {"num_bits": self.bits, "axis": 0}

    @property
    def format(self) -> Integer:
        """The same in our terms."""
        return Integer(self.bits, self.group_size, symmetric=True)

    def read(self, quantizer: Any, weight: Tensor) -> dict[str, Tensor]:
        return {"scale": quantizer.amax.float().view(len(weight), -1) / quantizer.maxbound}

    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        return on_grid(tensors["weight"], tensors["scale"], None, self.format)

    def rounding(self, maximum: float) -> InputRounding:
        return StaticScale(integers(self.bits), maximum)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return self.format.stored_bits(shape)


@dataclass(frozen=True)
class InputIntegers(Integers):
    """Integers with one scale for the whole input."""

    @property
    def config(self) -> dict[str, Any]:
        return {"num_bits": self.bits, "axis": None}


@dataclass(frozen=True)
class Float8(Numbers):
    """E4M3 with one scale for the whole matrix or input."""

    bits = E4M3.bits

    @property
    def config(self) -> dict[str, Any]:
        return {"num_bits": (4, 3), "axis": None}

    def read(self, quantizer: Any, weight: Tensor) -> dict[str, Tensor]:
        del weight
        largest = quantizer.amax.float().view(())
        return {"tensor_scale": torch.where(largest == 0, 1.0, largest / E4M3.max)}

    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        weight, scale = tensors["weight"].float(), tensors["tensor_scale"].float()
        codes = nearest_codes(weight, E4M3, scale)
        shape = (weight.shape[0], weight.shape[1])
        return PackedTensorFloat(pack(codes, E4M3.bits), scale, element=E4M3, shape=shape)

    def rounding(self, maximum: float) -> InputRounding:
        return StaticScale(E4M3, maximum)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return 8 * shape[0] * shape[1] + 32


@dataclass(frozen=True)
class Float4(Numbers):
    """NVFP4. The scale of a whole input is fixed by calibration, those of its blocks are not."""

    bits = E2M1.bits

    @property
    def config(self) -> dict[str, Any]:
        blocks = {-1: NVFP4.block, "type": "dynamic", "scale_bits": (4, 3)}
        return {"num_bits": (2, 1), "block_sizes": blocks, "effective_bits": 4.5, "backend": EMULATION}

    def read(self, quantizer: Any, weight: Tensor) -> dict[str, Tensor]:
        tensor_scale = _tensor_scale(quantizer.amax)
        return {"scale": block_scales(weight, tensor_scale), "tensor_scale": tensor_scale}

    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        weight, scale, tensor_scale = tensors["weight"].float(), tensors["scale"], tensors["tensor_scale"].float()
        blocks = decoded_scale(scale, E4M3, tensor_scale).repeat_interleave(NVFP4.block, 1)
        codes = nearest_codes(weight, E2M1, blocks[:, : weight.shape[1]])
        return PackedFloat(
            pack(codes, E2M1.bits),
            scale,
            tensor_scale,
            element=E2M1,
            scale_code=E4M3,
            shape=(weight.shape[0], weight.shape[1]),
            group_size=NVFP4.block,
        )

    def rounding(self, maximum: float) -> InputRounding:
        return FixedTensorScale(_tensor_scale(torch.tensor(maximum)))

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return NVFP4().stored_bits(shape)


class FixedTensorScale(InputRounding):
    """NVFP4 under a given scale of the whole input; each block of each token has a scale of its own.

    Args:
        tensor_scale: fp32 [].
    """

    tensor_scale: Tensor

    def __init__(self, tensor_scale: Tensor) -> None:
        super().__init__(E2M1)
        self.register_buffer("tensor_scale", tensor_scale)

    def scale(self, x: Tensor) -> Tensor:
        factor = decoded_scale(block_scales(x, self.tensor_scale), E4M3, self.tensor_scale)
        return factor.repeat_interleave(NVFP4.block, -1)[..., : x.shape[-1]]


class Prescaled(InputRounding):
    """Rounds columns · x by another rounding, and takes the columns out again, as `PackedScaled` multiplies by them.

    Args:
        rounding: what rounds the product.
        columns: [in], positive.
    """

    columns: Tensor

    def __init__(self, rounding: InputRounding, columns: Tensor) -> None:
        super().__init__(rounding.element)
        self.rounding = rounding
        self.register_buffer("columns", columns)

    def scale(self, x: Tensor) -> Tensor:
        return self.rounding.scale(x * self.columns) / self.columns


def nearest_codes(weight: Tensor, element: Element, scale: Tensor) -> Tensor:
    """The codes, uint8, of weights [out, in] that are elements times scales of a shape that broadcasts with them.

    Raises:
        ValueError: a weight is no such number.
    """
    codes = element.encode(weight / scale)
    if not torch.allclose(element.decode(codes) * scale, weight, rtol=OFF_ELEMENT, atol=0):
        raise ValueError(f"its weights are no {element.name} numbers times the scales that it claims")
    return codes


def block_scales(x: Tensor, tensor_scale: Tensor) -> Tensor:
    """NVFP4's scales, as stored, of x [..., in]: uint8 [..., blocks]."""
    padded = F.pad(x.abs(), (0, -x.shape[-1] % NVFP4.block))
    return NVFP4().block_scale(padded.unflatten(-1, (-1, NVFP4.block)).amax(-1), tensor_scale)


def emulate_nvfp4(x: Tensor, quantizer: Any) -> Tensor:
    """The backend of quantizers that computes NVFP4 without a GPU: the same shape and dtype as x."""
    maximum = x.abs().amax() if quantizer.amax is None else quantizer.amax
    rounded: Tensor = FixedTensorScale(_tensor_scale(maximum))(x)
    return rounded


def _tensor_scale(maximum: Tensor) -> Tensor:
    """Of what is at most so large; 1 where all is zero: fp32 []."""
    largest = maximum.float().amax()
    return NVFP4().tensor_scale(largest)
