"""The last Neural Compressor with HAWQ (3.7.1): INT8, and linears that return to full precision.

`neural_compressor.quantization.fit` with the strategy `hawq_v2` ended with 3.7.1. What it traces is
`methods.toolchains.plain_llama`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from kernels.packed import Packed
from methods.base import Parts, hint, register
from methods.budget import Budget
from methods.formats.dense import Dense
from methods.formats.integer import Integer
from methods.network import Network
from methods.toolchains.base import Toolchain, Work, on_grid
from methods.toolchains.plain_llama import PlainLlama, plain_name, why_not

IMPORTS = ("neural_compressor.quantization",)
INT8 = Integer(8, symmetric=True)
Metric = Callable[[Tensor, Tensor], float]


@register("tool_inc_hawq_v2")
@dataclass(frozen=True)
class ToolINCHAWQV2(Toolchain):
    """Symmetric INT8 per output channel; then linears return to 16 bits, until the criterion holds.

    The library orders the linears by the traces of their Hessian, which it takes over one batch. The criterion alone
    decides how many return: what they store may be more than the budget, which has to allow INT8. It is judged with
    inputs in the library's static unsigned integers, which are not kept: they have a zero point, and inputs keep 16
    bits here.

    Args:
        metric: `perplexity` or `accuracy` of the next token, on the calibration text. The library restores the
            largest traces first for a metric of which more is better, and the smallest for one of which less is.
        loss: the relative change of the metric for the worse that is allowed; the library's default.
        trials: models tried at most.
        batch: sequences of one batch.
    """

    metric: str = "perplexity"
    loss: float = 0.01
    trials: int = 100
    batch: int = 8

    requirements: ClassVar[tuple[str, ...]] = ("neural-compressor==3.7.1", "setuptools<80", "six")
    in_original_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}: {hint(self.metric, METRICS)}")

    @property
    def parts(self) -> Parts:
        return Parts(allocation=f"inc_hawq_v2 until {self.metric} holds")

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = why_not(network.model)
        if reason is not None:
            return reason
        limit = budget.limit(network.shapes, network.other_parameters)
        if limit is None:
            return f"Neural Compressor's HAWQ is told no bounds, and the budget is a bound of {budget.bound}"
        stored = sum(map(INT8.stored_bits, network.shapes)) / sum(out * columns for out, columns in network.shapes)
        if stored > limit:
            return f"Neural Compressor's INT8 stores {stored:.4g} bits a weight; the limit is {limit:g}"
        return None

    def settings(self, budget: Budget) -> dict[str, Any]:
        del budget
        return asdict(self)

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        del budget
        if "scale" in tensors:
            return on_grid(tensors["weight"], tensors["scale"], None, INT8)
        grid = Dense().fit(tensors["weight"])
        return grid.pack(grid.encode(tensors["weight"]))


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    from neural_compressor import quantization
    from neural_compressor.config import AccuracyCriterion, PostTrainingQuantConfig, TuningCriterion

    torch.manual_seed(0)
    plain = PlainLlama(model, work.tokens.shape[1] - 1).eval()
    loader = DataLoader(plain.text(work.tokens), batch_size=settings["batch"], collate_fn=batched)
    metric, more_is_better = METRICS[settings["metric"]]
    done = quantization.fit(
        plain,
        PostTrainingQuantConfig(
            quant_level=1,  # the strategy alone, without those that level "auto" tries first
            calibration_sampling_size=[len(work.tokens)],
            tuning_criterion=TuningCriterion(strategy="hawq_v2", max_trials=settings["trials"]),
            accuracy_criterion=AccuracyCriterion(higher_is_better=more_is_better, tolerable_loss=settings["loss"]),
        ),
        calib_dataloader=loader,
        eval_func=lambda tried: measured(tried, loader, metric),
    )
    if done is None:
        raise ValueError(f"no model within {settings['trials']} trials keeps its {settings['metric']}; allow more")
    found = {name: read(done.model.get_submodule(plain_name(name))) for name in work.linears}
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


def batched(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Inputs [batch, length, hidden], and tokens [batch · length]: the library passes them to cross entropy as they
    are, whatever loss it is told to use."""
    inputs, tokens = zip(*samples, strict=True)
    return torch.stack(inputs), torch.cat(tokens)


@torch.no_grad()
def measured(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], metric: Metric) -> float:
    """A metric of all tokens; the model may be wrapped by the library."""
    results = [(model(inputs), tokens) for inputs, tokens in batches]
    return metric(torch.cat([logits for logits, _ in results]), torch.cat([tokens for _, tokens in results]))


def _perplexity(logits: Tensor, tokens: Tensor) -> float:
    return cross_entropy(logits, tokens).exp().item()


def _accuracy(logits: Tensor, tokens: Tensor) -> float:
    return (logits.argmax(-1) == tokens).float().mean().item()


METRICS = {"perplexity": (_perplexity, False), "accuracy": (_accuracy, True)}
"""Functions of logits [tokens, vocabulary] and tokens, and whether more is better."""


def read(module: Any) -> dict[str, Tensor]:
    """What a linear of the library's computes with; without `scale` where it returned to full precision."""
    if isinstance(module.weight, Tensor):
        return {"weight": module.weight.detach()}
    weight = module.weight()
    return {"weight": weight.dequantize(), "scale": weight.q_per_channel_scales().float().view(-1, 1)}
