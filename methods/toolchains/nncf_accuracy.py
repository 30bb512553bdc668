"""NNCF's accuracy control (`nncf.quantize_with_accuracy_control`, of OpenVINO models): INT8 weights and inputs, taken
back where they harm most."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activations import StaticScale, integers
from kernels.linear import Inputs
from kernels.minifloat import Element
from kernels.packed import Packed
from methods.base import Parts, register
from methods.budget import Budget
from methods.formats.dense import Dense
from methods.formats.integer import Integer
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid
from methods.toolchains.openvino import REQUIREMENTS, converted, operators, samples, values

IMPORTS = ("nncf", "openvino")
BITS = 8
OFF_MIDDLE = 1e-2
"""Steps by which zero may miss a point of the grid: ranges are in fp32."""


@register("tool_nncf_accuracy")
@dataclass(frozen=True)
class ToolNNCFAccuracy(Toolchain):
    """INT8 with a scale for each output channel, inputs with one scale from calibration; and 16 bits for linears whose
    return to full precision, one by one, brings the loss within `max_drop` of the original model's.

    The library calibrates on the first half of the calibration text, and measures losses on the second. Linears that
    share an input return together, with their inputs; what they store beyond 8 bits comes on top of the budget. Its
    symmetric preset is chosen: inputs that are never negative in that text get the numbers from 0 to 255, others those
    from -128 to 127, of which we leave the lowest unused. Its SmoothQuant is off: a linear that returns gets its
    original weight back while its input stays smoothed.

    Args:
        max_drop: of the metric, minus the mean loss in nats a token; the library's default.
        max_num_iterations: returns that are tried at most; 0 is no bound.
        ranking_subset_size: sequences, those whose loss suffers most, on which returns are ranked.
    """

    max_drop: float = 0.01
    max_num_iterations: int = 0
    ranking_subset_size: int = 300

    requirements: ClassVar[tuple[str, ...]] = REQUIREMENTS
    in_original_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("max_drop", "max_num_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"method.{name}={getattr(self, name):g} is negative; take 0 or more")
        if self.ranking_subset_size < 1:
            raise ValueError(f"method.ranking_subset_size={self.ranking_subset_size} ranks by nothing; take 1 or more")

    @property
    def parts(self) -> Parts:
        return Parts(allocation="measured_loss × accuracy_aware")

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is None and (budget.bits, budget.group_size) != (BITS, 0):
            return f"NNCF's accuracy control starts from 8 bits per channel; take w8channel-sym, not {budget.name}"
        return reason

    def settings(self, budget: Budget) -> dict[str, Any]:
        del budget
        return asdict(self)

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        del budget
        if "weight_step" in tensors:
            return on_grid(tensors["weight"], tensors["weight_step"], None, Integer(BITS, symmetric=True))
        grid = Dense().fit(tensors["weight"])
        return grid.pack(grid.encode(tensors["weight"]))

    def rounding(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Inputs | None:
        del budget
        if "input_step" not in tensors:
            return None
        element = integers(BITS) if tensors["input_low"] < 0 else NonNegative()
        return StaticScale(element, float(tensors["input_step"]) * element.max)


@dataclass(frozen=True)
class NonNegative(Element):
    """The whole numbers from 0 to 255."""

    @property
    def bits(self) -> int:
        return BITS

    @property
    def name(self) -> str:
        return f"uint{BITS}"

    @property
    def max(self) -> float:
        return 2.0**BITS - 1

    def values(self) -> Tensor:
        return torch.arange(2.0**BITS)

    def encode(self, x: Tensor) -> Tensor:
        return torch.round(x).nan_to_num(nan=self.max).clamp(0, self.max).to(torch.uint8)


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`. Biases that the library corrects are written into `model`.

    Raises:
        ValueError: there is but one sequence of text.
    """
    if len(work.tokens) < 2:
        raise ValueError("one sequence cannot be both calibrated on and judged by; calibrate on 2 or more")
    import nncf

    calibration, validation = work.tokens.tensor_split(2)
    limits = {"max_num_iterations": settings["max_num_iterations"]} if settings["max_num_iterations"] else {}
    done = nncf.quantize_with_accuracy_control(
        converted(model, work.tokens),
        nncf.Dataset(samples(calibration)),
        nncf.Dataset(samples(validation)),
        negative_losses,
        max_drop=settings["max_drop"],
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(calibration),
        ignored_scope=nncf.IgnoredScope(patterns=[others(work.linears)], validate=False),
        advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(
            backend_params={"compress_weights": False}  # leaves weights beside the ranges that round them
        ),
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
            ranking_subset_size=settings["ranking_subset_size"], num_ranking_workers=1, **limits
        ),
    )
    return read(done, model, work.linears)


def others(linears: Iterable[str]) -> str:
    """A pattern of all operators but those of the linears."""
    return rf"(?!{'|'.join(map(operators, linears))})"


def negative_losses(model: Any, items: Iterable[Sequence[Any]]) -> tuple[float, list[float]]:
    """Minus the loss in nats a token: the mean over sequences of one length, and each.

    Args:
        model: from inputs, see `methods.toolchains.openvino`, to logits [1, length, vocabulary].
    """
    found = []
    for item in items:
        logits, tokens = torch.from_numpy(model(item)[0].copy()), torch.from_numpy(item[0])
        found.append(-F.cross_entropy(logits[0, :-1], tokens[0, 1:]).item())
    return sum(found) / len(found), found


@torch.no_grad()
def read(quantized: Any, model: nn.Module, linears: Sequence[str]) -> dict[str, Tensor]:
    """Weights, and steps and lowest points of what rounds them and their inputs, in an OpenVINO model. Biases go into
    `model`.

    Raises:
        ValueError: the lowest point of a grid is neither zero nor as far from it as the highest.
    """
    products = [op for op in quantized.get_ops() if op.get_type_name() == "MatMul"]
    found = {n: op for n in linears for op in products if re.match(operators(n), op.get_friendly_name())}
    nodes: dict[str, Any] = {}
    levels: dict[str, int] = {}
    for name, product in found.items():
        x, weight = (product.input_value(port).get_node() for port in (0, 1))
        nodes[f"{name}/weight"] = weight
        for key, node in ((f"{name}/input", x), (f"{name}/weight", weight)):
            if node.get_type_name() == "FakeQuantize":
                levels[key] = node.get_attributes()["levels"]
                nodes |= {f"{key}_{end}": node.input_value(port).get_node() for end, port in (("low", 1), ("high", 2))}
        bias = added(product)
        if bias is not None:
            nodes[f"{name}/bias"] = bias
    held = values(nodes)
    for name in [name for name in found if f"{name}/bias" in held]:
        model.get_parameter(f"{name}.bias").copy_(held.pop(f"{name}/bias").flatten())
    for key, count in levels.items():
        held[f"{key}_step"] = step(held[f"{key}_low"], held.pop(f"{key}_high"), count)
    return held


def added(product: Any) -> Any:
    """The constant that is added to a matrix product, or None."""
    for use in product.output(0).get_target_inputs():
        if use.get_node().get_type_name() == "Add":
            other = use.get_node().input_value(1 - use.get_index()).get_node()
            return other if other.get_type_name() == "Constant" else None
    return None


def step(low: Tensor, high: Tensor, levels: int) -> Tensor:
    """The distance of `levels` points from `low` to `high`: the same shape.

    Raises:
        ValueError: zero is neither the lowest point nor the middle; of an even number of points, the middle has one
            more below it than above.
    """
    distance = (high - low) / (levels - 1)
    below = -low / distance
    if not ((below == 0) | ((below - levels // 2).abs() < OFF_MIDDLE)).all():
        raise ValueError(f"NNCF's grid of {levels} points has zero neither in its middle nor as its lowest")
    return distance
