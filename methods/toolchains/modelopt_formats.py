"""The number formats of NVIDIA's Model Optimizer: what it is told, what is read back from it, and how that is stored.

NVFP4 and the MX formats need a GPU there. Without one they are computed here, from their definitions
(`methods.formats.floats`), and handed to the tool as backends of quantizers, which the tool provides for: emulations
of its CUDA operators, which round ties to even as ours do. For NVFP4 the tool sets block scales below 1e-5 to 1, and
with them the block to zero; the emulation keeps such blocks. For MX the tool takes the next power of two after
max|x| / max element in fp32, by fast division; the emulation is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import InputRounding, StaticScale, integers
from kernels.minifloat import E2M1, E4M3, E8M0, Element, MiniFloat
from kernels.packed import Packed
from kernels.packed_float import PackedFloat, decoded_scale
from kernels.packed_tensor_float import PackedTensorFloat
from kernels.packing import pack
from methods.formats.base import Format
from methods.formats.floats import FP8, MX, NVFP4, ScaledFloat
from methods.formats.integer import Integer
from methods.inputs import BlockScale
from methods.toolchains.base import on_grid

EMULATION = "nvfp4_emulation"
MX_EMULATION = "mxfp{}_emulation"
MX_ELEMENTS: dict[int, MiniFloat] = {4: E2M1, 8: E4M3}
"""Of MXFP4 and MXFP8, by width."""
OFF_ELEMENT = 1e-3
"""What a weight may miss its floating-point number by, relatively: tools multiply by reciprocals."""


class Numbers(ABC):
    """What one of the tool's quantizers rounds to."""

    bits: int
    calibrated: ClassVar[bool] = True
    """Whether inputs have a range that the calibration text sets."""

    @property
    @abstractmethod
    def format(self) -> Format:
        """The same in our terms; of formats that we do not have, the nearest."""

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
        """What rounds inputs whose largest magnitude in the calibration text was `maximum`, if that is `calibrated`."""

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits of a packed matrix of this shape [out, in]."""
        return self.format.stored_bits(shape)


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
        return Integer(self.bits, self.group_size, symmetric=True)

    def read(self, quantizer: Any, weight: Tensor) -> dict[str, Tensor]:
        return {"scale": quantizer.amax.float().view(len(weight), -1) / quantizer.maxbound}

    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        return on_grid(tensors["weight"], tensors["scale"], None, self.format)

    def rounding(self, maximum: float) -> InputRounding:
        return StaticScale(integers(self.bits), maximum)


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
    def format(self) -> FP8:
        return FP8(E4M3)

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


class BlockFloats(Numbers):
    """Elements in blocks of a row. The scale of each block is found at every call."""

    @property
    @abstractmethod
    def format(self) -> ScaledFloat: ...

    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        fmt, weight, scale = self.format, tensors["weight"].float(), tensors["scale"]
        tensor_scale = tensors.get("tensor_scale")
        blocks = decoded_scale(scale, fmt.scale_code, tensor_scale).repeat_interleave(fmt.block, 1)
        codes = nearest_codes(weight, fmt.element, blocks[:, : weight.shape[1]])
        return PackedFloat(
            pack(codes, fmt.element.bits),
            scale,
            tensor_scale,
            element=fmt.element,
            scale_code=fmt.scale_code,
            shape=(weight.shape[0], weight.shape[1]),
            group_size=fmt.block,
        )


@dataclass(frozen=True)
class Float4(BlockFloats):
    """NVFP4. The scale of a whole input is fixed by calibration, those of its blocks are not."""

    bits = E2M1.bits

    @property
    def config(self) -> dict[str, Any]:
        blocks = {-1: NVFP4.block, "type": "dynamic", "scale_bits": (4, 3)}
        return {"num_bits": (2, 1), "block_sizes": blocks, "effective_bits": 4.5, "backend": EMULATION}

    @property
    def format(self) -> NVFP4:
        return NVFP4()

    def read(self, quantizer: Any, weight: Tensor) -> dict[str, Tensor]:
        tensor_scale = _tensor_scale(quantizer.amax)
        return {"scale": block_scales(weight, self.format, tensor_scale), "tensor_scale": tensor_scale}

    def rounding(self, maximum: float) -> InputRounding:
        return FixedTensorScale(_tensor_scale(torch.tensor(maximum)))


@dataclass(frozen=True)
class MXFloat(BlockFloats):
    """MXFP4 or MXFP8, by width. Scales are those with which nothing saturates, see `methods.formats.floats.MX`."""

    bits: int

    calibrated: ClassVar[bool] = False

    @property
    def config(self) -> dict[str, Any]:
        element = MX_ELEMENTS[self.bits]
        blocks = {-1: MX.block, "type": "dynamic", "scale_bits": (E8M0.bits, 0)}
        widths = (element.exponent_bits, element.mantissa_bits)
        return {"num_bits": widths, "block_sizes": blocks, "backend": MX_EMULATION.format(self.bits)}

    @property
    def format(self) -> MX:
        return MX(MX_ELEMENTS[self.bits], ceil=True)

    def read(self, quantizer: Any, weight: Tensor) -> dict[str, Tensor]:
        del quantizer
        return {"scale": block_scales(weight, self.format)}

    def rounding(self, maximum: float) -> InputRounding:
        del maximum
        return BlockScale(self.format)

    def emulate(self, x: Tensor, quantizer: Any) -> Tensor:
        """As `emulate_nvfp4`."""
        del quantizer
        rounded: Tensor = BlockScale(self.format)(x)
        return rounded


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
        factor = decoded_scale(block_scales(x, NVFP4(), self.tensor_scale), E4M3, self.tensor_scale)
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


def block_scales(x: Tensor, fmt: ScaledFloat, tensor_scale: Tensor | None = None) -> Tensor:
    """The scales of a format's blocks, as stored, of x [..., in]: uint8 [..., blocks]."""
    padded = F.pad(x.abs(), (0, -x.shape[-1] % fmt.block))
    return fmt.block_scale(padded.unflatten(-1, (-1, fmt.block)).amax(-1), tensor_scale)


def emulate_nvfp4(x: Tensor, quantizer: Any) -> Tensor:
    """The backend of quantizers that computes NVFP4 without a GPU: the same shape and dtype as x."""
    maximum = x.abs().amax() if quantizer.amax is None else quantizer.amax
    rounded: Tensor = FixedTensorScale(_tensor_scale(maximum))(x)
    return rounded


def _tensor_scale(maximum: Tensor) -> Tensor:
    """Of what is at most so large; 1 where all is zero: fp32 []."""
    largest = maximum.float().amax()
    return NVFP4().tensor_scale(largest)


BACKENDS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    EMULATION: emulate_nvfp4,
    **{MX_EMULATION.format(bits): MXFloat(bits).emulate for bits in MX_ELEMENTS},
}
"""What the tool is given in place of its CUDA operators, by name."""
