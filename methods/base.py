"""The contract of a method: read this page before writing one.

    @register("rtn")
    @dataclass(frozen=True)
    class RTN(Method):
        clip: bool = False

        def quantize(self, ctx: Context) -> Quantized:
            ...

The decorated dataclass is the whole registration. Its fields become Hydra options with their types and defaults,
`needs` names the calibration statistics that the harness must provide, `supports` says in words why a combination
cannot run, and `quantize` is the one required method. A method never sees paths, wandb, Hydra or devices.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.packed import Packed
from methods.formats.base import Format
from methods.formats.integer import WIDTHS, Integer
from methods.network import Network

T = TypeVar("T")


class Stat(StrEnum):
    """Statistics of a linear's input that calibration can collect in one pass over the full-precision model."""

    GRAM = "gram"
    """Mean over tokens of x xᵀ: fp32 [in, in]."""
    MEAN_ABS = "mean_abs"
    """Mean over tokens of |x|: fp32 [in]."""
    MAX_ABS = "max_abs"
    """Maximum over tokens of |x|: fp32 [in]."""


@dataclass(frozen=True)
class Budget:
    """What may be stored for the quantized linears.

    Either `bits`, the width of a uniform format, or `effective_bits`, a bound on the mean stored bits a weight.
    """

    bits: int | None = None
    effective_bits: float | None = None
    group_size: int = 128
    """Columns that share a scale; 0 means one scale per output channel."""
    symmetric: bool = False

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.effective_bits is None):
            raise ValueError("a budget names either budget.bits or budget.effective_bits, and not both")
        if self.bits is not None and self.bits not in WIDTHS:
            raise ValueError(f"budget.bits={self.bits} is outside 2 to 8, the widths that can be packed")
        if self.group_size < 0:
            raise ValueError(
                f"budget.group_size={self.group_size} is not positive; take 32, 64 or 128, or 0 for per channel"
            )

    @property
    def name(self) -> str:
        """Such as `w4g128`, `w4channel-sym` or `b3.25g128`."""
        width = f"w{self.bits}" if self.bits is not None else f"b{self.effective_bits:g}"
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"{width}{group}{'-sym' if self.symmetric else ''}"

    def format(self, width: int | None = None, **options: Any) -> Integer:
        """The integer format of this budget, at `width` bits or at its own."""
        width = self.bits if width is None else width
        if width is None:
            raise ValueError(f"budget {self.name} bounds effective bits and names no single width")
        return Integer(width, self.group_size, self.symmetric, **options)

    def limit(self, shapes: Iterable[tuple[int, int]]) -> float:
        """Most bits a weight that matrices of these shapes may take on average: what uniform `bits` stores, or
        `effective_bits`."""
        if self.effective_bits is not None:
            return self.effective_bits
        return effective_bits({(i, s): self.format() for i, s in enumerate(shapes)})


def effective_bits(formats: Mapping[tuple[int, tuple[int, int]], Format]) -> float:
    """Stored bits a weight of matrices in the given formats; keys are (any number, shape [out, in])."""
    stored = sum(f.stored_bits(shape) for (_, shape), f in formats.items())
    return stored / sum(out * columns for _, (out, columns) in formats)


class Statistics(Protocol):
    """Calibration statistics of the full-precision model, read only; linears with the same input share tensors."""

    def __call__(self, stat: Stat, linear: str) -> Tensor:
        """The statistic of that linear's input; KeyError if the method did not declare it in `needs`."""
        ...


class Memo(Protocol):
    """Remembers expensive results that do not depend on the budget, across the cells of a sweep.

    `compute` returns a flat mapping of names to tensors. `name` and `options` identify the result together with
    what the harness knows: the model's weights, the texts, and the source code of the function `compute`.
    """

    def __call__(
        self, name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]: ...


class Tracker(Protocol):
    """Wraps an iterable to show progress."""

    def __call__(self, items: Iterable[T], description: str) -> Iterable[T]: ...


def no_memo(name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Compute every time."""
    del name, options
    return compute()


def no_tracker(items: Iterable[T], description: str) -> Iterable[T]:
    """Show nothing."""
    del description
    return items


@dataclass
class Context:
    """All that a method works with.

    Attributes:
        network: the model. Its weights may be overwritten; the harness keeps what it needs of the original.
        tokens: int64 [sequences, length], the calibration text.
        scoring: int64 [sequences, length], the text for sensitivities and hyper-parameter choices; disjoint from
            calibration and test text.
        statistics: what the method declared in `needs`, of the original model over `tokens`.
        budget: what may be stored.
        generator: the only source of randomness, on the CPU.
    """

    network: Network
    tokens: Tensor
    scoring: Tensor
    statistics: Statistics
    budget: Budget
    generator: torch.Generator
    memo: Memo = no_memo
    track: Tracker = no_tracker


@dataclass
class Quantized:
    """A quantized model: one `Packed` for every linear, and what else changed.

    Attributes:
        packed: linear name to packed weight; every linear of the network has one.
        parameters: full names and new values of other parameters (norm gains into which scales were folded).
        output_scale: linear name to t [out], if row r of the original weight is t_r times the packed row.
        input_scale: linear name to s [in], if the linear's input is divided by s compared with the original model
            and its weights multiplied by s before rounding. Lets errors be measured in original coordinates.
        sensitivity: linear name to the score that decided its bits, where a method has one.
    """

    packed: dict[str, Packed]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    input_scale: dict[str, Tensor] = field(default_factory=dict)
    output_scale: dict[str, Tensor] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """A published way to quantize a model. Fields are its options; the paper's defaults are the defaults."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    uses_budget: ClassVar[bool] = True
    """False for a reference that is the same under every budget, and is run once."""

    @property
    def label(self) -> str:
        """The name and the options that differ from their defaults, such as `hawq_v2 rounding=gptq`."""
        chosen = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join([self.name, *(f"{f.name}={_plain(getattr(self, f.name))}" for f in chosen)])

    def supports(self, network: Network, budget: Budget) -> str | None:
        """None, or one sentence that says why this method cannot quantize this model to this budget."""
        del network, budget
        return None

    @abstractmethod
    def quantize(self, ctx: Context) -> Quantized:
        """Quantize every linear of `ctx.network`."""


def _plain(value: Any) -> str:
    """A value as one would type it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


class UniformMethod(Method):
    """A method that gives every linear the same width, and therefore wants a budget that names one."""

    def supports(self, network: Network, budget: Budget) -> str | None:
        del network
        if budget.bits is None:
            return f"uniform widths cannot meet a bound of {budget.effective_bits:g} effective bits"
        return None


class Registry(dict[str, type[T]]):
    """Names to classes. Asking for an unknown name suggests near matches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter the class under `name` and set its `name` attribute."""

        def enter(cls: type[T]) -> type[T]:
            if name in self:
                raise ValueError(f"two {self.kind}s are called {name!r}: {self[name]} and {cls}")
            self[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return enter

    def __missing__(self, name: str) -> type[T]:
        raise ValueError(f"unknown {self.kind} {name!r}: {hint(name, self)}")


def hint(name: str, known: Iterable[str]) -> str:
    """The remedy for a mistyped name: near matches, or all there are."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known) or 'none'}."


METHODS: Registry[Method] = Registry("method")
register = METHODS.register


def discover() -> Registry[Method]:
    """Import every module of the `methods` package, so that each method has registered itself."""
    import methods

    for module in pkgutil.walk_packages(methods.__path__, "methods."):
        importlib.import_module(module.name)
    return METHODS
