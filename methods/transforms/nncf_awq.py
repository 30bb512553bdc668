"""NNCF's variant of AWQ (openvinotoolkit/nncf, weight compression, `awq.py`): scales for the few quantization groups
that hold the most salient channels, of linears that follow another one elementwise (the down projection of an MLP).

Of every calibration sequence it keeps only the mean of the input over tokens. A channel is as salient as the largest
magnitude of its means; candidates are compared on the means of up to 32 sequences, by the mean magnitude of what the
group contributes to the output.

Differences from NNCF, which multiplies at run time where no earlier linear absorbs the scale (after a GELU): nothing
is scaled there. It also bounds scales from below so that the earlier linear's output cannot overflow fp16, by an
estimate that small scales alone exceed; here they are bounded by a constant. Inputs of experts have no sequences:
the mean of a batch takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Context
from methods.formats.base import Format
from methods.network import Group, Network, hooks
from methods.stream import BlockStream
from methods.transforms.base import TRANSFORMS, Folds, Transform

BACKUP_WIDTH = 8
SMALLEST, LARGEST = 1e-4, 1e2  # bounds of salience; the first is not NNCF's
QUANTILE = 0.1


@TRANSFORMS.register("nncf_awq")
@dataclass(frozen=True)
class NNCFAWQ(Transform):
    """Scales x̄^α for the groups with the most salient channels, and 1 for the rest.

    Linears in 8 bits, NNCF's backup, are not scaled.

    Args:
        share: of the input's channels that count as most salient; at least one does.
        steps: candidates for α, from 0 to just below 1.
        search_sequences: calibration sequences on which candidates are compared.
    """

    share: float = 0.002
    steps: int = 100
    search_sequences: int = 32

    @torch.no_grad()
    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        network, folds = ctx.network, Folds()
        groups = [g for g in network.groups if follows_elementwise(network, g) and plan[g.name].bits < BACKUP_WIDTH]
        for group, means in sequence_means(ctx, groups).items():
            salience = means.abs().amax(0)
            if salience.any():  # an expert without tokens stays as it is
                chosen = means[:: max(1, len(means) // self.search_sequences)]
                weights = {name: network.weight(name) for name in group.linears}
                folds.fold(network, group, self._scale(weights, plan, salience, chosen))
        return folds

    def _scale(
        self, weights: Mapping[str, Tensor], plan: Mapping[str, Format], salience: Tensor, means: Tensor
    ) -> Tensor:
        """The scale [in] of linears with a common input."""
        name, weight = next(iter(weights.items()))
        size = plan[name].fit(weight).group_size
        scale = torch.ones_like(salience)
        count = max(int(self.share * len(salience)), 1)
        for group in (salience.topk(count).indices // size).unique().tolist():
            part = slice(group * size, (group + 1) * size)
            slices = {n: w[:, part] for n, w in weights.items()}
            scale[part] = search_scale(slices, plan, salience[part], means[:, part], self.steps)
        return scale


def search_scale(
    weights: Mapping[str, Tensor], plan: Mapping[str, Format], salience: Tensor, means: Tensor, steps: int
) -> Tensor:
    """The scale [columns] of one quantization group under which linears lose least, among powers of the salience.

    Args:
        weights: linear name to its columns of the group, [out, columns].
        salience: of these channels, [columns].
        means: inputs [samples, columns].
        steps: candidates; the first is the scale 1.
    """
    bounded = salience.clamp(min=max(float(salience.quantile(QUANTILE)), SMALLEST)).clamp(max=LARGEST)
    candidates = [bounded.pow(step / steps) for step in range(steps)]
    losses = torch.stack([_loss(weights, plan, scale, means) for scale in candidates])
    return candidates[int(losses.argmin())]


def _loss(weights: Mapping[str, Tensor], plan: Mapping[str, Format], scale: Tensor, means: Tensor) -> Tensor:
    """Sum over linears of the mean magnitude of the output's error."""
    deltas = {name: plan[name].fit(w * scale).snap(w * scale) / scale - w for name, w in weights.items()}
    return torch.stack([(means @ delta.t()).abs().mean() for delta in deltas.values()]).sum()


def follows_elementwise(network: Network, group: Group) -> bool:
    """Whether the group's input is another linear's output, times or through something elementwise.

    The output projection follows the values through attention, and does not count. Queries, keys and values are the
    only three or more linears with a common input.
    """
    producer = network.group_of.get(group.producer or "")
    return producer is not None and len(producer.linears) < 3


def sequence_means(ctx: Context, groups: list[Group]) -> dict[Group, Tensor]:
    """The mean input over the tokens of each calibration sequence, of the groups that get tokens: [sequences, in]."""
    found: dict[Group, list[Tensor]] = {group: [] for group in groups}

    def watch(group: Group) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].numel():
                found[group].append(args[0].float().mean(-2).reshape(-1, args[0].shape[-1]))

        return hook

    stream = BlockStream(ctx.network, ctx.tokens)
    with hooks([ctx.network.linear(g.name).register_forward_pre_hook(watch(g)) for g in groups]):
        for index in range(len(ctx.network.blocks)):
            stream.inputs = stream.run(index)
    return {group: torch.cat(means) for group, means in found.items() if means}
