"""GPTQModel (ModelCloud): GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.packed import Packed, PackedInteger
from kernels.packing import pack
from methods.base import Parts, register
from methods.budget import Budget
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid

IMPORTS = ("gptqmodel",)
WORKERS = 2
MULTIPLE = 32


@register("tool_gptqmodel")
@dataclass(frozen=True)
class ToolGPTQModel(Toolchain):
    """The library's GPTQ.

    Args:
        desc_act: columns in the order of their second moments, and groups of columns that are neighbors there.
        act_group_aware: whole groups in that order, which needs no index; the library's default without `desc_act`.
        damp_percent: of the mean second moment; the library's default. The paper's is 0.01.
        mse: the power of the error that the search of each group's range minimizes; 0 for no search.
    """

    desc_act: bool = False
    act_group_aware: bool = True
    damp_percent: float = 0.05
    mse: float = 0.0

    requirements: ClassVar[tuple[str, ...]] = ("gptqmodel==7.6.0",)
    in_original_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.damp_percent < 1:
            raise ValueError(f"method.damp_percent={self.damp_percent:g} is outside 0 to 1; take 0.05")

    @property
    def parts(self) -> Parts:
        return Parts(rounding="gptq")

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        odd = next((shape for shape in network.shapes if any(size % MULTIPLE for size in shape)), None)
        if reason is None and odd is not None:
            return f"GPTQModel packs matrices whose sizes are multiples of {MULTIPLE}, not {odd[0]} × {odd[1]}"
        if reason is None and self.act_group_aware and not self.desc_act and not budget.group_size:
            return "GPTQModel puts whole groups in order, and rows are one; set method.act_group_aware=false"
        return reason

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {
            "bits": budget.bits,
            "group_size": budget.group_size or -1,
            "sym": budget.symmetric,
            "desc_act": self.desc_act,
            "act_group_aware": self.act_group_aware and not self.desc_act,
            "damp_percent": self.damp_percent,
            "mse": self.mse,
        }

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """With the group of each column where columns of a group are no neighbors."""
        fmt = budget.format()
        weight, group = tensors["weight"], tensors["group"].long()
        order = group.argsort(stable=True)
        size = fmt.columns_per_group(weight.shape[1])
        if not torch.equal(group[order], torch.arange(len(group), device=group.device) // size):
            raise ValueError(f"its groups do not have {size} columns each")
        done = on_grid(weight[:, order], tensors["scale"], tensors.get("zero"), fmt)
        assert isinstance(done, PackedInteger)
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return done
        codes = done.unpacked_codes()[:, order.argsort()]
        done.codes = pack(codes, fmt.width)
        done.group_index = group.to(torch.int16)
        return done


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`. The library loads the model itself."""
    import gptqmodel
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear, pack_block_ext

    del model
    package: Any = gptqmodel
    package._default_cpu_workers = lambda: WORKERS  # with one worker it waits for itself
    pack_block_ext.load_pack_block_extension = lambda: None  # or it compiles C++ on the clock; Python packs as well
    # The older format stores zero points less one, which the library adds back only when it loads a checkpoint.
    config = package.QuantizeConfig(**settings, format="gptq_v2", device="cpu", offload_to_disk=False)
    tool = package.GPTQModel.load(work.folder, config, dtype=torch.float32)
    tool.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in work.tokens])
    answer: dict[str, Tensor] = {}
    for name in work.linears:
        module = tool.model.get_submodule(name)
        if hasattr(module, "qweight"):
            found = unpacked(module, PackableQuantLinear.dequantize_weight)
            if settings["sym"]:
                del found["zero"]
            answer |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    return answer


def unpacked(module: Any, dequantize: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """What a linear of the library's computes with, in whatever layout it packs: `weight` [out, in], `scale` and
    `zero` [out, groups], and `group` [in], the group of each column. Its codes and scales are lost.

    Args:
        module: has `qweight`, `scales` [groups, out] and `g_idx` [in].
        dequantize: gives scale · (code − zero) of a module: [in, out].
    """
    weight, scale, group = dequantize(module).float().T, module.scales.float().T, module.g_idx.long()
    module.qweight = torch.zeros_like(module.qweight)
    module.scales = torch.ones_like(module.scales)
    zero_of_column = -dequantize(module).float().T  # as all codes are 0 now
    zero = torch.empty_like(scale)
    zero[:, group] = zero_of_column
    return {"weight": weight, "scale": scale, "zero": zero, "group": group}
