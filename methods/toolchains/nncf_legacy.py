"""The last NNCF with HAWQ (2.19): a width for each linear, by Hutchinson traces or by reinforcement learning.

`nncf.torch.create_compressed_model` and its precision initializers ended with 2.19. What they trace is
`methods.toolchains.plain_llama`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernels.packed import Packed
from methods.base import Parts, hint, register
from methods.budget import Budget
from methods.formats.integer import WIDTHS, Integer
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid
from methods.toolchains.plain_llama import PlainLlama, plain_name, why_not

IMPORTS = ("nncf.common.check_features",)  # not nncf.torch, which reads a switch as it is imported
SWITCH = "NNCF_TORCH_LEGACY_TRACING"
BATCH = 4
SPARE = 1 - 1e-9
"""For a plan that takes exactly what is allowed, whose ratio the library computes in another order."""
FULL_WIDTH = 32
INT8 = 8


@register("tool_nncf_hawq")
@dataclass(frozen=True)
class ToolNNCFHAWQ(Toolchain):
    """Integers per output channel, whatever the budget's groups, of a width that the library chooses.

    HAWQ sorts the linears by the average trace of their Hessian, gives more bits to larger traces, and of all plans
    like that which are small enough takes the one with the least Σ trace · ‖ΔW‖². AutoQ trains an agent (DDPG) that
    is rewarded with the share of next tokens that the quantized model predicts. Linears alone are quantized, and
    rounded to nearest. The library also narrows their inputs, to the least width of the weights that read them, or
    as the agent says; that is left out: inputs keep 16 bits here, and where the agent is rewarded. It still matters
    to AutoQ's widths: no weights get more bits than the agent gives their input.

    Symmetric channels with no weight beyond 0.1 are rounded as if they had one, as the library does.

    Args:
        initializer: `hawq` or `autoq`.
        bits: the widths to choose from.
        data_points, iterations, tolerance: sequences and probes of HAWQ's traces, and the relative change of their
            mean that ends them; the library's defaults.
        episodes, share: plans that AutoQ tries, and the part of the calibration text that it judges them by; those of
            the library's examples. The first 20 plans are random.
    """

    initializer: str = "hawq"
    bits: tuple[int, ...] = (2, 4, 8)
    data_points: int = 100
    iterations: int = 200
    tolerance: float = 1e-4
    episodes: int = 300
    share: float = 0.2

    requirements: ClassVar[tuple[str, ...]] = ("nncf==2.19.0",)
    in_original_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.initializer not in INITIALIZERS:
            raise ValueError(f"unknown initializer {self.initializer!r}: {hint(self.initializer, INITIALIZERS)}")
        if not self.bits or not set(self.bits) <= set(WIDTHS):
            raise ValueError(f"method.bits={list(self.bits)} are no widths; give some of 2 to 8")

    @property
    def parts(self) -> Parts:
        return Parts(allocation=f"nncf_{self.initializer}")

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = why_not(network.model)
        if reason is not None:
            return reason
        limit = budget.limit(network.shapes, network.other_parameters)
        if limit is None:
            return f"NNCF's HAWQ bounds bits, and the budget is a bound of {budget.bound}"
        least = min(self.bits)
        if code_bits(network.shapes, limit, self.bits, budget.symmetric) < least:
            return f"at {least} bits, scales of rows included, NNCF's integers take more than {limit:g} bits"
        return None

    def settings(self, budget: Budget) -> dict[str, Any]:
        return asdict(self) | {"budget": asdict(budget)}

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """In the width that the tool names, of which nothing else in the answer is a witness."""
        fmt = Integer(int(tensors["width"].item()), symmetric=budget.symmetric)
        return on_grid(tensors["weight"], tensors["scale"], tensors.get("zero"), fmt)


def code_bits(shapes: Sequence[tuple[int, int]], limit: float, widths: Sequence[int], symmetric: bool = False) -> float:
    """Bits a weight that are left for codes, on average, where no plan shall store more than `limit`.

    Scales and zero points of rows are taken off, for each matrix at the width where they are most. What is left is
    at most the largest width.
    """
    beyond = sum(max(Integer(w, symmetric=symmetric).stored_bits(s) - w * s[0] * s[1] for w in widths) for s in shapes)
    return min(limit - beyond / sum(out * columns for out, columns in shapes), max(widths))


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    compress, register, parsed = _library()
    torch.manual_seed(0)
    np.random.seed(0)
    plain = PlainLlama(model, work.tokens.shape[1] - 1)
    text = plain.text(work.tokens)
    loader = DataLoader(text, batch_size=BATCH)
    budget = Budget(**settings["budget"])
    precision, functions = INITIALIZERS[settings["initializer"]](settings, _left(model, work, settings), loader)
    config = parsed(configuration(work.linears, text.tensors[0].shape, precision, budget.symmetric))
    _, done = compress(plain, register(config, loader, device="cpu", **functions), dump_graphs=False)
    found = {name: read(done.get_submodule(plain_name(name)), budget.symmetric) for name in work.linears}
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


def _left(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> float:
    """Bits a weight for codes."""
    budget = Budget(**settings["budget"])
    matrices = [model.get_parameter(f"{name}.weight") for name in work.linears]
    shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
    others = sum(p.numel() for p in model.parameters()) - sum(matrix.numel() for matrix in matrices)
    limit = budget.limit(shapes, others)
    assert limit is not None  # see `supports`
    return code_bits(shapes, limit, settings["bits"], budget.symmetric)


def _library() -> tuple[Any, Any, Any]:
    """What is needed of the library, with its own PyTorch code for rounding: C++ would be compiled at first use."""
    from nncf.common import check_features

    check_features.os.environ[SWITCH] = "1"  # the name that it is looked up under there
    from nncf import NNCFConfig
    from nncf.torch import create_compressed_model, register_default_init_args
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
    from nncf.torch.quantization.reference import ReferenceQuantizedFunctions

    QuantizedFunctionsCPU._loaded_namespace = ReferenceQuantizedFunctions
    return create_compressed_model, register_default_init_args, NNCFConfig.from_dict


def configuration(
    linears: Sequence[str], shape: Sequence[int], precision: Mapping[str, Any], symmetric: bool
) -> dict[str, Any]:
    """The library's configuration: linears and their inputs are quantized, and nothing else.

    Args:
        linears: names in the original model.
        shape: of the inputs [sequences, length, hidden].
        precision: which initializer, and its options.
    """
    scopes = [_scope(plain_name(name)) for name in linears]
    mode = {"mode": "symmetric", "signed": True} if symmetric else {"mode": "asymmetric"}
    return {
        "input_info": [{"sample_size": [1, *shape[1:]]}],
        "target_device": "TRIAL",  # any other would replace the widths by those of its processors
        "compression": {
            "algorithm": "quantization",
            "weights": mode | {"per_channel": True, "target_scopes": scopes},
            "activations": {"target_scopes": scopes},
            "initializer": {
                "range": {"num_init_samples": BATCH},  # of inputs, which are not quantized in the end
                "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
                "precision": dict(precision),
            },
        },
    }


def _scope(name: str) -> str:
    """The operator of a linear, as the library names it."""
    _, index, linear = name.split(".")
    return f"PlainLlama/ModuleList[blocks]/_Block[{index}]/NNCFLinear[{linear}]/linear_0"


def _hawq(settings: Mapping[str, Any], left: float, loader: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The initializer and the functions it needs.

    The library's ratio is of the operations of INT8 to those of the plan, in bits by multiplication, at the width of
    weights or inputs, whichever is more; inputs never are. Multiplications are in the ratio of the weights.
    """
    del loader
    return {
        "type": "hawq",
        "bits": list(settings["bits"]),
        "compression_ratio": max(SPARE * INT8 / left, INT8 / max(settings["bits"])),
        "num_data_points": settings["data_points"],
        "iter_number": settings["iterations"],
        "tolerance": settings["tolerance"],
    }, {"criterion": nn.CrossEntropyLoss(), "criterion_fn": lambda y, t, criterion: criterion(y, t.flatten())}


def _autoq(settings: Mapping[str, Any], left: float, loader: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same; the library's ratio is of the codes to weights of 32 bits."""
    return {
        "type": "autoq",
        "bits": list(settings["bits"]),
        "compression_ratio": left / SPARE / FULL_WIDTH,
        "iter_number": settings["episodes"],
        "eval_subset_ratio": settings["share"],
    }, {"autoq_eval_fn": predicted, "val_loader": loader}


INITIALIZERS = {"hawq": _hawq, "autoq": _autoq}


def predicted(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percentage of tokens that are predicted, with weights alone quantized."""
    for quantizer in model.nncf.external_quantizers.values():
        quantizer.disable_quantization()
    hits = [model(inputs).argmax(-1) == tokens.flatten() for inputs, tokens in batches]
    return 100 * torch.cat(hits).float().mean().item()


def read(module: Any, symmetric: bool) -> dict[str, Tensor]:
    """What a linear of the library's computes with, and its width."""
    (operation,) = module.pre_ops.values()
    quantizer = operation.op
    lowest, _, scale, zero = quantizer.get_parameters_for_torch_fq()
    with torch.no_grad():
        weight = quantizer(module.weight).as_subclass(Tensor)
    found = {"weight": weight, "scale": scale.detach().view(-1, 1), "width": torch.tensor(quantizer.num_bits)}
    return found if symmetric else found | {"zero": (zero - lowest).float().view(-1, 1)}
