"""Exact Hessian-vector products in the memory of one block.

`methods.sensitivity.hvp` keeps the twice differentiable graph of the whole model. Here the loss is a chain
h₁ = F₀(h₀, W₀), h₂ = F₁(h₁, W₁), …, and each link is differentiated by itself. Let gⱼ be the gradient of the loss in
hⱼ. A step (dWⱼ) of the weights moves the hidden states by dhⱼ and the gradients by dgⱼ, and with
sⱼ = ⟨Jⱼᵀ gⱼ₊₁, (dhⱼ, dWⱼ)⟩, where Jⱼ is the Jacobian of Fⱼ in (hⱼ, Wⱼ),

    dhⱼ₊₁ = ∂sⱼ/∂gⱼ₊₁                        (forwards through the blocks)
    dgⱼ   = ∂sⱼ/∂hⱼ + (∂Fⱼ/∂hⱼ)ᵀ dgⱼ₊₁       (backwards)
    Hv    = ∂sⱼ/∂Wⱼ + (∂Fⱼ/∂Wⱼ)ᵀ dgⱼ₊₁.

As s is linear in g, the first line is a forward-mode derivative taken in reverse mode, for which some operators lack
the other kind. And since hⱼ and gⱼ do not depend on the step, they are computed once for a batch, and one double
backward in each block on the way forwards gives all derivatives of s. The way back is an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from methods.network import Network, hooks
from methods.sensitivity.hvp import Product, differentiable, hessian, mean_loss
from methods.stream import Call, first


def open_hessian(
    network: Network, tokens: Tensor, linears: Sequence[str], blockwise: bool
) -> AbstractContextManager[Product]:
    """`blockwise_hessian` or `hessian`: less memory or less time."""
    return (blockwise_hessian if blockwise else hessian)(network, tokens, linears)


@contextmanager
def blockwise_hessian(network: Network, tokens: Tensor, linears: Sequence[str]) -> Iterator[Product]:
    """The same as `hvp.hessian`, product for product, with at most one block's graph in memory.

    Opening takes one forward and one backward pass, a product two forward passes, a backward and a double
    backward pass, all from the first block asked for on. Held meanwhile are the hidden states at the block
    boundaries, [sequences, length, hidden] each, and their gradients; during a product as much again. What follows
    the last block (norm, head and loss) counts as one more block. Blocks may lie on different devices. Whatever else
    a block receives must not depend on the weights of `linears`; masks and rotary embeddings do not.

    Raises:
        ValueError: weights that are not in fp32, or sequences without a next token.
    """
    with differentiable(network, tokens, linears) as weights:
        chain = _Chain(network, tokens, weights)
        try:
            yield chain.product
        finally:
            chain.close()


@dataclass
class _Link:
    """A block, and where the batch leaves it.

    Attributes:
        call: what the block receives besides hidden states.
        hidden: its input hⱼ [sequences, length, hidden].
        slope: the gradient of the loss in its output, gⱼ₊₁ [sequences, length, hidden].
    """

    block: nn.Module
    call: Call
    hidden: Tensor
    slope: Tensor = field(init=False)

    def output(self, hidden: Tensor) -> Tensor:
        args, kwargs = self.call
        return first(self.block(hidden, *args, **kwargs))

    def backward(self, slope: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Jᵀ times `slope`: the part of the hidden states, then those of the weights."""
        hidden = self.hidden.detach().requires_grad_(True)
        return torch.autograd.grad(self.output(hidden), [hidden, *weights], slope.to(hidden.device))

    def forward(self, tangent: Tensor | None, weights: Sequence[Tensor], steps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The derivatives of s in the slope, the hidden states and the weights.

        `tangent` is dh, None where it is zero; the derivative in the hidden states is then left out.
        """
        hidden, slope = self.hidden.detach(), self.slope.detach().requires_grad_(True)
        arguments, directions = [*weights], [*steps]
        if tangent is not None:
            arguments.insert(0, hidden.requires_grad_(True))
            directions.insert(0, tangent.to(hidden.device))
        pulled = torch.autograd.grad(self.output(hidden), arguments, slope, create_graph=True)
        # Materialized, because a part that is linear in its arguments has no second derivative.
        return torch.autograd.grad(pulled, [slope, *arguments], directions, allow_unused=True, materialize_grads=True)


class _Chain:
    """The model over one batch, from the first block asked for on."""

    def __init__(self, network: Network, tokens: Tensor, weights: Mapping[str, Tensor]) -> None:
        self.network, self.tokens, self.weights = network, tokens, weights
        self.blocks = [network.module(block.name) for block in network.blocks]
        position = {
            name: index
            for index, block in enumerate(network.blocks)
            for group in block.groups
            for name in group.linears
            if name in weights
        }
        start = min(position.values())
        self.link_of = {name: index - start for name, index in position.items()}
        self.links, self.last = self._links(start)
        slope = self._head(None)
        for link in reversed(self.links):
            link.slope = slope.to(link.hidden.device)
            (slope,) = link.backward(slope, [])

    def product(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `hvp.hessian`."""
        start = min(self.link_of[name] for name in vectors)
        names = [[n for n in vectors if self.link_of[n] == index] for index in range(len(self.links))]
        tangent: Tensor | None = None
        bends: list[Tensor] = []  # ∂s/∂h of the links after `start`
        products: dict[str, Tensor] = {}
        for link, asked in list(zip(self.links, names, strict=True))[start:]:
            weights, steps = [self.weights[n] for n in asked], [vectors[n] for n in asked]
            moved, *curved = link.forward(tangent, weights, steps)
            if tangent is not None:
                bends.append(curved.pop(0))
            products |= zip(asked, curved, strict=True)
            tangent = moved
        slope = self._head(tangent)
        for index in reversed(range(start, len(self.links))):
            passed, *parts = self.links[index].backward(slope, [self.weights[n] for n in names[index]])
            for name, part in zip(names[index], parts, strict=True):
                products[name] = products[name] + part
            if bends:
                slope = passed + bends.pop()
        return {name: products[name] for name in vectors}

    def close(self) -> None:
        """Forget the batch, even while someone still holds `product`."""
        self.links.clear()
        self.link_of.clear()

    def _links(self, start: int) -> tuple[list[_Link], Any]:
        """Run the model once: what goes into each block from `start` on, and what the last returns."""
        links: list[_Link] = []
        last: list[Any] = []

        def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            links.append(_Link(block, (args[1:], rest), hidden.to(next(block.parameters()).device)))

        def keep_last(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del block, args
            last.append(output)

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self.blocks[start:]]
        with hooks([*handles, self.blocks[-1].register_forward_hook(keep_last)]), torch.no_grad():
            self.network.logits(self.tokens)
        return links, last[0]

    def _head(self, tangent: Tensor | None) -> Tensor:
        """The gradient of the loss in the last block's output; or, given dh there, how it changes: dg."""
        hidden = first(self.last).detach().requires_grad_(True)
        output = (hidden, *self.last[1:]) if isinstance(self.last, tuple) else hidden
        with _returning(self.blocks, output):
            loss = mean_loss(self.network, self.tokens)
        (slope,) = torch.autograd.grad(loss, hidden, create_graph=tangent is not None)
        if tangent is None:
            return slope
        return torch.autograd.grad(slope, hidden, tangent.to(hidden.device))[0]


@contextmanager
def _returning(modules: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """The modules return `output` at once, whatever they are called with.

    Their `forward` is replaced, because hooks can change what a module returns but not keep it from running.
    """
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        vars(module)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward
