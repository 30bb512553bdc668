"""SliM-LLM (Huang et al., ICML 2025, arXiv 2405.14917)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.budget import Budget
from methods.formats.group_widths import GroupWidths, GroupWidthsGrid, Ranges, extremes, two_levels
from methods.formats.integer import Integer
from methods.network import Group, Network, hooks
from methods.rounding.base import Rounded
from methods.rounding.gptq import GridColumns
from methods.rounding.sweep import damped_factor, sweep
from methods.stream import BlockStream, gram_matrices

ERROR_NORM = 2.4
SALIENT = 2.0  # standard deviations above the mean salience
LEAST_PROBABILITY = 1e-6

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""How far outputs of a rounded linear are from the original ones, both [rows, out]."""


def kl_divergence(outputs: Tensor, original: Tensor) -> Tensor:
    """Σ KL(softmax(outputs) ‖ softmax(original)) over rows; direction and bound are those of the official code."""
    q, p = (y.softmax(-1).clamp(min=LEAST_PROBABILITY) for y in (outputs, original))
    return (q * (q.log() - p.log())).sum()


def squared_error(outputs: Tensor, original: Tensor) -> Tensor:
    """‖outputs − original‖²."""
    return (outputs - original).square().sum()


CRITERIA: dict[str, Loss] = {"kl": kl_divergence, "error": squared_error}


@register("slim_llm")
@dataclass(frozen=True)
class SliMLLM(UniformMethod):
    """Widths b−1, b and b+1 for the groups of columns of each linear, by their salience and b on average; then GPTQ,
    with ranges that are searched.

    Differs from the official code in that moving no bits is tried too, so that a linear may have any number of
    groups (the code needs four), and in that one damped Gram matrix serves throughout (the code's search damps by
    0.01 absolutely). A shorter last group keeps b bits: the mean is exactly b.

    Args:
        criterion: what decides how many groups change their width: `kl` (the paper) of the linear's softmaxed
            outputs, or `error`, their expected squared error.
        search_tokens: calibration tokens, at most, on which `kl` compares; the official code uses all. `error`
            needs none: the Gram matrix covers all.
        salient_weight: factor of the errors of salient weights in the search for ranges; 1, as in the official code,
            treats all weights alike.
        tau: ranges from 1 − tau to 1 + tau times that of a group's weights are tried; 0 for this range alone.
        tau_steps: ranges tried on each side of 1.
        damping: of the Gram matrix, relative to its mean diagonal.
    """

    criterion: str = "kl"
    search_tokens: int = 2048
    salient_weight: float = 1.0
    tau: float = 0.1
    tau_steps: int = 50
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}: there are {' and '.join(CRITERIA)}")
        if not 0 <= self.tau < 1 or min(self.search_tokens, self.tau_steps) < 1 or self.damping < 0:
            raise ValueError("SliM-LLM needs tau in [0, 1), damping from 0, search_tokens and tau_steps from 1")

    @property
    def parts(self) -> Parts:
        return Parts(rounding="gptq", allocation="salience")

    def supports(self, network: Network, budget: Budget) -> str | None:
        if budget.symmetric:
            return "SliM-LLM's grids are asymmetric"
        if budget.bits == 8:
            return "SliM-LLM gives some groups a bit more, and 9 bits cannot be packed"
        return super().supports(network, budget)

    @torch.no_grad()
    def quantize(self, ctx: Context) -> Quantized:
        network, packed = ctx.network, {}
        stream = BlockStream(network, ctx.tokens)
        stride = -(-ctx.tokens.numel() // self.search_tokens)
        for index, block in enumerate(ctx.track(network.blocks, "rounding")):
            grams, tokens = _observe(stream, index, block.groups, stride)
            for group in block.groups:
                gram, x = grams.pop(group.name), tokens.pop(group.name)
                factor = damped_factor(gram, self.damping)
                dead = (gram.diagonal() == 0) & gram.any()
                for name in group.linears:
                    weight, bias = network.weight(name).masked_fill(dead, 0), network.linear(name).bias
                    rounded = self._round(weight, bias, ctx.budget.format(), factor, x)
                    network.overwrite(name, rounded.weight)
                    packed[name] = rounded.packed
            stream.inputs = stream.run(index)
        return Quantized(packed)

    def _round(self, weight: Tensor, bias: Tensor | None, fmt: Integer, factor: Tensor, x: Tensor) -> Rounded:
        """Round one weight to integers like `fmt`, with R of its input's Gram matrix, and some inputs x."""
        size, gain = fmt.columns_per_group(weight.shape[1]), factor.diagonal().square()
        # E‖Δx‖² = tr(Δ R Rᵀ Δᵀ): for squared errors, the columns of R are a sample that equals the whole text.
        sample = factor.t() if self.criterion == "error" else x
        salience = group_salience(weight, gain, size)
        widths = allocate(weight, bias, sample, salience, fmt.width, size, CRITERIA[self.criterion])
        ranges = SalienceWeighted(gain, self.salient_weight, self.tau, self.tau_steps) if self.tau else extremes
        return round_groups(weight, factor, GroupWidths(widths, size), ranges)


def group_salience(weight: Tensor, gain: Tensor, size: int) -> Tensor:
    """Σ wᵢⱼ² / Uⱼⱼ² over each group of columns: [groups].

    A term is the loss of setting wᵢⱼ to zero when the columns still to come make up for it; see
    `methods.sensitivity.slim`.

    Args:
        weight: fp32 [out, in].
        gain: 1 / Uⱼⱼ² = Rⱼⱼ², fp32 [in].
        size: columns of a group.
    """
    return torch.stack([part.sum() for part in (weight.square().sum(0) * gain).split(size)])


def allocate(
    weight: Tensor, bias: Tensor | None, x: Tensor, salience: Tensor, width: int, size: int, loss: Loss
) -> tuple[int, ...]:
    """Salience-determined bit allocation (section 3.2): the width of each group.

    The n least salient groups give a bit each to the n most salient ones, in pairs. Of all n, none to half of the
    groups, the one is taken with the least loss of outputs when weights are rounded to nearest. Outputs change by two
    groups from one n to the next, so that all of them cost about as much as one multiplication.

    Args:
        weight: fp32 [out, in], with bias [out].
        x: inputs [rows, in].
        salience: [groups].
        width: of all groups at first.
        size: columns of a group. A shorter last one keeps its width.
    """
    count, whole = len(salience), weight.shape[1] // size
    snapped = {w: GroupWidths((w,) * count, size).fit(weight).snap(weight) for w in (width - 1, width, width + 1)}
    order = torch.argsort(salience[:whole], stable=True).tolist()
    bias = None if bias is None else bias.float()
    original, outputs = F.linear(x, weight, bias), F.linear(x, snapped[width], bias)
    losses = [loss(outputs, original)]
    for n in range(whole // 2):
        for group, changed in ((order[n], width - 1), (order[-1 - n], width + 1)):
            columns = slice(group * size, (group + 1) * size)
            outputs += F.linear(x[:, columns], snapped[changed][:, columns] - snapped[width][:, columns])
        losses.append(loss(outputs, original))
    n = int(torch.stack(losses).argmin())
    narrow, wide = order[:n], order[whole - n :]
    return tuple(width - (group in narrow) + (group in wide) for group in range(count))


@dataclass(frozen=True)
class SalienceWeighted:
    """Salience-weighted quantizer calibration (section 3.3): of each row's range in a group, enlarged or shrunk by a
    factor, the one with the least Σ λ|Q(w) − w|^2.4.

    λ is 1, but `salient_weight` for weights whose salience exceeds the mean of the group, over all rows, by more than
    two standard deviations. One-bit groups have no range; see `two_levels`.

    Args:
        gain: 1 / Uⱼⱼ², fp32 [in].
        salient_weight, tau, tau_steps: see `SliMLLM`.
    """

    gain: Tensor
    salient_weight: float
    tau: float
    tau_steps: int

    def __call__(self, weight: Tensor, width: int, start: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row; see `methods.formats.group_widths.Ranges`."""
        if width == 1:
            return two_levels(weight)
        fmt, importance = Integer(width), self._importance(weight, start)
        ends = torch.stack(torch.aminmax(weight, dim=1), dim=1)  # [out, 2]
        scale, zero = fmt.scale_and_zero(ends)
        best = weight.new_full((len(weight),), torch.inf)
        for factor in self._factors():
            s, z = fmt.scale_and_zero(factor * ends)
            codes = torch.round(weight / s.unsqueeze(1)).add_(z.unsqueeze(1)).clamp_(0, 2**width - 1)
            delta = codes.sub_(z.unsqueeze(1)).mul_(s.unsqueeze(1)).sub_(weight)
            error = delta.abs_().pow_(ERROR_NORM).mul_(importance).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        return scale, zero

    def _importance(self, weight: Tensor, start: int) -> Tensor:
        salience = weight.square() * self.gain[start : start + weight.shape[1]]
        salient = salience > salience.mean() + SALIENT * salience.std()
        return torch.where(salient, self.salient_weight, 1.0)

    def _factors(self) -> Sequence[float]:
        """1 first, so that it wins where others are no better."""
        steps = [self.tau * i / self.tau_steps for i in range(1, self.tau_steps + 1)]
        return [1.0, *(1 + step for step in steps), *(1 - step for step in steps)]


def round_groups(weight: Tensor, factor: Tensor, fmt: GroupWidths, ranges: Ranges) -> Rounded:
    """GPTQ of `weight` [out, in]; each group is fitted by `ranges` when its first column is reached.

    Args:
        factor: R of the input's Gram matrix, see `methods.rounding.sweep.damped_factor`.
    """
    grid = GroupWidthsGrid(fmt, weight, ranges)
    grid.refit(0, weight[:, : grid.group_size])  # the sweep refits the others
    columns = GridColumns(grid, weight.shape[1], refit=True)
    rounded = sweep(weight, factor, columns)
    return Rounded(grid.pack(columns.codes), rounded)


def _observe(
    stream: BlockStream, index: int, groups: Sequence[Group], stride: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the group's name, Gram matrices [in, in] and every so many of the inputs, fp32 [tokens, in]."""
    first = {group.name: stream.network.linear(group.name) for group in groups}
    kept = {name: [linear.weight.new_empty(0, linear.in_features).float()] for name, linear in first.items()}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: kept[name].append(args[0].flatten(0, -2)[::stride].float())

    with hooks([linear.register_forward_pre_hook(keep(name)) for name, linear in first.items()]):
        grams, _ = gram_matrices(stream, index, groups)
    return grams, {name: torch.cat(parts) for name, parts in kept.items()}
