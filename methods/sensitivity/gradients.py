"""First-order gradients: one forward and one backward pass over a sequence shows every linear's inputs and the
gradients of its outputs.

The gradient of a weight is gᵀx. Autograd never forms it: parameters are frozen, and what a metric needs of gᵀx is
computed from x and g as soon as the backward pass reaches the linear, after which both are freed. Until then the
inputs of all linears are in memory, those of one sequence at a time.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from math import isfinite
from statistics import fmean, stdev
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.formats.base import Format
from methods.network import Network, frozen, hooks
from methods.sensitivity.base import Cost, Sensitivity, Subject, entry

log = logging.getLogger(__name__)

ROOM = 2**31  # bytes of rounding errors to keep; the rest is computed anew for every sequence

Visit: TypeAlias = Callable[[str, Tensor, Tensor], None]
"""Takes a linear's name, its inputs x [rows, in] and the gradients g [rows, out] of its outputs: fp32, on one
device. Rows are the positions of a sequence, or those of them that an expert was given."""

Price: TypeAlias = Callable[[Tensor], Tensor]
"""What adding a matrix [out, in] to a linear's weight costs: a scalar."""


def propagate(network: Network, text: Tensor, visit: Visit, generator: torch.Generator | None = None) -> None:
    """One forward and one backward pass over `text`, int64 [length]; visits the linears from the last to the first.

    The gradients are those of Σₜ lₜ, the sum over the length − 1 predicted tokens of the negative log-likelihood,
    in nats, of the text's next token; or, given a generator, of a token drawn from the model's own prediction.
    Linears on which the loss does not depend (experts without a token) are not visited. The model runs in
    evaluation mode; it is restored afterwards.
    """
    calls = _Calls(visit)
    with ExitStack() as stack:
        stack.enter_context(frozen(network.model))
        handles = [network.linear(n).register_forward_hook(calls.watch(n), with_kwargs=True) for n in network.linears]
        stack.enter_context(hooks(handles))
        stack.enter_context(torch.enable_grad())
        tokens = text.to(next(network.model.parameters()).device).unsqueeze(0)
        logits = network.logits(tokens)[0, :-1].float()
        labels = text[1:] if generator is None else draw(logits.detach(), generator)
        loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        torch.autograd.grad(loss, calls.starts, allow_unused=True)
        calls.flush()


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each row's softmax: int64 [rows], of logits fp32 [rows, vocabulary].

    By inversion, so that a generator on the CPU serves logits anywhere: only a number a row changes device.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return tokens.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """‖gᵀx‖² of x [rows, in] and g [rows, out], by whichever order of multiplication is cheaper."""
    rows, columns, out = len(x), x.shape[1], g.shape[1]
    if rows * (columns + out) < columns * out:
        return torch.sum((x @ x.T) * (g @ g.T))
    return (g.T @ x).square().sum()


def squared_norms(network: Network, text: Tensor, generator: torch.Generator | None = None) -> dict[str, float]:
    """‖∂(Σₜ lₜ)/∂W‖² / (length − 1) of every linear that `propagate` visits."""
    found: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        found[name] = squared_norm(x, g)

    propagate(network, text, visit, generator)
    return {name: float(value) / (len(text) - 1) for name, value in found.items()}


def format_losses(
    subject: Subject,
    texts: Iterable[Tensor],
    pricing: Callable[[str, Tensor, Tensor], Price],
    cost: Cost,
    generator: torch.Generator | None = None,
) -> Samples:
    """For every sequence, what rounding each linear to each format costs: `pricing(linear, x, g)(Q(W) − W)`."""
    errors = RoundingErrors(subject)
    samples = Samples(entry(name, fmt) for name in subject.network.linears for fmt in subject.formats)
    for text in texts:
        found: dict[str, Tensor] = {}

        def visit(name: str, x: Tensor, g: Tensor, found: dict[str, Tensor] = found) -> None:
            price = pricing(name, x, g)
            for fmt in subject.formats:
                found[entry(name, fmt)] = price(errors(name, fmt))

        propagate(subject.network, text, visit, generator)
        samples.add({key: float(value) for key, value in found.items()})
        cost.passes += 2
    return samples


def sequences(subject: Subject, count: int, context: int) -> Tensor:
    """The first `count` sequences of the text, cut to `context` tokens: int64 [sequences, length].

    Raises:
        ValueError: fewer than 2 sequences, which have no standard error, or than 2 tokens.
    """
    texts = subject.tokens[:count, :context]
    if min(texts.shape) < 2:
        raise ValueError(
            f"gradients need at least 2 sequences of at least 2 tokens, not {texts.shape[0]} of {texts.shape[1]}; "
            "give more text, or raise the metric's options"
        )
    return texts


class RoundingErrors:
    """Q(W) − W of every linear in every format, kept while they fit into `room` bytes.

    What was kept first stays: every sequence asks for all of them in the same order, and would evict all of them.
    """

    def __init__(self, subject: Subject, room: int = ROOM) -> None:
        self._subject, self._room = subject, room
        self._kept: dict[tuple[str, Format], Tensor] = {}

    def __call__(self, linear: str, fmt: Format) -> Tensor:
        """fp32 [out, in]."""
        kept = self._kept.get((linear, fmt))
        if kept is not None:
            return kept
        error = self._subject.delta(linear, fmt)
        if error.nbytes <= self._room:
            self._room -= error.nbytes
            self._kept[linear, fmt] = error
        return error


class Samples:
    """A number a sequence for every key; 0 where a sequence gives none, as of an expert that saw none of it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._numbers: dict[str, list[float]] = {key: [] for key in keys}
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(next(iter(self._numbers.values())))

    def add(self, numbers: Mapping[str, float]) -> None:
        """The numbers of one more sequence.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        for key, number in numbers.items():
            if not isfinite(number):
                raise FloatingPointError(f"gradients of {key} are not finite; load the model in fp32")
        self._seen.update(numbers)
        for key, drawn in self._numbers.items():
            drawn.append(numbers.get(key, 0.0))

    def means(self) -> dict[str, float]:
        return {key: fmean(drawn) for key, drawn in self._numbers.items()}

    def errors(self) -> dict[str, float]:
        """Standard errors of the means, over sequences."""
        return {key: stdev(drawn) / len(drawn) ** 0.5 for key, drawn in self._numbers.items()}

    def result(self, cost: Cost, scale: float = 1.0) -> Sensitivity:
        """Means and their errors, times `scale`; reports keys that no sequence gave a number."""
        report_unseen(self._numbers.keys() - self._seen)
        values = {key: scale * mean for key, mean in self.means().items()}
        errors = {key: scale * error for key, error in self.errors().items()}
        return Sensitivity(values, errors, cost)


def report_unseen(names: Iterable[str]) -> None:
    """Warn of linears without gradients, whose sensitivity is taken for 0."""
    unseen = sorted(names)
    if unseen:
        log.warning("no gradient reached %s: no token of the text was routed there; they count as 0", ", ".join(unseen))


class _Calls:
    """The calls of linears in a forward pass, of which the backward pass brings the gradients.

    Attributes:
        starts: where gradients end: outputs of linears before which there is none.
    """

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self.starts: list[Tensor] = []
        self._open: Counter[str] = Counter()
        self._rows: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def watch(self, name: str) -> Callable[..., None]:
        """The forward hook of a linear."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            inputs = [(args[0] if args else kwargs["input"]).detach()]
            if not output.requires_grad:  # with all parameters frozen, gradients have to start somewhere
                self.starts.append(output.requires_grad_())
            self._open[name] += 1

            def arrived(gradient: Tensor) -> None:
                # Hooks live as long as the graph, and inputs only until they are popped.
                self._add(name, inputs.pop(), gradient)

            output.register_hook(arrived)

        return hook

    def flush(self) -> None:
        """Visit linears of which some outputs are of no consequence for the loss."""
        for name in list(self._rows):
            self._finish(name)

    def _add(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()
        self._rows[name].append((inputs.to(g.device).flatten(0, -2).float(), g))
        self._open[name] -= 1
        if not self._open[name]:  # a linear that blocks share is called several times: its gradient is the sum
            self._finish(name)

    def _finish(self, name: str) -> None:
        xs, gs = zip(*self._rows.pop(name), strict=True)
        self._visit(name, torch.cat(xs), torch.cat(gs))
