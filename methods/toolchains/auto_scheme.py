"""AutoScheme of AutoRound (intel/auto-round): a width for each linear, by first-order changes of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.packed import Packed
from methods.allocation.base import ROUNDOFF
from methods.base import Context, Parts, Quantized, register
from methods.budget import Budget
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid

IMPORTS = ("auto_round", "datasets")
TEXT = "calibration"
FULL_WIDTH = 16


@register("tool_auto_scheme")
@dataclass(frozen=True)
class ToolAutoScheme(Toolchain):
    """AutoScheme among integers of the budget's groups, and the library's rounding. In its asymmetric plans 8 bits are
    symmetric: the library lets nothing else be served.

    Args:
        bits: candidate widths.
        iters: optimization steps a block; the library's default is 200, and 0 rounds to nearest.
        lr: learning rate; the library's choice by default.
        batch_size: sequences a step.
        score_sequences: of the calibration text, on which linears are scored, once a width. The library asks for 128
            of 1024 tokens where 2 bits are among the widths.
        score_length: tokens used of each.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    iters: int = 200
    lr: float | None = None
    batch_size: int = 8
    score_sequences: int = 16
    score_length: int = 256

    requirements: ClassVar[tuple[str, ...]] = ("auto-round==0.16.1",)
    in_original_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.bits:
            raise ValueError("method.bits is empty; give candidates such as method.bits=[2,3,4,8]")

    @property
    def parts(self) -> Parts:
        return Parts(rounding="autoround", allocation="autoscheme × dynamic programming")

    def supports(self, network: Network, budget: Budget) -> str | None:
        limit = budget.limit(network.shapes, network.other_parameters)
        if limit is None:
            return f"AutoScheme bounds stored bits, and the budget is a bound of {budget.bound}"
        least = budget.format(min(self.bits))
        stored = sum(map(least.stored_bits, network.shapes)) / _weights(network.shapes)
        return f"{least.name} stores {stored:.4g} bits a weight; the limit is {limit:g}" if stored > limit else None

    def settings(self, budget: Budget) -> dict[str, Any]:
        return asdict(self) | {"budget": asdict(budget)}

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        """In the width that the tool names, of which nothing else in the answer is a witness."""
        return on_grid(
            tensors["weight"], tensors["scale"], tensors.get("zero"), budget.format(int(tensors["width"].item()))
        )

    def quantize(self, ctx: Context) -> Quantized:
        """As `Toolchain` does.

        Raises:
            ValueError: also where the plan stores more than the budget.
        """
        done = super().quantize(ctx)
        limit = ctx.budget.limit(ctx.network.shapes, ctx.network.other_parameters)
        stored = sum(packed.stored_bits() for packed in done.packed.values()) / _weights(ctx.network.shapes)
        if limit is not None and stored > limit * (1 + ROUNDOFF):
            raise ValueError(f"{self.name} stored {stored:.4f} bits a weight, over the {limit:.4f} of its budget")
        return done


def average_bits(budget: Budget, shapes: Sequence[tuple[int, int]], limit: float, widths: Iterable[int]) -> float:
    """The tool's `avg_bits` with which no plan stores more than `limit`, as we count.

    What we store beyond the tool's count (rows that end within a byte, and what `_counted` leaves out) is taken off
    the limit, for each matrix at the width where it is most. A limit beyond the widest formats becomes theirs: the
    tool refuses it.
    """
    widths = tuple(widths)
    excess = sum(max(budget.format(w).stored_bits(s) - _counted(budget, w, s) for w in widths) for s in shapes)
    most = sum(_counted(budget, max(widths), shape) for shape in shapes)
    weights = _weights(shapes)
    return min((limit - excess / weights) * (1 + ROUNDOFF), most / weights)


def _counted(budget: Budget, width: int, shape: tuple[int, int]) -> int:
    """Bits that the tool counts for a matrix.

    To symmetric formats it would add zero points, which nobody stores, as many bits as their width: there it counts
    codes alone, as it can be told to.
    """
    out, columns = shape
    groups = 0 if budget.symmetric else out * -(-columns // (budget.group_size or columns))
    return width * out * columns + groups * (16 + width)


def _weights(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(out * columns for out, columns in shapes)


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    from auto_round import AutoRound

    sequences, length = work.tokens.shape
    _register_text(work)
    tool = AutoRound(
        model,
        _tokenizer(work.folder),
        scheme=_scheme(model, work, settings),
        dataset=TEXT,
        nsamples=sequences,
        seqlen=length,
        amp=False,
        device_map="cpu",
        **{key: settings[key] for key in ("iters", "lr", "batch_size")},
    )
    done, chosen = tool.quantize()
    answer = {}
    for name in work.linears:
        module, scheme = done.get_submodule(name), chosen[name]
        if scheme["bits"] < FULL_WIDTH:  # what is left in 16 bits is missing in the answer, which then is refused
            rows = len(module.weight)
            answer[f"{name}/weight"] = module.weight.float()
            answer[f"{name}/scale"] = module.scale.float().view(rows, -1)
            answer[f"{name}/width"] = torch.tensor(scheme["bits"])
            if not scheme["sym"]:
                answer[f"{name}/zero"] = module.zp.float().view(rows, -1)
    return answer


def _scheme(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> Any:
    from auto_round import AutoScheme, QuantizationScheme, envs

    # It keeps scores on disk, known by the name of the model's folder alone: another model would find them.
    envs.AR_AUTO_SCHEME_CACHE = f"{work.folder}/scores"
    budget = Budget(**settings["budget"])
    matrices = [model.get_parameter(f"{name}.weight") for name in work.linears]
    shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
    others = sum(p.numel() for p in model.parameters()) - _weights(shapes)
    limit = budget.limit(shapes, others)
    assert limit is not None  # see `supports`
    group_size = budget.group_size or -1
    options = [QuantizationScheme(bits, group_size, budget.symmetric, act_bits=FULL_WIDTH) for bits in settings["bits"]]
    return AutoScheme(
        avg_bits=average_bits(budget, shapes, limit, settings["bits"]),
        options=options,
        ignore_scale_zp_bits=budget.symmetric,
        nsamples=min(settings["score_sequences"], len(work.tokens)),
        seqlen=min(settings["score_length"], work.tokens.shape[1]),
    )


def _register_text(work: Work) -> None:
    """AutoScheme takes its text by name only."""
    from auto_round.calib_dataset import register_dataset
    from datasets import Dataset

    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in work.tokens.tolist()]

    @register_dataset(TEXT)
    def text(*_: Any, **__: Any) -> Dataset:
        return Dataset.from_list(rows)


def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{folder}/tokenizer.json")
