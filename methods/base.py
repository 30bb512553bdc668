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
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.linear import Inputs
from kernels.packed import Packed
from methods.budget import Budget
from methods.formats.base import Format
from methods.network import Network
from methods.toolchains.process import Tools

T = TypeVar("T")


class Stat(StrEnum):
    """Statistics of a linear's input that calibration can collect in one pass over the full-precision model."""

    GRAM = "gram"
    """Mean over tokens of x xᵀ: fp32 [in, in]."""
    MEAN_ABS = "mean_abs"
    """Mean over tokens of |x|: fp32 [in]."""
    MAX_ABS = "max_abs"
    """Maximum over tokens of |x|: fp32 [in]."""
    MEAN = "mean"
    """Mean over tokens of x: fp32 [in]."""
    MEAN_SQUARE = "mean_square"
    """Mean over tokens of x²: fp32 [in]."""


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


class Meter(Protocol):
    """Measures memory."""

    def __call__(self) -> Callable[[], int]:
        """Start measuring; the returned function gives the peak in bytes since then."""
        ...


def no_meter() -> Callable[[], int]:
    """Measure nothing: the peak is 0."""
    return lambda: 0


class Latency(Protocol):
    """A latency table of this machine."""

    def __call__(self, shape: tuple[int, int], fmt: Format) -> float:
        """Microseconds of one token through a linear of this shape [out, in] in this format."""
        ...


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
    meter: Meter = no_meter
    latency: Latency | None = None
    tools: Tools | None = None


@dataclass
class Quantized:
    """A quantized model: one `Packed` for every linear, and what else changed.

    Attributes:
        packed: linear name to packed weight; every linear of the network has one.
        parameters: full names and new values of other parameters (norm gains into which scales were folded).
        inputs: linear name to what rounds its input at run time; inputs of linears not named stay as they are.
        spent: seconds and peak bytes of a process of its own that did the work.
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
    inputs: dict[str, Inputs] = field(default_factory=dict)
    spent: tuple[float, int] | None = None


@dataclass(frozen=True)
class Parts:
    """The four choices that almost every method is made of, by name."""

    format: str = "integer"
    transform: str = "none"
    rounding: str = "nearest"
    allocation: str = "uniform"


@dataclass(frozen=True)
class Method(ABC):
    """A published way to quantize a model. Fields are its options; the paper's defaults are the defaults."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    uses_budget: ClassVar[bool] = True
    """False for a reference that is the same under every budget, and is run once."""

    in_original_coordinates: ClassVar[bool] = True
    """False where folded scales are not reported, so that errors of single linears cannot be measured."""

    extra: ClassVar[str] = ""
    """The optional extra of this project that it needs."""

    kv_cache: str = field(default="", kw_only=True)
    """Number format of cached keys and values, such as `int8`; 16 bits by default. See `kernels.kv_cache`."""

    @property
    def parts(self) -> Parts:
        """What fills the four places; for the table of methods."""
        return Parts()

    @property
    def statistics(self) -> frozenset[Stat]:
        """The calibration statistics that this instance reads."""
        return self.needs

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose code, with all that they import, determines what this instance computes."""
        return (type(self).__module__,)

    @property
    def label(self) -> str:
        """The name and the options that differ from their defaults, such as `hawq_v2 rounding=gptq`."""
        chosen = [f for f in fields(self) if getattr(self, f.name) != _default(f)]
        return " ".join([self.name, *(f"{f.name}={_plain(getattr(self, f.name))}" for f in chosen)])

    def supports(self, network: Network, budget: Budget) -> str | None:
        """None, or one sentence that says why this method cannot quantize this model to this budget."""
        del network, budget
        return None

    @abstractmethod
    def quantize(self, ctx: Context) -> Quantized:
        """Quantize every linear of `ctx.network`."""


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _plain(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, dict):
        return ",".join(f"{name}:{_plain(item)}" for name, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


class UniformMethod(Method):
    """A method that gives every linear the same width, and therefore wants a budget that names one."""

    def supports(self, network: Network, budget: Budget) -> str | None:
        del network
        if budget.bits is None:
            return f"uniform widths cannot meet a bound of {budget.bound}"
        return None


class Registry(dict[str, type[T]]):
    """Names to classes, filled by the modules of a package. Asking for an unknown name suggests near matches."""

    def __init__(self, kind: str, package: str) -> None:
        super().__init__()
        self.kind, self.package = kind, package

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter the class under `name` and set its `name` attribute."""

        def enter(cls: type[T]) -> type[T]:
            if name in self:
                raise ValueError(f"two {self.kind}s are called {name!r}: {self[name]} and {cls}")
            self[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return enter

    def complete(self) -> Registry[T]:
        """Import every module of the package, so that all that there is has registered itself."""
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)
        return self

    def __missing__(self, name: str) -> type[T]:
        if name not in self.complete():
            raise ValueError(f"unknown {self.kind} {name!r}: {hint(name, self)}")
        return self[name]


def hint(name: str, known: Iterable[str]) -> str:
    """The remedy for a mistyped name: near matches, or all there are."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known) or 'none'}."


METHODS: Registry[Method] = Registry("method", "methods")
register = METHODS.register
discover = METHODS.complete
