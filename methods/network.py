"""A causal language model as quantization sees it: blocks of linears, which of them share an input, and which
earlier operator a per-channel scale of that input can be folded into.

Nothing here knows a model by name. The decoder blocks are the longest list of modules that contain linears; who
shares an input is read off one forward pass; and whether a scale can be folded is settled by trying it on the
weights and comparing logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Linears that read the same input tensor (q/k/v, gate/up): they share statistics, scales and, in serving
    engines, a width.

    Attributes:
        linears: full module names, in execution order.
        producer: full name of the norm or linear that a per-channel scale of the input folds into exactly, or None.
        scope: full name of the smallest module that contains all linears of the group (attention, MLP).
    """

    linears: tuple[str, ...]
    producer: str | None
    scope: str

    @property
    def name(self) -> str:
        """The first linear's name."""
        return self.linears[0]


@dataclass(frozen=True)
class Block:
    """One decoder layer, and its groups in execution order."""

    name: str
    groups: tuple[Group, ...]


@dataclass
class Network:
    """A model and its structure. `model(input_ids)` must return an object with `.logits` [batch, length, vocab]."""

    model: nn.Module
    blocks: tuple[Block, ...]
    _modules: dict[str, nn.Module] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._modules = dict(self.model.named_modules())

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in execution order."""
        return tuple(group for block in self.blocks for group in block.groups)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of all linears to quantize, in execution order."""
        return tuple(name for group in self.groups for name in group.linears)

    @cached_property
    def group_of(self) -> dict[str, Group]:
        """Linear name to its group."""
        return {name: group for group in self.groups for name in group.linears}

    def module(self, name: str) -> nn.Module:
        """Any submodule by its full name."""
        return self._modules[name]

    def linear(self, name: str) -> nn.Linear:
        """A linear by its full name."""
        module = self._modules[name]
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is a {type(module).__name__}, not a linear")
        return module

    def weight(self, name: str) -> Tensor:
        """A detached fp32 copy of a linear's weight [out, in].

        Raises:
            ValueError: the weight is not in memory.
        """
        weight = self.linear(name).weight
        if weight.is_meta:
            raise ValueError(f"the weight of {name} is offloaded; load the model without offloading")
        return weight.detach().to(torch.float32, copy=True)

    def shape(self, name: str) -> tuple[int, int]:
        """[out, in] of a linear."""
        linear = self.linear(name)
        return linear.out_features, linear.in_features

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes [out, in] of all linears."""
        return [self.shape(name) for name in self.linears]

    @property
    def other_parameters(self) -> int:
        """Number of parameters besides the weights of linears: embeddings, head, norms, biases."""
        return sum(p.numel() for p in self.model.parameters()) - sum(out * columns for out, columns in self.shapes)

    @torch.no_grad()
    def overwrite(self, name: str, weight: Tensor) -> None:
        """Replace a linear's weight in place, keeping its dtype."""
        self.linear(name).weight.copy_(weight)

    @torch.no_grad()
    def fold(self, group: Group, scale: Tensor) -> dict[str, Tensor]:
        """Multiply the group's weights by `scale` [in] column-wise and divide the producer's output by it.

        The function of the network is unchanged. Returns the producer's changed parameters by full name.
        """
        if group.producer is None:
            raise ValueError(f"no scale can be folded into what precedes {group.name}")
        for name in group.linears:
            self.linear(name).weight.mul_(scale.to(self.linear(name).weight))
        changed = {}
        producer = self.module(group.producer)
        for key, parameter in producer.named_parameters(recurse=False):
            parameter.div_(scale.to(parameter).view(-1, *[1] * (parameter.dim() - 1)))
            changed[f"{group.producer}.{key}"] = parameter.detach()
        return changed

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, length, vocab] of int64 tokens [batch, length]."""
        return self.model(input_ids=tokens, use_cache=False).logits

    @contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Plain matrix products instead of fused attention, which has no second derivative."""
        config: Any = self.model.config
        before = config._attn_implementation
        config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = before


@contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter that requires a gradient; restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in required:
            parameter.requires_grad_(True)


def discover(model: nn.Module, vocab_size: int) -> Network:
    """Find the structure of a causal language model.

    Raises:
        ValueError: no repeated blocks with linears exist; the message says what was looked for.
    """
    probe = torch.randint(vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    prefix, layers = _block_list(model)
    traces = _trace(model, prefix, len(layers), probe.to(device))
    network = Network(model, ())
    known: dict[object, list[str | None]] = {}  # equal blocks have equal producers: try each structure once
    blocks = []
    for index, trace in enumerate(traces):
        name = f"{prefix}.{index}"
        bare = [Group(tuple(names), None, _scope(names)) for names in trace.groups()]
        signature = _signature(layers[index], name, bare)
        producers = known.get(signature)
        if producers is None:
            producers = [_producer(network, group, trace, name, probe.to(device)) for group in bare]
            if all(_matters(network, group, probe.to(device)) for group in bare):
                known[signature] = producers
        groups = [
            Group(g.linears, None if p is None else f"{name}.{p}", g.scope)
            for g, p in zip(bare, producers, strict=True)
        ]
        blocks.append(Block(name, tuple(groups)))
    return Network(model, tuple(blocks))


@dataclass
class _Trace:
    """What one forward pass showed of a block."""

    order: list[str] = field(default_factory=list)  # leaf modules with parameters, as executed
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of linears; kept alive, so that addresses differ
    versions: dict[str, int] = field(default_factory=dict)  # of the inputs, which change in place

    def groups(self) -> list[list[str]]:
        """Linears by the identity of their input, in execution order."""
        by_input: dict[tuple[object, ...], list[str]] = {}
        for name in self.order:
            if name in self.inputs:
                x = self.inputs[name]
                by_input.setdefault((x.data_ptr(), x.shape, x.stride(), self.versions[name]), []).append(name)
        return list(by_input.values())


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(any(isinstance(m, nn.Linear) for m in layer.modules()) for layer in module)
    ]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no ModuleList whose elements contain nn.Linear, so no decoder blocks were "
            "found; convert its projections to nn.Linear or name another model"
        )
    # Outer lists hold more parameters than lists inside a block (experts).
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _trace(model: nn.Module, prefix: str, count: int, probe: Tensor) -> list[_Trace]:
    traces = [_Trace() for _ in range(count)]

    def spy(trace: _Trace, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in trace.order:
                return
            trace.order.append(name)
            if isinstance(module, nn.Linear):
                x = args[0] if args else kwargs["input"]
                trace.inputs[name], trace.versions[name] = x, x._version

        return hook

    handles = []
    for name, module in model.named_modules():
        if name.startswith(prefix + ".") and next(module.parameters(recurse=False), None) is not None:
            index = int(name[len(prefix) + 1 :].split(".")[0])
            handles.append(module.register_forward_pre_hook(spy(traces[index], name), with_kwargs=True))
    with hooks(handles), torch.no_grad():
        model(input_ids=probe, use_cache=False)
    return traces


def _scope(names: Sequence[str]) -> str:
    """The longest common dotted prefix; the linear itself if it is alone."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _signature(layer: nn.Module, name: str, groups: Sequence[Group]) -> object:
    shapes = tuple((key, tuple(p.shape)) for key, p in layer.named_parameters())
    members = tuple(tuple(n[len(name) :] for n in g.linears) for g in groups)
    return type(layer), shapes, members


def _producer(network: Network, group: Group, trace: _Trace, block: str, probe: Tensor) -> str | None:
    """The nearest earlier operator into which a scale of the group's input folds, relative to the block."""
    width = network.linear(group.name).in_features
    earlier = trace.order[: trace.order.index(group.name)]
    for name in reversed(earlier):
        module = network.module(name)
        sizes = {p.shape[0] for p in module.parameters(recurse=False)}
        if sizes != {width} or name in group.linears:
            continue
        if _folds(network, group, name, probe) and _matters(network, group, probe):
            return name[len(block) + 1 :]
    return None


@torch.no_grad()
def _folds(network: Network, group: Group, producer: str, probe: Tensor) -> bool:
    """Whether folding leaves the logits unchanged. Scales are powers of two, so that nothing is rounded."""
    before = network.logits(probe).float()
    with _restored(network, (*group.linears, producer)):
        network.fold(Group(group.linears, producer, group.scope), _trial_scale(network, group))
        return _close(network.logits(probe).float(), before)


@torch.no_grad()
def _matters(network: Network, group: Group, probe: Tensor) -> bool:
    """Whether the logits notice a scale that is folded into nothing. Where they do not (the linears are zero, or a
    later one is), every operator would seem to be a producer."""
    before = network.logits(probe).float()
    with _restored(network, group.linears):
        for name in group.linears:
            network.overwrite(name, network.weight(name) * _trial_scale(network, group))
        return not _close(network.logits(probe).float(), before)


def _trial_scale(network: Network, group: Group) -> Tensor:
    """Powers of two, so that nothing is rounded: [in]."""
    linear = network.linear(group.name)
    exponents = torch.randint(-1, 2, (linear.in_features,), generator=torch.Generator().manual_seed(1))
    return (2.0**exponents).to(linear.weight.device)


def _close(logits: Tensor, others: Tensor) -> bool:
    return bool((logits - others).abs().max() <= 1e-4 * others.abs().max())


@contextmanager
def _restored(network: Network, modules: Sequence[str]) -> Iterator[None]:
    """Undo changes to the modules' own parameters at the end."""
    parameters = [p for name in modules for p in network.module(name).parameters(recurse=False)]
    saved = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
