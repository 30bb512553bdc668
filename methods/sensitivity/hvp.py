"""Exact products of the loss's Hessian with vectors, without ever forming it.

The gradient g of the loss is differentiated once more: Hv = ∂(gᵀv)/∂W (Pearlmutter, 1994). The graph of g is
built once for a batch of text and serves any number of products; autograd visits only what lies between the
linears asked for and the loss, so a product for a late block is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.network import Network

Product: TypeAlias = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Linear names to vectors, shaped like the weights, in; the same names to Hv, shaped likewise, out."""


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
    weights = {name: network.linear(name).weight for name in linears}
    _check(weights, tokens)
    with ExitStack() as stack:
        stack.enter_context(network.eager_attention())
        stack.enter_context(_differentiable(network.model, weights))
        stack.enter_context(torch.enable_grad())
        slopes = torch.autograd.grad(mean_loss(network, tokens), list(weights.values()), create_graph=True)
        gradients = dict(zip(weights, slopes, strict=True))

        def product(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            products = torch.autograd.grad(
                [gradients[name] for name in vectors],
                [weights[name] for name in vectors],
                list(vectors.values()),
                retain_graph=True,
            )
            return dict(zip(vectors, products, strict=True))

        stack.callback(gradients.clear)  # frees the graph even while the caller still holds `product`
        yield product


def probe(like: Tensor, generator: torch.Generator) -> Tensor:
    """A Rademacher vector, ±1 with equal probability, of the shape, dtype and device of `like`."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return signs.mul_(2).sub_(1).to(like)


def _check(weights: Mapping[str, Tensor], tokens: Tensor) -> None:
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(f"second derivatives need fp32, and {name} is in {weight.dtype}; load the model in fp32")
    if tokens.shape[1] < 2:
        raise ValueError("the loss is that of the next token; give sequences of at least 2 tokens")


@contextmanager
def _differentiable(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluation mode, and gradients for these weights alone."""
    training = model.training
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        yield
    finally:
        model.train(training)
        for parameter, required in before:
            parameter.requires_grad_(required)
