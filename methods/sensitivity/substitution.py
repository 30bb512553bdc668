"""The network with one linear rounded and all others as they are, without running what the change cannot reach.

Nothing before the block of the changed linear notices the change. One full pass records what every block returns;
afterwards the blocks before the changed one answer from this record, at no cost, and embedding, norm and head run
as the model itself runs them, so that no model needs to be known by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from methods.network import Network, hooks
from methods.sensitivity.base import Metric, Sensitivity, Subject, entry

Comparison: TypeAlias = Callable[[Tensor], Tensor]
"""Logits [batch, length, vocab] of the changed network, to what the change costs each sequence: [batch]."""


class Replay:
    """One batch of text, again and again, each time with another weight in one linear.

    Memory: what every block returns for the batch, and the logits.

    Attributes:
        reference: logits [batch, length, vocab] of the unchanged network.
        blocks_run: blocks that were really run, in all passes together.
    """

    @torch.no_grad()
    def __init__(self, network: Network, tokens: Tensor) -> None:
        """`tokens`: int64 [batch, length], on the model's device."""
        self.network, self.tokens = network, tokens
        self._blocks = [network.module(block.name) for block in network.blocks]
        self._block_of = {
            linear: index
            for index, block in enumerate(network.blocks)
            for group in block.groups
            for linear in group.linears
        }
        self._outputs: list[Any] = []  # as the blocks return them: tensors or tuples

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del module, args
            self._outputs.append(output)

        with hooks([block.register_forward_hook(record) for block in self._blocks]):
            self.reference = network.logits(tokens)
        self.blocks_run = len(self._blocks)

    @torch.no_grad()
    def logits(self, linear: str, weight: Tensor) -> Tensor:
        """Logits [batch, length, vocab] with `weight` [out, in], of any dtype, in one linear.

        The linear has its own weight again afterwards, even if the pass fails. A weight that does not change (a
        format of full precision) takes no pass.
        """
        index = self._block_of[linear]
        with substituted(self.network, linear, weight) as changed:
            if not changed:
                return self.reference
            self.blocks_run += len(self._blocks) - index
            with _answering(self._blocks[:index], self._outputs):
                return self.network.logits(self.tokens)


@dataclass(frozen=True)
class Substitution(Metric):
    """What the network suffers when one linear alone is rounded to nearest: the mean over sequences, with the
    standard error of that mean.

    Where linears share a format, the loss of the group is taken to be the sum of theirs.

    Args:
        sequences: sequences of the text, at most.
        context: tokens used of each sequence, from its beginning.
        batch: sequences in one pass; affects speed and memory only.
    """

    sequences: int = 8
    context: int = 128
    batch: int = 4

    per_format: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sequences < 2 or self.context < 2 or self.batch < 1:
            raise ValueError(
                f"{self.name} predicts next tokens and compares sequences: it needs sequences and context of at "
                f"least 2 and a batch of at least 1, not {self.sequences}, {self.context} and {self.batch}"
            )

    @abstractmethod
    def against(self, reference: Tensor, tokens: Tensor) -> Comparison:
        """How to compare with the unchanged network, whose logits on `tokens` [batch, length] are given."""

    def __call__(self, subject: Subject) -> Sensitivity:
        """`cost.passes` counts a pass by the share of blocks that it runs.

        Raises:
            ValueError: the text has fewer than 2 sequences, or sequences of fewer than 2 tokens.
        """
        tokens = subject.tokens[: self.sequences, : self.context]
        if min(tokens.shape) < 2:
            raise ValueError(
                f"{self.name} needs at least 2 sequences of 2 tokens, and the text has {tuple(tokens.shape)}; "
                "give more scoring text"
            )
        with subject.cost() as cost:
            samples, blocks_run = self._samples(subject, tokens)
            cost.passes += -(-blocks_run // len(subject.network.blocks))
        values = {key: fmean(drawn) for key, drawn in samples.items()}
        error = {key: stdev(drawn) / len(drawn) ** 0.5 for key, drawn in samples.items()}
        return Sensitivity(values, error, cost)

    def _samples(self, subject: Subject, tokens: Tensor) -> tuple[Mapping[str, list[float]], int]:
        """Entry to what each sequence suffers; and the blocks run."""
        network = subject.network
        # Numbers rather than tensors: many small ones, kept between large ones that are freed, fragment the memory.
        samples: defaultdict[str, list[float]] = defaultdict(list)
        blocks_run = 0
        # Text outside, linears inside: only one batch's hidden states and logits are in memory. Rounding a weight
        # anew for every batch costs little beside a pass.
        for batch in tokens.to(next(network.model.parameters()).device).split(self.batch):
            replay = Replay(network, batch)
            compare = self.against(replay.reference, batch)
            for name, fmt in product(network.linears, subject.formats):
                weight = network.weight(name)
                samples[entry(name, fmt)] += compare(replay.logits(name, fmt.fit(weight).snap(weight))).tolist()
            blocks_run += replay.blocks_run
        return samples, blocks_run


@contextmanager
def substituted(network: Network, linear: str, weight: Tensor) -> Iterator[bool]:
    """Another weight in a linear, for a while. Yields whether it differs from the linear's own, in its dtype."""
    own = network.linear(linear).weight
    saved = own.detach().clone()
    try:
        network.overwrite(linear, weight)
        yield not torch.equal(own, saved)
    finally:
        network.overwrite(linear, saved)


@contextmanager
def _answering(modules: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Modules that return an output given to them, one each, instead of computing it. Further outputs are ignored."""
    before = [vars(module).get("forward") for module in modules]  # rarely: somebody else has replaced it too
    try:
        for module, output in zip(modules, outputs, strict=False):
            module.forward = _constant(output)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output
