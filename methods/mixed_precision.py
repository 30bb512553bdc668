"""Mixed precision: a loss for every linear in every recipe, a plan that spends the budget, and a rounding.

The three are free to combine. What a published method adds is how it scores a linear, and which solver it takes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import TypeVar

import torch

from kernels.activations import TokenScale, integers
from methods.allocation.base import SOLVERS, Problem, Solver
from methods.base import Budget, Context, Method, Parts, Quantized, Stat, hint
from methods.formats.base import Format
from methods.formats.dense import Dense
from methods.formats.registry import named_format
from methods.network import Network
from methods.pipeline import quantize_network
from methods.recipe import FULL_WIDTH, Recipe, bound
from methods.rounding.base import ROUNDINGS
from methods.sensitivity.activations import activation_losses
from methods.sensitivity.base import Losses, Metric, Sensitivity, Subject, entry
from methods.sensitivity.hvp import mean_loss
from methods.transforms.base import TRANSFORMS

Plan = dict[str, Recipe]
"""Linear name to recipe."""
Number = TypeVar("Number", int, float)

GRANULARITIES: dict[str, Callable[[Network], dict[str, tuple[str, ...]]]] = {
    "layer": lambda network: {name: (name,) for name in network.linears},
    "group": lambda network: {group.name: group.linears for group in network.groups},
    "block": lambda network: {b.name: tuple(n for g in b.groups for n in g.linears) for b in network.blocks},
}
"""What shares a recipe: names, and their linears."""


@dataclass(frozen=True)
class MixedPrecision(Method):
    """A recipe for each group of linears, by a sensitivity metric and a solver.

    The loss of a linear in a format is what the metric says it is, with rounding to nearest, whatever `rounding`
    is used in the end. A budget that names a width allows what this width stores uniformly.

    Args:
        bits: candidate widths of the integer format; 16 means not quantized.
        formats: names of further candidate formats, such as `nvfp4` and `fp8`; see `methods.formats.registry`.
        input_bits: candidate widths of the linears' inputs, chosen together with the formats by the Hessian's
            trace in the inputs (HAWQ-V2); empty leaves inputs in 16 bits.
        granularity: what shares a recipe: a `group` of linears with the same input (q/k/v, gate/up), as serving
            engines that fuse them need, a single `layer`, or a whole `block`.
        solver: see `methods.allocation`.
        rounding: see `methods.rounding`.
        transform: see `methods.transforms`; applied when the plan is made.
        judge_sequences: sequences of the scoring text on which solvers that try plans out measure them; with 0
            they add up the metric's losses.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    formats: tuple[str, ...] = ()
    input_bits: tuple[int, ...] = ()
    granularity: str = "group"
    solver: str = "pareto"
    rounding: str = "nearest"
    transform: str = "none"
    judge_sequences: int = 0

    def __post_init__(self) -> None:
        if not self.bits and not self.formats:
            raise ValueError("method.bits and method.formats are empty; give candidates such as method.bits=[2,3,4,8]")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {self.granularity!r}: {hint(self.granularity, GRANULARITIES)}")
        # Wrong names fail here, rather than after an hour of sensitivities.
        self.sensitivity()
        self.allocation()
        ROUNDINGS[self.rounding]()
        TRANSFORMS[self.transform]()
        for name in self.formats:
            named_format(name)

    @abstractmethod
    def sensitivity(self) -> Metric:
        """What scores the linears."""

    def allocation(self) -> Solver:
        """What chooses the recipes."""
        return SOLVERS[self.solver]()

    @property
    def parts(self) -> Parts:
        formats = " ".join(["integer" if self.bits else "", *self.formats]).strip()
        return Parts(formats, self.transform, self.rounding, f"{self.sensitivity().name} × {self.solver}")

    @property
    def statistics(self) -> frozenset[Stat]:
        return self.needs | self.sensitivity().needs | TRANSFORMS[self.transform].needs

    @property
    def modules(self) -> tuple[str, ...]:
        chosen = (SOLVERS[self.solver], ROUNDINGS[self.rounding], TRANSFORMS[self.transform], type(self.sensitivity()))
        return (type(self).__module__, *(cls.__module__ for cls in chosen))

    def supports(self, network: Network, budget: Budget) -> str | None:
        limit = budget.limit(network.shapes, network.other_parameters)
        if limit is None:
            return None  # what a recipe costs is only known with the latency table
        formats = self.candidates(budget)
        least = sum(min(fmt.stored_bits(shape) for fmt in formats) for shape in network.shapes)
        weights = sum(out * columns for out, columns in network.shapes)
        if least / weights > limit:
            narrowest = min(formats, key=lambda fmt: fmt.bits)
            return f"{narrowest.name} stores {least / weights:.4g} bits a weight; the limit is {limit:g}"
        return None

    def candidates(self, budget: Budget) -> tuple[Format, ...]:
        """The formats to choose from, narrowest first."""
        integers = [Dense() if width == FULL_WIDTH else budget.format(width) for width in self.bits]
        return tuple(sorted([*integers, *map(named_format, self.formats)], key=lambda fmt: fmt.bits))

    def plan(self, ctx: Context, losses: Mapping[str, Mapping[Recipe, float]]) -> Plan:
        """A recipe for every linear, by the losses of linears in recipes."""
        network = ctx.network
        units = GRANULARITIES[self.granularity](network)
        recipes = list(next(iter(losses.values())))
        limits = bound(network, recipes, ctx.budget, ctx.latency)
        problem = Problem(
            losses=_summed(losses, units),
            costs=_summed(limits.costs, units),
            divisor=limits.divisor,
            limit=limits.limit,
            slack=limits.slack,
            unit=limits.unit,
            judge=self._judge(ctx, units),
            seed=_draw(ctx.generator),
        )
        return _spread(self.allocation()(problem), units)

    def quantize(self, ctx: Context) -> Quantized:
        """`sensitivity` of the result holds the scores, or the losses in the narrowest format."""
        formats = self.candidates(ctx.budget)
        subject = Subject(
            ctx.network, ctx.scoring, ctx.tokens, formats, ctx.statistics, _draw(ctx.generator), ctx.memo, ctx.meter
        )
        metric = self.sensitivity()
        found = subject.measure(metric)
        plan = self.plan(ctx, self._recipes(subject, metric.losses(found, ctx.network, formats)))
        weights = {name: recipe.weight for name, recipe in plan.items()}
        folds = TRANSFORMS[self.transform]()(ctx, weights)
        return Quantized(
            quantize_network(ctx, weights, ROUNDINGS[self.rounding]()),
            folds.parameters,
            folds.input_scale,
            folds.output_scale,
            _per_linear(metric, found, ctx.network, formats[0]),
            {n: TokenScale(integers(recipe.input_bits)) for n, recipe in plan.items() if recipe.input_bits},
        )

    def _recipes(self, subject: Subject, losses: Losses) -> dict[str, dict[Recipe, float]]:
        """Losses of formats, extended to all combinations with widths of the inputs."""
        if not self.input_bits:
            return {name: {Recipe(fmt): loss for fmt, loss in row.items()} for name, row in losses.items()}
        inputs = activation_losses(subject, self.input_bits)
        return {
            name: {Recipe(fmt, width): row[fmt] + inputs[name][width] for fmt, width in product(row, self.input_bits)}
            for name, row in losses.items()
        }

    def _judge(
        self, ctx: Context, units: Mapping[str, tuple[str, ...]]
    ) -> Callable[[Mapping[str, Recipe]], float] | None:
        """The mean loss on scoring text of the network rounded to nearest by a plan."""
        if not self.judge_sequences:
            return None
        tokens = ctx.scoring[: self.judge_sequences]

        def judge(chosen: Mapping[str, Recipe]) -> float:
            with _rounded(ctx.network, _spread(chosen, units)), torch.no_grad():
                return fmean(float(mean_loss(ctx.network, text.unsqueeze(0))) for text in tokens)

        return judge


@contextmanager
def _rounded(network: Network, plan: Mapping[str, Recipe]) -> Iterator[None]:
    """The network with its weights rounded to nearest, for a while."""
    originals = {name: network.weight(name) for name in plan}
    try:
        for name, recipe in plan.items():
            network.overwrite(name, recipe.weight.fit(originals[name]).snap(originals[name]))
        yield
    finally:
        for name, weight in originals.items():
            network.overwrite(name, weight)


def _draw(generator: torch.Generator) -> int:
    """A seed, for what must not depend on how many numbers others have drawn."""
    return int(torch.randint(2**31, (), generator=generator))


def _spread(chosen: Mapping[str, Recipe], units: Mapping[str, tuple[str, ...]]) -> Plan:
    """From a recipe a unit to a recipe a linear."""
    return {name: chosen[unit] for unit, names in units.items() for name in names}


def _per_linear(metric: Metric, found: Sensitivity, network: Network, narrowest: Format) -> dict[str, float]:
    return {name: found.values[entry(name, narrowest) if metric.per_format else name] for name in network.linears}


def _summed(
    values: Mapping[str, Mapping[Recipe, Number]], units: Mapping[str, Iterable[str]]
) -> dict[str, dict[Recipe, Number]]:
    """From values a linear to values a unit."""
    summed = {}
    for unit, names in units.items():
        rows = [values[name] for name in names]
        summed[unit] = {recipe: sum(row[recipe] for row in rows) for recipe in rows[0]}
    return summed
