"""Sensitivity to rounding activations: HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852).

With x [tokens, in] the input of a linear over one sequence, rounding it to b bits is charged
Ω(b) = tr(∂²loss/∂x²)/n · ‖Q_b(x) − x‖², n = tokens · in, both factors averaged over sequences. The Hessian of a batch
would consist of one block a sequence, so it is never formed. Linears of a group read the same x: theirs is one
Hessian, and one charge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.activations import round_tokens
from methods.network import Group, Network, hooks
from methods.sensitivity.base import Sensitivity, Subject
from methods.sensitivity.hutchinson import check_probes, estimate
from methods.sensitivity.hvp import Product, differentiable, mean_loss, probe


@dataclass(frozen=True)
class ActivationTrace:
    """tr ∂²loss/∂x² / n in the input x of every group, by Hutchinson's estimator.

    Each probe is drawn together with the next sequence of the text, whose loss is the mean over its tokens. Stops as
    `Hutchinson` does.

    Args:
        tolerance: relative standard error to reach.
        max_probes: probes after which a group is left as it is.
        context: tokens used of each sequence, from its beginning.
    """

    tolerance: float = 0.15
    max_probes: int = 32
    context: int = 128

    def __post_init__(self) -> None:
        check_probes(self.tolerance, self.max_probes)

    def measure(self, subject: Subject) -> Sensitivity:
        """Average traces and their standard errors, by the groups' names; recalled where they are known."""
        return Sensitivity.from_tensors(
            subject.recall("activation_trace", asdict(self), lambda: self._traces(subject).tensors(), self)
        )

    def _traces(self, subject: Subject) -> Sensitivity:
        network, generator = subject.network, subject.generator()
        texts = _texts(subject, self.context)

        def draw(index: int, names: Sequence[str]) -> Iterable[tuple[str, float]]:
            groups = [network.group_of[name] for name in names]
            with input_hessian(network, texts[index % len(texts)].unsqueeze(0), groups) as (inputs, product):
                for name in names:
                    z = probe(inputs[name], generator)
                    yield name, float(torch.sum(z * product({name: z})[name])) / z.numel()

        with subject.cost() as cost:
            names = [group.name for group in network.groups]
            values, error = estimate(names, draw, self.tolerance, self.max_probes, cost)
        return Sensitivity(values, error, cost)


def activation_losses(
    subject: Subject, widths: Sequence[int], trace: ActivationTrace | None = None
) -> dict[str, dict[int, float]]:
    """Linear name to width in bits to Ω of its input in that width, rounded dynamically and symmetrically a token.

    Every linear of a group carries an equal share of the group's charge: the shares add up to it, and none is free
    where linears choose for themselves.
    """
    trace = trace or ActivationTrace()
    average = trace.measure(subject).values
    errors = squared_errors(subject, widths, trace.context)
    return {
        name: {width: average[group.name] * error / len(group.linears) for width, error in errors[group.name].items()}
        for name, group in subject.network.group_of.items()
    }


def squared_errors(subject: Subject, widths: Sequence[int], context: int) -> dict[str, dict[int, float]]:
    """Group name to width to ‖Q(x) − x‖², the mean over sequences; recalled where it is known.

    `context`: tokens used of each sequence, from its beginning.
    """
    options = {"widths": list(widths), "context": context}
    rows = subject.recall(
        "activation_errors", options, lambda: _squared_errors(subject, widths, context), ActivationTrace
    )
    return {name: dict(zip(widths, row.tolist(), strict=True)) for name, row in rows.items()}


@contextmanager
def input_hessian(
    network: Network, tokens: Tensor, groups: Sequence[Group]
) -> Iterator[tuple[dict[str, Tensor], Product]]:
    """The inputs of groups, and the Hessian of `mean_loss` over one batch in them; both by the groups' names.

    Inputs are [sequences, length, in] and so are vectors. Otherwise as `methods.sensitivity.hvp.hessian`: a single
    name means the Hessian's diagonal block of this input, with all that precedes it held fixed.
    """
    with differentiable(network, tokens, []):
        inputs: dict[str, Tensor] = {}
        spies = [
            network.linear(name).register_forward_pre_hook(_share(group.name, inputs))
            for group in groups
            for name in group.linears
        ]
        with hooks(spies):
            loss = mean_loss(network, tokens)
        slopes = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
        gradients = dict(zip(inputs, slopes, strict=True))
        del loss, slopes

        def product(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            asked = [inputs[name] for name in vectors]
            slopes = [gradients[name] for name in vectors]
            return dict(
                zip(vectors, torch.autograd.grad(slopes, asked, [*vectors.values()], retain_graph=True), strict=True)
            )

        try:
            yield inputs, product
        finally:
            inputs.clear()  # frees the graph even while the caller still holds `product`
            gradients.clear()


def _share(group: str, inputs: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that lets all linears of a group read one tensor that gradients reach."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if group not in inputs:
            inputs[group] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
        return inputs[group], *args[1:]

    return hook


@torch.no_grad()
def _squared_errors(subject: Subject, widths: Sequence[int], context: int) -> dict[str, Tensor]:
    """Group name to squared errors: fp64 [widths]."""
    network, texts = subject.network, _texts(subject, context)
    sums = {group.name: torch.zeros(len(widths), dtype=torch.float64) for group in network.groups}

    def add(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].float()
            sums[name] += torch.stack([(round_tokens(x, width) - x).square().sum() for width in widths]).double().cpu()

        return hook

    with hooks([network.linear(name).register_forward_pre_hook(add(name)) for name in sums]):
        for text in texts:
            network.logits(text.unsqueeze(0))
    return {name: total / len(texts) for name, total in sums.items()}


def _texts(subject: Subject, context: int) -> Tensor:
    return subject.tokens[:, :context].to(next(subject.network.model.parameters()).device)
