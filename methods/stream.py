"""Block by block through a model, so that no block runs more often than its quantization takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.network import Group, Network, hooks

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's forward."""


class _Enough(Exception):
    """Ends a forward pass whose rest is of no interest."""


class BlockStream:
    """Hidden states on their way through the blocks, in batches.

    What else a block receives (masks, rotary embeddings) is recorded in a real forward pass, once for each
    batch size: sequences have equal length and no padding, so it does not depend on the text.

    Attributes:
        inputs: hidden states [batch, length, hidden] before the current block; at first, before block 0.
    """

    @torch.no_grad()
    def __init__(self, network: Network, tokens: Tensor, batch_size: int = 8) -> None:
        """`tokens`: int64 [sequences, length]."""
        self.network = network
        self.inputs: list[Tensor] = []
        self._rest: dict[int, list[Call]] = {}  # batch size -> what each block receives besides hidden states
        blocks = [network.module(block.name) for block in network.blocks]
        device = next(network.model.parameters()).device
        for batch in tokens.split(batch_size):
            self._capture(blocks, batch.to(device))

    def run(self, index: int) -> list[Tensor]:
        """Outputs of block `index` on the inputs; hooks of the caller see every batch."""
        block = self.network.module(self.network.blocks[index].name)
        with torch.no_grad():
            return [self.call(block, index, hidden) for hidden in self.inputs]

    def call(self, module: Callable[..., Any], index: int, hidden: Tensor) -> Tensor:
        """The output of `module` in the place of block `index`, for hidden states [batch, length, hidden].

        Differentiable. A batch must have the size of one of the stream's own.
        """
        args, kwargs = self._rest[hidden.shape[0]][index]
        return first(module(hidden, *args, **kwargs))

    def _capture(self, blocks: list[nn.Module], batch: Tensor) -> None:
        known = batch.shape[0] in self._rest
        calls: list[Call] = []

        def spy(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not calls:
                self.inputs.append(args[0] if args else kwargs["hidden_states"])
            if known:
                raise _Enough
            calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        with hooks([block.register_forward_pre_hook(spy, with_kwargs=True) for block in blocks]):
            try:
                self.network.logits(batch)
            except _Enough:
                return
        self._rest[batch.shape[0]] = calls


def first(output: Any) -> Tensor:
    """The hidden states in a module's output: attention modules and some blocks return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def gram_matrices(stream: BlockStream, index: int, groups: Sequence[Group]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gram matrices of the inputs of groups of block `index`, and the block's outputs.

    A Gram matrix is the mean over tokens of x xᵀ, fp32 [in, in], keyed by the group's name.
    """
    linears = {group.name: stream.network.linear(group.name) for group in groups}
    grams = {
        name: torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        for name, linear in linears.items()
    }

    def accumulate(gram: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            gram.addmm_(x.t(), x)

        return hook

    with hooks([linears[name].register_forward_pre_hook(accumulate(gram)) for name, gram in grams.items()]):
        outputs = stream.run(index)
    tokens = sum(hidden.shape[0] * hidden.shape[1] for hidden in stream.inputs)
    return {name: gram.div_(tokens) for name, gram in grams.items()}, outputs
