"""Calibration statistics: one pass of the calibration text through the full-precision model.

Linears that share an input share a statistic, so statistics are kept per group, under the group's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Stat, Tracker, no_tracker
from methods.network import Network, hooks

Collected = dict[Stat, dict[str, Tensor]]
"""Statistic to group name to tensor."""


class Accumulator(ABC):
    """One statistic of one group's input, accumulated in fp32 on the input's device."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.total = self.zeros(columns, device)

    def add(self, x: Tensor) -> None:
        """Take in x, fp32 [tokens, in]."""
        self.tokens += len(x)
        self.update(x)

    def result(self) -> Tensor:
        """The mean over tokens. Zero if none came: an expert to which no token was routed."""
        return self.total / max(self.tokens, 1)

    def zeros(self, columns: int, device: torch.device) -> Tensor:
        """The accumulator's initial value."""
        return torch.zeros(columns, device=device)

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add x, fp32 [tokens, in], to `total`."""


class Gram(Accumulator):
    """Mean of x xᵀ: [in, in]. The Hessian of a linear's squared output error is twice this, in every row."""

    def zeros(self, columns: int, device: torch.device) -> Tensor:
        return torch.zeros(columns, columns, device=device)

    def update(self, x: Tensor) -> None:
        self.total.addmm_(x.T, x)


class MeanAbs(Accumulator):
    """Mean of |x|: [in]."""

    def update(self, x: Tensor) -> None:
        self.total += x.abs().sum(0)


class Mean(Accumulator):
    """Mean of x: [in]."""

    def update(self, x: Tensor) -> None:
        self.total += x.sum(0)


class MeanSquare(Accumulator):
    """Mean of x²: [in]."""

    def update(self, x: Tensor) -> None:
        self.total += x.square().sum(0)


class MaxAbs(Accumulator):
    """Maximum of |x|: [in]."""

    def update(self, x: Tensor) -> None:
        if len(x):
            torch.maximum(self.total, x.abs().amax(0), out=self.total)

    def result(self) -> Tensor:
        return self.total


ACCUMULATORS: dict[Stat, type[Accumulator]] = {
    Stat.GRAM: Gram,
    Stat.MEAN_ABS: MeanAbs,
    Stat.MAX_ABS: MaxAbs,
    Stat.MEAN: Mean,
    Stat.MEAN_SQUARE: MeanSquare,
}


class _LastBlockReached(Exception):
    """Ends a forward pass: what follows the blocks holds no linear to quantize, and the head is large."""


@torch.no_grad()
def collect(
    network: Network,
    tokens: Tensor,
    stats: frozenset[Stat],
    track: Tracker = no_tracker,
    batch_size: int = 8,
) -> Collected:
    """Run `tokens`, int64 [sequences, length], through the network and collect `stats` of every group's input.

    Sums are in fp32, whatever the model's dtype. Memory beyond the model: the statistics themselves (GRAM takes
    4·in² bytes a group) and the activations of `batch_size` sequences in one layer.
    """
    device = next(network.model.parameters()).device
    accumulators: dict[Stat, dict[str, Accumulator]] = {
        stat: {g.name: ACCUMULATORS[stat](network.shape(g.name)[1], device) for g in network.groups}
        for stat in sorted(stats)
    }

    def observe(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            x = args[0].flatten(0, -2).float()  # [tokens, in]
            for by_group in accumulators.values():
                by_group[name].add(x)

        return hook

    def stop(*_: object) -> None:
        raise _LastBlockReached

    handles = [network.module(g.name).register_forward_pre_hook(observe(g.name)) for g in network.groups]
    handles.append(network.module(network.blocks[-1].name).register_forward_hook(stop))
    with hooks(handles):
        for batch in track(tokens.split(batch_size), "calibration"):
            try:
                network.logits(batch.to(device))
            except _LastBlockReached:
                continue
    return {stat: {g: a.result() for g, a in by_group.items()} for stat, by_group in accumulators.items()}


@dataclass(frozen=True)
class GroupStatistics:
    """The `Statistics` of `methods.base`: looks a linear's group up."""

    network: Network
    collected: Mapping[Stat, Mapping[str, Tensor]]

    def __call__(self, stat: Stat, linear: str) -> Tensor:
        if stat not in self.collected:
            raise KeyError(f"{stat.value} was not collected; a method lists the statistics it reads in `needs`")
        return self.collected[stat][self.network.group_of[linear].name]


def as_statistics(network: Network, collected: Mapping[Stat, Mapping[str, Tensor]]) -> GroupStatistics:
    """What `collect` returned, for any linear of a group."""
    return GroupStatistics(network, collected)
