"""The models of this study, and how they are trained: a minute or two on a CPU, and never again until the code or the
data changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.cache import Cache
from harness.code import code_version
from harness.home_ground.classifier import Classifier
from harness.home_ground.cnn import CNN
from harness.home_ground.encoder import Encoder
from harness.home_ground.examples import Examples, cloze, digits


@dataclass(frozen=True)
class Recipe:
    """AdamW over random mini-batches; the learning rate rises over the first tenth of the steps and then falls to zero
    along a cosine."""

    steps: int
    batch: int
    peak_lr: float
    weight_decay: float


@dataclass(frozen=True)
class Home:
    """A model on a task.

    Attributes:
        examples: loads the task.
        build: the untrained model, of inputs and the number of classes.
        recipe: how it is trained.
        group_size: columns that share a scale on the group-wise grid; it divides most rows.
    """

    examples: Callable[[], Examples]
    build: Callable[[Tensor, int], Classifier]
    recipe: Recipe
    group_size: int


HOMES = {
    "cnn": Home(digits, CNN, Recipe(steps=200, batch=64, peak_lr=5e-3, weight_decay=0.05), group_size=36),
    "encoder": Home(cloze, Encoder, Recipe(steps=800, batch=64, peak_lr=3e-3, weight_decay=0.05), group_size=32),
}


def train(model: Classifier, examples: Examples, recipe: Recipe, generator: torch.Generator) -> None:
    """Minimize the cross-entropy on the training split."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_lr, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(recipe.steps):
        rows = torch.randint(examples.splits["train"].stop, (recipe.batch,), generator=generator)
        loss = F.cross_entropy(model.classify(examples.inputs[rows]), examples.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def trained(chosen: Home, examples: Examples, seed: int, cache: Cache) -> Classifier:
    """The model after training and `finish`, in evaluation mode; from the cache where it was trained before."""
    model = _initial(chosen, examples, seed)

    def compute() -> dict[str, Tensor]:
        train(model, examples, chosen.recipe, torch.Generator().manual_seed(seed))
        model.finish()
        return model.state_dict()

    identity = {
        "model": chosen.build.__qualname__,
        "recipe": asdict(chosen.recipe),
        "seed": seed,
        "examples": hashlib.sha256(examples.inputs.numpy().tobytes() + examples.labels.numpy().tobytes()).hexdigest(),
        "code": code_version(__name__),
    }
    entry = cache("home", identity, compute)
    if entry.found:
        model.finish()
        model.load_state_dict(entry.value)
    return model.eval()


def _initial(chosen: Home, examples: Examples, seed: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # modules initialize from the global generator
        return chosen.build(examples.inputs, examples.classes)
