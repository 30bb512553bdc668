"""AutoRound (intel/auto-round)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from methods.base import register
from methods.budget import Budget
from methods.toolchains.base import Toolchain, Work

IMPORTS = ("auto_round",)


@register("tool_auto_round")
@dataclass(frozen=True)
class ToolAutoRound(Toolchain):
    """Learned rounding by the library.

    Args:
        iters: optimization steps a block; the library's default is 200.
        lr: learning rate; the library's choice by default.
        batch_size: sequences a step.
    """

    iters: int = 200
    lr: float | None = None
    batch_size: int = 8

    requirements: ClassVar[tuple[str, ...]] = ("auto-round==0.16.1",)
    in_original_coordinates: ClassVar[bool] = True

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {
            "bits": budget.bits,
            "group_size": budget.group_size or -1,
            "sym": budget.symmetric,
            "iters": self.iters,
            "lr": self.lr,
            "batch_size": self.batch_size,
        }


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader

    sequences, length = work.tokens.shape
    rows: Any = [{"input_ids": row} for row in work.tokens]
    batches: Any = DataLoader(rows, batch_size=settings["batch_size"])
    tokenizer = _tokenizer(work.folder)
    tool = AutoRound(
        model, tokenizer, dataset=batches, nsamples=sequences, seqlen=length, amp=False, device_map="cpu", **settings
    )
    done, _ = tool.quantize()
    answer = {}
    for name in work.linears:
        module = done.get_submodule(name)
        rows = len(module.weight)
        answer[f"{name}/weight"] = module.weight.float()
        answer[f"{name}/scale"] = module.scale.float().view(rows, -1)
        if not settings["sym"]:
            answer[f"{name}/zero"] = module.zp.float().view(rows, -1)
    return answer


def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{folder}/tokenizer.json")
