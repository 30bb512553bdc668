"""Exact products of the loss's Hessian with vectors, without ever forming it.

The gradient g of the loss is differentiated once more: Hv = ∂(gᵀv)/∂W (Pearlmutter, 1994). The graph of g is
built once for a batch of text and serves any number of products; autograd visits only what lies between the
linears asked for and the loss, so a product for a late block is cheap. Where the graph does not fit into memory,
`methods.sensitivity.blockwise` gives the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.network import Network, frozen

Product: TypeAlias = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Linear names to vectors, shaped like the weights, in; the same names to Hv, shaped likewise, out."""

Operator: TypeAlias = Callable[[Tensor], Tensor]
"""Multiplies tensors of one shape by a symmetric matrix, each tensor read as one vector."""


def mean_loss(network: Network, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, in nats, over `tokens`, int64 [sequences, length]."""
    logits = network.logits(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@contextmanager
def hessian(network: Network, tokens: Tensor, linears: Sequence[str]) -> Iterator[Product]:
    """The Hessian of `mean_loss` over one batch, int64 [sequences, length], in the weights of `linears`.

    `product(vectors)` multiplies the part of it that belongs to the linears in `vectors`: a single name
    means this linear's diagonal block, several mean their blocks and all cross terms between them.

    While the context is open, the model is in evaluation mode with eager attention (fused attention has no
    second derivative) and its memory holds the differentiable gradient; all is restored afterwards.

    Raises:
        ValueError: weights that are not in fp32, or sequences without a next token.
    """
    with differentiable(network, tokens, linears) as weights:
        slopes = torch.autograd.grad(mean_loss(network, tokens), list(weights.values()), create_graph=True)
        gradients = dict(zip(weights, slopes, strict=True))
        del slopes

        def product(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            products = torch.autograd.grad(
                [gradients[name] for name in vectors],
                [weights[name] for name in vectors],
                list(vectors.values()),
                retain_graph=True,
            )
            return dict(zip(vectors, products, strict=True))

        try:
            yield product
        finally:
            gradients.clear()  # frees the graph even while the caller still holds `product`


def diagonal_block(product: Product, linear: str) -> Operator:
    """The Hessian's diagonal block of one linear."""
    return lambda vector: product({linear: vector})[linear]


def probe(like: Tensor, generator: torch.Generator) -> Tensor:
    """A Rademacher vector, ±1 with equal probability, of the shape, dtype and device of `like`."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return signs.mul_(2).sub_(1).to(like)


@contextmanager
def differentiable(network: Network, tokens: Tensor, linears: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Until the end, the loss over `tokens` can be differentiated twice: evaluation mode, eager attention, and
    gradients for the weights of `linears` alone, which it gives by name.

    Raises:
        ValueError: weights that are not in fp32, or sequences without a next token.
    """
    _check(network, tokens)
    weights: dict[str, Tensor] = {name: network.linear(name).weight for name in linears}
    with ExitStack() as stack:
        stack.enter_context(network.eager_attention())
        stack.enter_context(_gradients_for(network.model, weights))
        stack.enter_context(torch.enable_grad())
        yield weights


def _check(network: Network, tokens: Tensor) -> None:
    for name in network.linears:
        dtype = network.linear(name).weight.dtype
        if dtype != torch.float32:
            raise ValueError(
                f"second derivatives need fp32, and {name} is in {dtype}; load the model in fp32, or take a "
                "metric of first derivatives such as gauss_newton"
            )
    if tokens.shape[1] < 2:
        raise ValueError("the loss is that of the next token; give sequences of at least 2 tokens")


@contextmanager
def _gradients_for(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluation mode, and gradients for these weights alone."""
    with frozen(model):
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
