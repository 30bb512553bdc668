"""One trained model: score its linears, spend budgets by the scores, round, and ask the test examples."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from harness.accounting import packed_copy, storage
from harness.calibration import as_statistics, collect
from harness.home_ground.classifier import Classifier
from harness.home_ground.examples import Examples
from harness.home_ground.ranks import TRUTH
from harness.home_ground.scores import Effort, scores, truth
from methods.base import Context, Quantized, Stat, Statistics
from methods.budget import Budget
from methods.formats.base import Format
from methods.mixed import Mixed
from methods.network import Network, discover
from methods.pipeline import quantize_network
from methods.recipe import Recipe
from methods.rounding.base import ROUNDINGS
from methods.sensitivity.base import Losses, Subject

RANDOM, UNIFORM, FULL = "random", "uniform", "fp32"
CHANNEL, GROUP = "channel", "group"
BATCH = 16  # examples of a sequence


@dataclass(frozen=True)
class Allocator:
    """How a plan comes about.

    Attributes:
        score: what it goes by; irrelevant to plans that go by none.
        solver: see `methods.allocation`.
        sign: −1 turns the order of the score around.
    """

    score: str
    solver: str
    sign: float = 1.0


ALLOCATORS = {
    UNIFORM: Allocator("squared_error", "uniform"),
    "hawq_v1": Allocator("lambda/n", "ordered"),
    "hawq_v2": Allocator("hawq_v2", "pareto"),
    "hawq_v3": Allocator("hawq_v2", "ilp"),
    "fisher": Allocator("fisher", "ilp"),
    "squared_error": Allocator("squared_error", "ilp"),
    "measured": Allocator("measured", "ilp"),
    "inverse": Allocator("lambda/n", "ordered", sign=-1.0),
    RANDOM: Allocator("squared_error", "random"),
}
"""HAWQ orders widths by λ/n; V2 minimizes Ω on a Pareto frontier; V3 by an integer programme. Against them: ‖ΔW‖²
without a Hessian, the empirical Fisher, the loss measured layer by layer, and HAWQ's order upside down."""


@dataclass(frozen=True)
class Outcome:
    """A quantized model on the test examples.

    Attributes:
        budget: name of the limit.
        plan: number of a random plan, else 0.
        bits: stored bits a weight, from the packed tensors.
        correct, losses: of each test example: fp64 [examples].
    """

    grid: str
    budget: str
    method: str
    plan: int
    rounding: str
    bits: float
    correct: Any
    losses: Any


@dataclass
class Study:
    """A trained model and what is asked of it.

    Attributes:
        budgets: stored bits a weight, or whole widths as `w3`: what that width stores uniformly.
        randoms: random plans a budget and grid, rounded to nearest alone.
    """

    model: Classifier
    examples: Examples
    group_size: int
    budgets: Sequence[str]
    widths: tuple[int, ...] = (2, 3, 4, 8)
    randoms: int = 20
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    network: Network = field(init=False)
    statistics: Statistics = field(init=False)

    def __post_init__(self) -> None:
        self.network = discover(self.model, self.examples.classes)
        calibration = self.examples.sequences("calibration", BATCH)
        collected = collect(self.network, calibration, frozenset({Stat.GRAM}))
        self.statistics = as_statistics(self.network, collected)

    @property
    def grids(self) -> dict[str, int]:
        """Grid to columns that share a scale, as budgets count them."""
        return {CHANNEL: 0, GROUP: self.group_size}

    def formats(self, grid: str) -> tuple[Format, ...]:
        """The candidates on a grid."""
        return tuple(Budget(bits=w, group_size=self.grids[grid], symmetric=True).format() for w in self.widths)

    def scored(self) -> dict[str, dict[str, Losses]]:
        """Grid to score to losses: every score, measured on scoring examples, and the truth, on test examples."""
        calibration = self.examples.sequences("calibration", BATCH)
        formats = tuple(fmt for grid in self.grids for fmt in self.formats(grid))
        seen, unseen = (
            Subject(
                self.network, self.examples.sequences(split, BATCH), calibration, formats, self.statistics, self.seed
            )
            for split in ("scoring", "test")
        )
        found = scores(seen, self.effort) | {TRUTH: truth(unseen)}
        return {
            grid: {
                score: {name: {fmt: row[fmt] for fmt in self.formats(grid)} for name, row in losses.items()}
                for score, losses in found.items()
            }
            for grid in self.grids
        }

    def outcomes(self, found: Mapping[str, Mapping[str, Losses]]) -> Iterator[Outcome]:
        """The full-precision model, and every allocator on every grid at every budget; grid to what `scored` gave."""
        yield Outcome("", "", FULL, 0, "", 32.0, *_answers(self.model, self.examples))
        for grid, name in product(self.grids, self.budgets):
            budget, known = budget_of(name, self.grids[grid]), {}
            for method, allocator in ALLOCATORS.items():
                count = self.randoms if method == RANDOM else 1
                for plan, rounding in product(range(count), ("nearest",) if method == RANDOM else ("nearest", "gptq")):
                    recipes = self.plan(allocator, found[grid], budget, plan)
                    key = (rounding, tuple(recipes.values()))
                    if key not in known:  # methods often agree
                        known[key] = self.quantized(recipes, budget, rounding)
                    yield Outcome(grid, name, method, plan, rounding, *known[key])

    def plan(self, allocator: Allocator, found: Mapping[str, Losses], budget: Budget, seed: int) -> dict[str, Recipe]:
        """Linear name to recipe; uniform plans of a whole width are that width everywhere."""
        if budget.bits is not None and allocator.solver == UNIFORM:
            return dict.fromkeys(self.network.linears, Recipe(budget.format()))
        losses = {
            name: {Recipe(fmt): allocator.sign * loss for fmt, loss in row.items()}
            for name, row in found[allocator.score].items()
        }
        return Mixed(solver=allocator.solver).plan(self._context(self.network, budget, seed), losses)

    def quantized(self, plan: Mapping[str, Recipe], budget: Budget, rounding: str) -> tuple[float, Any, Any]:
        """Stored bits, and what the packed model makes of the test examples: `Outcome.correct` and `.losses`."""
        working = Network(copy.deepcopy(self.model), self.network.blocks)
        formats = {name: recipe.weight for name, recipe in plan.items()}
        packed = quantize_network(self._context(working, budget, 0), formats, ROUNDINGS[rounding]())
        model = packed_copy(self.network, Quantized(packed))
        return storage(model)["effective_bits"], *_answers(model, self.examples)

    def _context(self, network: Network, budget: Budget, seed: int) -> Context:
        # One example a sequence: then sequences are as many as rows of hidden states, which `BlockStream` wants.
        calibration, scoring = (self.examples.sequences(split, 1) for split in ("calibration", "scoring"))
        return Context(network, calibration, scoring, self.statistics, budget, torch.Generator().manual_seed(seed))


def budget_of(name: str, group_size: int) -> Budget:
    """`w3` is what 3-bit codes store on this grid, `3.25` a number of stored bits a weight."""
    if name.startswith("w"):
        return Budget(bits=int(name[1:]), group_size=group_size, symmetric=True)
    return Budget(effective_bits=float(name), group_size=group_size, symmetric=True)


@torch.no_grad()
def _answers(model: Any, examples: Examples) -> tuple[Any, Any]:
    """Whether each test example is classified correctly, and its cross-entropy in nats."""
    rows = examples.splits["test"]
    logits = model.classify(examples.inputs[rows.start : rows.stop]).double()
    labels = examples.labels[rows.start : rows.stop]
    return (logits.argmax(1) == labels).double().numpy(), F.cross_entropy(logits, labels, reduction="none").numpy()
