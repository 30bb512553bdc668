"""HAWQ on its home ground: convolutions as linears, folding, curvature against the dense Hessian, and a whole study."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn

from harness import corpus
from harness.cache import Cache
from harness.home_ground import examples as tasks
from harness.home_ground import ranks, report, scores, table
from harness.home_ground.__main__ import home
from harness.home_ground.cnn import CNN, Convolution
from harness.home_ground.encoder import Encoder
from harness.home_ground.examples import Examples, cloze, digits, shuffled
from harness.home_ground.study import ALLOCATORS, RANDOM, UNIFORM, Outcome, Study, budget_of
from harness.home_ground.train import HOMES, Recipe, train, trained
from harness.train_tiny import TINY
from methods.network import discover
from methods.sensitivity.base import Subject
from methods.sensitivity.eigenvalue import TopEigenvalue
from methods.sensitivity.hutchinson import Hutchinson
from methods.sensitivity.hvp import mean_loss


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("kernel", "stride", "side"), [(3, 1, 8), (3, 2, 8), (3, 2, 7), (1, 2, 8), (1, 2, 7), (1, 1, 5)]
)
def test_a_convolution_is_a_linear_on_patches(kernel: int, stride: int, side: int) -> None:
    ours = Convolution(3, 5, kernel, stride)
    ours.norm = nn.Identity()
    nn.init.normal_(ours.linear.bias)
    x = torch.randn(2, 3, side, side)
    weight = ours.linear.weight.view(5, 3, kernel, kernel)
    expected = F.conv2d(x, weight, ours.linear.bias, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(ours(x), expected)


def test_folding_leaves_the_function_as_it_was() -> None:
    model = CNN(torch.rand(40, 1, 8, 8), 3, widths=(4, 6), depth=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model.classify(model.examples)  # gathers statistics
    model.eval()
    before = model.classify(model.examples)
    model.finish()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model.classify(model.examples), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="folded already"):
        model.finish()


def test_the_next_token_is_the_class() -> None:
    examples = _stripes()
    model = CNN(examples.inputs, examples.classes, widths=(4,), depth=1).eval()
    sequences = examples.sequences("test", 4)
    rows = examples.splits["test"]
    expected = F.cross_entropy(
        model.classify(examples.inputs[rows.start : rows.stop]), examples.labels[rows.start : rows.stop]
    )
    assert sequences.shape == (8, 5)
    torch.testing.assert_close(mean_loss(discover(model, examples.classes), sequences), expected)


def test_splits_are_disjoint_and_labels_stay_with_their_examples() -> None:
    inputs = torch.arange(50)
    found = shuffled(inputs, inputs % 7, {"scoring": 10, "test": 15})
    numbers = [n for rows in found.splits.values() for n in rows]
    assert sorted(numbers) == list(range(50))
    assert {name: len(rows) for name, rows in found.splits.items()} == {"train": 25, "scoring": 10, "test": 15}
    assert torch.equal(found.inputs % 7, found.labels)
    assert digits().inputs.shape == (1797, 1, 8, 8)


def test_a_gap_lacks_one_of_the_commonest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FILES", 2)
    monkeypatch.setattr(tasks, "GAPS", 5000)
    found, side = cloze(), tasks.CONTEXT
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    texts = sorted((document.text for document in corpus.core_documents()), key=len, reverse=True)[:2]
    stream = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
    common = [token for token, _ in Counter(stream).most_common()]
    whole = {tuple(stream[i : i + 2 * side + 1]) for i in range(len(stream) - 2 * side)}
    assert found.inputs.shape == (5000, 1 + 2 * side)
    assert found.classes == tasks.CHOICES
    counts = Counter(stream)
    rare = min(counts[token] for token in common[: tasks.CHOICES])
    for row, label in zip(found.inputs.tolist()[:50], found.labels.tolist()[:50], strict=True):
        before, after = tuple(row[1 : 1 + side]), tuple(row[1 + side :])
        fitting = [token for token in counts if counts[token] >= rare and (*before, token, *after) in whole]
        assert fitting  # what was taken out is common, and put back it gives a passage of the corpus
        assert any(counts[token] == counts[common[label]] for token in fitting)


def test_attention_looks_both_ways() -> None:
    model = Encoder(torch.randint(20, (4, 6)), 3, hidden=8, intermediate=8, heads=2, layers=1).eval()
    other = model.examples.clone()
    other[:, -1] = (other[:, -1] + 1) % 20
    assert not torch.allclose(model.classify(model.examples), model.classify(other))
    first = Encoder(model.examples, 3, hidden=8, intermediate=8, heads=2, layers=1).eval()
    x = torch.randn(2, 6, 8)
    order = torch.randperm(6)
    attend = first.blocks[0].attention  # type: ignore[union-attr]
    torch.testing.assert_close(attend(x)[:, order], attend(x[:, order]))


def test_traces_and_eigenvalues_are_those_of_the_dense_hessian() -> None:
    examples = _stripes()
    model = CNN(examples.inputs, examples.classes, widths=(2,), depth=1)
    train(model, examples, Recipe(20, 16, 1e-2, 0.0), torch.Generator().manual_seed(0))
    model.finish()
    network = discover(model, examples.classes)
    tokens = examples.sequences("scoring", 12)[:1]
    subject = Subject(network, tokens, tokens, (), lambda stat, linear: torch.empty(0))
    top = TopEigenvalue(tolerance=1e-7, max_iterations=2000, sequences=1)(subject).values
    traces = Hutchinson(tolerance=0.0, max_probes=400)(subject)
    for name in network.linears:
        dense = _dense_hessian(model, examples, network.linear(name))
        eigenvalues = torch.linalg.eigvalsh(dense)
        assert top[name] == pytest.approx(float(eigenvalues[eigenvalues.abs().argmax()]), rel=1e-2)
        assert abs(traces.values[name] - float(dense.trace())) < 5 * traces.error[name] + 1e-4


def _dense_hessian(model: CNN, examples: Examples, linear: nn.Linear) -> Tensor:
    """By definition, on the first 12 scoring examples."""
    rows = range(examples.splits["scoring"].start, examples.splits["scoring"].start + 12)
    name = next(key for key, module in model.named_modules() if module is linear)

    def loss(flat: Tensor) -> Tensor:
        weights = {f"{name}.weight": flat.view_as(linear.weight)}
        tokens = torch.tensor([[rows.start, *examples.labels[rows.start : rows.stop].tolist()]])
        logits = torch.func.functional_call(model, weights, (tokens,)).logits[0, :-1]
        return F.cross_entropy(logits, tokens[0, 1:])

    return torch.autograd.functional.hessian(loss, linear.weight.detach().flatten())


def test_training_learns_and_is_remembered(tmp_path: Path) -> None:
    examples = _stripes()
    small = replace(HOMES["cnn"], build=_small, recipe=Recipe(60, 16, 1e-2, 0.0))
    first = trained(small, examples, 0, Cache(tmp_path))
    rows = examples.splits["test"]
    images, labels = examples.inputs[rows.start : rows.stop], examples.labels[rows.start : rows.stop]
    assert float((first.classify(images).argmax(1) == labels).float().mean()) > 0.8  # chance is a third
    again = trained(small, examples, 0, Cache(tmp_path))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert torch.equal(again.classify(images), first.classify(images))
    assert not torch.equal(trained(small, examples, 1, Cache(tmp_path)).classify(images), first.classify(images))


@pytest.fixture(scope="module")
def study() -> Study:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        examples = _stripes()
        model = _small(examples.inputs, examples.classes)
        train(model, examples, Recipe(30, 16, 1e-2, 0.0), torch.Generator().manual_seed(0))
    model.finish()
    effort = scores.Effort(probes=4, iterations=5, batches=1)
    return Study(model, examples, 12, ["5.5", "w3"], randoms=3, effort=effort)


def test_a_study_from_scores_to_files(study: Study, tmp_path: Path) -> None:
    found = study.scored()
    outcomes = list(study.outcomes(found))
    for outcome in outcomes[1:]:
        budget = budget_of(outcome.budget, study.grids[outcome.grid])
        assert outcome.bits <= budget.limit(study.network.shapes) + 1e-9
        assert outcome.correct.shape == outcome.losses.shape == (32,)
    expected = 2 * 2 * (2 * (len(ALLOCATORS) - 1) + study.randoms)  # grids, budgets, roundings
    assert len(outcomes) == 1 + expected
    answers = table.frame({("cnn", 0): outcomes, ("cnn", 1): outcomes})
    tidied = pd.concat(
        [ranks.tidy(own).assign(model="cnn", seed=s, grid=g) for s in (0, 1) for g, own in found.items()]
    )
    paths = report.write(answers, ranks.agreement(tidied), tmp_path)
    assert all(path.exists() for path in paths)
    written = pd.read_csv(tmp_path / "tables" / "home_ground.csv")
    pooled = written[written["seed"] == "all"].set_index(["grid", "budget", "method", "rounding"])
    own = [o for o in outcomes if (o.grid, o.budget, o.method, o.rounding) == ("channel", "w3", "hawq_v2", "gptq")]
    assert pooled.loc[("channel", "w3", "hawq_v2", "gptq"), "loss"] == pytest.approx(own[0].losses.mean(), rel=1e-4)
    assert "**" in (text := (tmp_path / "tables" / "home_ground.md").read_text()) or "±" in text


def test_whole_uniform_widths_are_the_same_everywhere(study: Study) -> None:
    plan = study.plan(ALLOCATORS[UNIFORM], {}, budget_of("w3", 0), 0)
    assert set(plan) == set(study.network.linears)
    assert {recipe.bits for recipe in plan.values()} == {3}


def test_random_plans_differ_and_the_inverse_turns_the_order_around(study: Study) -> None:
    formats = study.formats("channel")
    order = {name: float(i) for i, name in enumerate(study.network.linears)}
    found = {"lambda/n": {n: dict.fromkeys(formats, v) for n, v in order.items()}}
    found["squared_error"] = found["lambda/n"]
    budget = budget_of("5.5", 0)
    plans = [tuple(study.plan(ALLOCATORS[RANDOM], found, budget, seed).values()) for seed in range(3)]
    assert len(set(plans)) > 1
    for method, sign in (("hawq_v1", 1), ("inverse", -1)):
        bits = [recipe.bits for recipe in study.plan(ALLOCATORS[method], found, budget, 0).values()][::sign]
        assert bits == sorted(bits) and len(set(bits)) > 1


def test_intervals_resample_seeds_and_examples() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 400))
    found = table.estimate(one)
    assert found.value == pytest.approx(one.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * one.std() / 20, rel=0.1)
    constant = np.repeat([[0.0], [1.0], [2.0]], 50, axis=1)  # all variation is between seeds
    spread = table.estimate(constant)
    assert (spread.low, spread.high) == pytest.approx((0.0, 2.0))


def test_the_difference_is_paired_with_the_uniform_plan() -> None:
    def outcome(method: str, losses: list[float]) -> Outcome:
        return Outcome("channel", "w3", method, 0, "nearest", 3.0, np.array([1.0, 0.0]), np.array(losses))

    answers = table.frame({("m", 0): [outcome(UNIFORM, [1, 9]), outcome("hawq_v1", [2, 10]), outcome(RANDOM, [3, 30])]})
    rows = table.tidy(answers).query("seed == 'all'").set_index("method")
    assert rows.loc["hawq_v1", ["delta_loss", "delta_loss_low", "delta_loss_high"]].tolist() == pytest.approx([1, 1, 1])
    assert rows.loc["hawq_v1", "above_random"] == 1
    assert np.isnan(rows.loc[UNIFORM, "delta_loss"])


def test_rank_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"model": "m", "grid": "g", "bits": 3, "seed": seed, "linear": str(i), "score": score, "value": rng.normal()}
        for seed in (0, 1)
        for i in range(9)
        for score in (ranks.TRUTH, ranks.PLAIN, "other")
    ]
    table_ = pd.DataFrame(rows)
    found = ranks.agreement(table_).set_index(["score", "seed"])
    values = []
    for seed in (0, 1):
        wide = table_[table_["seed"] == seed].pivot(index="linear", columns="score", values="value")
        values.append(spearmanr(wide["other"], wide[ranks.TRUTH]).statistic)
        assert found.loc[("other", str(seed)), "spearman"] == pytest.approx(values[-1])
    assert found.loc[("other", "all"), "spearman"] == pytest.approx(np.mean(values))
    assert (found["low"] <= found["high"]).all()


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown model 'cn': did you mean cnn"):
        home("cn")


def _stripes() -> Examples:
    """Noise with a bright row, column or diagonal: three classes of 6 × 6 images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    images = torch.rand(120, 1, 6, 6, generator=generator) * 0.3
    images[labels == 0, :, 2] += 1
    images[labels == 1, :, :, 2] += 1
    images[labels == 2] += torch.eye(6)
    return shuffled(images, labels, {"calibration": 16, "scoring": 32, "test": 32})


def _small(inputs: Tensor, classes: int) -> CNN:
    return CNN(inputs, classes, widths=(4, 6), depth=1)
