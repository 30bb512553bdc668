"""Presets of Model Optimizer, with quantizers that compute what the library documents."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import QuantLinear
from methods.formats.floats import MX, NVFP4
from methods.toolchains.modelopt_formats import (
    BACKENDS,
    FixedTensorScale,
    Float4,
    Float8,
    Integers,
    MXFloat,
    Prescaled,
    block_scales,
    emulate_nvfp4,
    nearest_codes,
)
from methods.toolchains.modelopt_presets import Preset, presets

GENERATOR = torch.Generator().manual_seed(0)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass
class Quantizer:
    """Rounds x to integers or FP8 of given maxima; the maxima broadcast with x in groups of `size`."""

    amax: Tensor
    maxbound: float
    size: int = 0
    _pre_quant_scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        scale = self.amax.view(len(x), -1).repeat_interleave(self.size, 1)[:, : x.shape[1]] if self.size else self.amax
        steps = x * self.maxbound / scale
        if self.maxbound == 448:
            return steps.to(torch.float8_e4m3fn).float() * scale / 448
        return steps.round().clamp(-self.maxbound - 1, self.maxbound) * scale / self.maxbound


@dataclass
class Emulated:
    amax: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return emulate_nvfp4(x, self)


class Uncalibrated:
    """Rounds by one of the backends, and knows no maximum."""

    amax = None

    def __init__(self, preset: Preset) -> None:
        self.backend = BACKENDS[preset.weights.config["backend"]]

    def __call__(self, x: Tensor) -> Tensor:
        return self.backend(x, self)


@dataclass
class Linear:
    """What the library makes of a linear."""

    weight: nn.Parameter
    weight_quantizer: object
    input_quantizer: object = field(default_factory=lambda: Quantizer(torch.tensor(4.0), 127.0))


def weights(out: int = 6, columns: int = 64) -> Tensor:
    return torch.randn(out, columns, generator=GENERATOR)


def grouped(weight: Tensor, size: int, bound: float) -> Quantizer:
    maxima = weight.unflatten(1, (-1, size)).abs().amax(-1)
    return Quantizer(maxima.reshape(-1, 1), bound, size)  # the library keeps them in one column


def nearest(x: Tensor, points: Tensor) -> Tensor:
    """The nearest of the points, by trying all."""
    return points[(x.unsqueeze(-1) - points).abs().argmin(-1)]


def test_integers_with_scaled_inputs() -> None:
    weight, columns = weights(), (torch.rand(64, generator=GENERATOR) + 0.5).half().float()
    quantizer = grouped(weight, 16, 7)
    module = Linear(nn.Parameter(weight), quantizer, Quantizer(torch.tensor(1.0), 127, _pre_quant_scale=columns))
    preset = presets(16)["int4_awq"]
    found = preset.read(module)
    packed = preset.packed(found)
    torch.testing.assert_close(packed.dequantize(), quantizer(weight) * columns, rtol=1e-3, atol=1e-6)
    assert packed.stored_bits() == preset.weights.stored_bits((6, 64)) + 16 * 64
    assert preset.rounding(found) is None


@pytest.mark.parametrize(("name", "bound"), [("int8_smoothquant", 127), ("fp8", 448)])
def test_inputs_are_scaled_then_rounded_then_multiplied(name: str, bound: float) -> None:
    """The formula of the library, operation for operation."""
    weight, columns = weights(), (torch.rand(64, generator=GENERATOR) + 0.5).half().float()
    quantizer = grouped(weight, 64, bound) if name == "int8_smoothquant" else Quantizer(weight.abs().amax(), bound)
    x = torch.randn(3, 5, 64, generator=GENERATOR)
    inputs = Quantizer((x * columns).abs().amax(), bound, _pre_quant_scale=columns)
    preset = presets(0)[name]
    found = preset.read(Linear(nn.Parameter(weight), quantizer, inputs))
    linear = QuantLinear(preset.packed(found), None, preset.rounding(found))
    expected = F.linear(inputs(x * columns), quantizer(weight))
    torch.testing.assert_close(linear(x), expected, rtol=2e-3, atol=2e-2)
    assert (F.linear(x * columns, quantizer(weight)) - expected).abs().max() > 2e-2  # inputs do matter
    assert preset.packed(found).stored_bits() == preset.weights.stored_bits((6, 64)) + 16 * 64


def test_integers_multiplied_as_fp8() -> None:
    weight = weights()
    first = grouped(weight, 16, 7)
    second = Quantizer(first(weight).abs().amax(), 448)
    preset = presets(16)["w4a8_awq"]
    module = Linear(nn.Parameter(weight), [first, second], Quantizer(torch.tensor(4.0), 448))
    decoded = preset.packed(preset.read(module)).dequantize()
    expected = second(first(weight))
    agree = (decoded - expected).abs() <= 2e-3 * expected.abs()
    assert agree.float().mean() > 0.97  # fp16 scales may turn the rounding of a value halfway between two
    assert (expected - first(weight)).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(6, 64), (3, 40)])
def test_nvfp4_reads_back_what_was_emulated(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    module = Linear(nn.Parameter(weight), Emulated(weight.abs().amax()), Quantizer(torch.tensor(4.0), 6))
    preset = presets(0)["nvfp4"]
    packed = preset.packed(preset.read(module))
    torch.testing.assert_close(packed.dequantize(), NVFP4().fit(weight).snap(weight), rtol=1e-6, atol=0)
    assert packed.stored_bits() == NVFP4().stored_bits(shape)


def test_emulated_values_are_the_nearest_there_are() -> None:
    """Per block of 16, by trying all numbers of E2M1, under the scale max / 6 as E4M3 rounds it."""
    x, amax = torch.randn(2, 3, 32, generator=GENERATOR), torch.tensor(5.0)
    rounded = emulate_nvfp4(x, Emulated(amax))
    tensor = amax / (448 * 6)
    for block, done in zip(x.reshape(-1, 16), rounded.reshape(-1, 16), strict=True):
        scale = (block.abs().amax() / 6 / tensor).to(torch.float8_e4m3fn).float() * tensor
        best = nearest(block.abs(), E2M1 * scale) * block.sign()
        torch.testing.assert_close(done, best, rtol=1e-6, atol=1e-7)


def by_definition(x: Tensor, name: str) -> Tensor:
    """MXFP4 and MXFP8 of x [..., 32 n]: per block, the least power of two with which nothing saturates; then the
    nearest element, ties to even."""
    largest = {"mxfp4": 6, "mxfp8": 448}[name]
    blocks = x.unflatten(-1, (-1, 32))
    scale = torch.tensor([2.0**k for k in range(-100, 100)])
    fits = blocks.abs().amax(-1, keepdim=True) <= largest * scale
    scale = scale[fits.int().argmax(-1, keepdim=True)]
    if name == "mxfp8":
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    even_first = torch.tensor([0, 1, 2, 4, 0.5, 1.5, 3, 6])  # of equally near points, argmin takes the first
    return (nearest((blocks / scale).abs(), even_first) * blocks.sign() * scale).flatten(-2)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_microscaled_weights_and_inputs(name: str) -> None:
    weight, x = weights(columns=96) * torch.logspace(-6, 6, 96, base=2), torch.randn(2, 5, 96, generator=GENERATOR)
    weight[0, :32], weight[1, 32:64] = 0, torch.linspace(-6, 6, 33)[:32] / 8  # ties, and a largest number of 3/4
    x[0, 0, 0], x[1, 1, 95] = 1000, 448 * 2.0**-5
    preset = presets(0)[name]
    rounds = Uncalibrated(preset)
    found = preset.read(Linear(nn.Parameter(weight), rounds, rounds))
    assert set(found) == {"weight", "scale"}  # nothing of the calibration text
    linear = QuantLinear(preset.packed(found), None, preset.rounding(found))
    torch.testing.assert_close(linear.packed.dequantize(), by_definition(weight, name), rtol=0, atol=0)
    assert linear.inputs is not None
    torch.testing.assert_close(linear.inputs(x), by_definition(x, name), rtol=0, atol=0)
    torch.testing.assert_close(linear(x), F.linear(by_definition(x, name), by_definition(weight, name)))
    assert linear.packed.stored_bits() == preset.weights.stored_bits((6, 96)) == 6 * 96 * (preset.weights.bits + 0.25)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_microscaled_blocks_may_be_shorter(name: str) -> None:
    weight, preset = weights(3, 40), presets(0)[name]
    packed = preset.packed(preset.read(Linear(nn.Parameter(weight), Uncalibrated(preset), Uncalibrated(preset))))
    expected = by_definition(F.pad(weight, (0, 24)), name)[:, :40]
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=0)
    assert packed.stored_bits() == preset.weights.stored_bits((3, 40)) == 3 * (40 * preset.weights.bits + 2 * 8)


def test_no_microscaled_number_saturates() -> None:
    """The MX specification's scale for a largest number of 7 is 1, which would leave 6 of it."""
    for largest, scale in ((6.0, 1), (6.0000005, 2), (7.0, 2), (8.0, 2), (12.0, 2), (12.000001, 4)):
        block = torch.cat([torch.tensor([largest, -1.0]), torch.zeros(30)])
        assert block_scales(block, MXFloat(4).format).tolist() == [127 + scale.bit_length() - 1]
    seven = torch.tensor([[7.0] * 32])
    assert MXFloat(4).emulate(seven, None)[0, 0] == 8
    assert MX().fit(seven).snap(seven)[0, 0] == 6


def test_inputs_beyond_the_calibrated_range_saturate() -> None:
    x = torch.full((1, 16), 100.0)
    torch.testing.assert_close(FixedTensorScale(torch.tensor(4.0 / (448 * 6)))(x), torch.full((1, 16), 4.0))


def test_scaled_inputs_have_blocks_of_their_own() -> None:
    columns, inner = torch.logspace(-3, 3, 64, base=2), FixedTensorScale(torch.tensor(9.0 / (448 * 6)))
    x = torch.randn(2, 3, 64, generator=GENERATOR)
    torch.testing.assert_close(Prescaled(inner, columns)(x) * columns, inner(x * columns))


def test_a_matrix_of_zeros() -> None:
    zeros = torch.zeros(4, 32)
    for numbers, quantizer in ((Float4(), Emulated(torch.tensor(0.0))), (Float8(), Quantizer(torch.tensor(0.0), 448))):
        found = numbers.read(quantizer, zeros)
        assert torch.equal(numbers.packed(found | {"weight": zeros}).dequantize(), zeros)
    assert block_scales(zeros, NVFP4(), torch.tensor(1.0)).shape == (4, 2)
    for name in ("mxfp4", "mxfp8"):
        found = presets(0)[name].weights.read(None, zeros) | {"weight": zeros}
        assert torch.equal(presets(0)[name].packed(found).dequantize(), zeros)


def test_lies_are_found() -> None:
    weight, scale = weights(), torch.tensor(0.01)
    exact = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    shape = {"weight": exact, "tensor_scale": scale}
    torch.testing.assert_close(Float8().packed(shape).dequantize(), exact)
    with pytest.raises(ValueError, match="no e4m3 numbers"):
        Float8().packed(shape | {"weight": weight})
    with pytest.raises(ValueError, match="no e2m1 numbers"):
        Float4().packed(shape | {"weight": weight, "scale": block_scales(weight, NVFP4(), scale)})
    half = MXFloat(4).read(None, weight)["scale"] - 1
    with pytest.raises(ValueError, match="no e2m1 numbers"):
        MXFloat(4).packed({"weight": MXFloat(4).emulate(weight, None), "scale": half})
    with pytest.raises(ValueError, match="4-bit grid"):
        Integers(4, 16).packed({"weight": weight, "scale": torch.full((6, 4), 0.01)})
    with pytest.raises(ValueError, match="e4m3"):
        nearest_codes(weight, Float8().rounding(1.0).element, scale)


def test_configurations_enable_what_a_preset_names() -> None:
    for name, preset in presets(32).items():
        assert isinstance(preset, Preset)
        _, weight, inputs, head = preset.config["quant_cfg"]
        assert weight["enable"]
        assert inputs["enable"] == (preset.inputs is not None)
        assert head == {"quantizer_name": "*lm_head*", "enable": False}
        assert isinstance(weight["cfg"], list) == (name == "w4a8_awq")
    assert presets(32)["int8_smoothquant"].config["quant_cfg"][2]["cfg"]["axis"] is None  # one scale for the input
    assert presets(32)["int8_smoothquant"].config["quant_cfg"][1]["cfg"]["axis"] == 0  # one for each row


def test_microscaling_is_told_as_in_the_library() -> None:
    """MXFP4_DEFAULT_CFG and MXFP8_DEFAULT_CFG, but for who computes."""
    for name, element in (("mxfp4", (2, 1)), ("mxfp8", (4, 3))):
        config = presets(0)[name].config
        assert config["algorithm"] is None
        for entry in config["quant_cfg"][1:3]:
            assert entry["cfg"].pop("backend") in BACKENDS
            assert entry["cfg"] == {
                "num_bits": element,
                "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
            }
