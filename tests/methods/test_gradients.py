import logging
from collections.abc import Callable
from math import inf, nan, sqrt
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from methods.base import Stat
from methods.formats.integer import Integer
from methods.network import Block, Group, Network, hooks
from methods.sensitivity.autoquantize_gradient import AutoQuantizeGradient
from methods.sensitivity.autoscheme import AutoScheme
from methods.sensitivity.base import Cost, Metric, Subject, entry
from methods.sensitivity.fisher import FisherDiagonal, FisherTrace
from methods.sensitivity.fit import FIT
from methods.sensitivity.gauss_newton import GaussNewton
from methods.sensitivity.gradients import RoundingErrors, Samples, draw, propagate, sequences, squared_norm
from methods.sensitivity.kfac import KFAC

TOKENS = torch.randint(96, (6, 9), generator=torch.Generator().manual_seed(1))
FORMATS = (Integer(2, 0), Integer(4, 0))
DRAWS = GaussNewton(max_draws=16)
METRICS = [DRAWS, FisherTrace(), FisherDiagonal(), FIT(), KFAC(), AutoQuantizeGradient(), AutoScheme()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subject_of(network: Network, seed: int = 0) -> Subject:
    def statistics(stat: Stat, linear: str) -> Tensor:
        return torch.eye(network.shape(linear)[1])

    return Subject(network, TOKENS, TOKENS, FORMATS, statistics, seed)


def weight_gradients(network: Network, text: Tensor) -> dict[str, Tensor]:
    """By autograd, of the summed loss."""
    weights = [network.linear(name).weight.requires_grad_(True) for name in network.linears]
    with torch.enable_grad():
        loss = F.cross_entropy(network.logits(text[None])[0, :-1], text[1:], reduction="sum")
        return dict(zip(network.linears, torch.autograd.grad(loss, weights, allow_unused=True), strict=True))


def products(network: Network, text: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """gᵀx of every visit, which must be one a linear."""
    found: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        assert name not in found
        assert x.dtype == g.dtype == torch.float32
        found[name] = g.T @ x

    propagate(network, text, visit, generator)
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_inputs_and_output_gradients_make_the_gradient_of_the_weight(
    small_llama: Callable[..., Network], attention: str
) -> None:
    network = small_llama(attn_implementation=attention)
    with torch.no_grad():  # as the harness may call
        found = products(network, TOKENS[0])
    assert set(found) == set(network.linears)
    assert next(iter(found)) == network.linears[-1]
    for name, truth in weight_gradients(network, TOKENS[0]).items():
        torch.testing.assert_close(found[name], truth, rtol=1e-4, atol=1e-5)


def test_half_precision_is_accumulated_in_fp32(small_llama: Callable[..., Network]) -> None:
    truth = products(small_llama(), TOKENS[0])
    network = small_llama()
    network.model.to(torch.bfloat16)
    for name, gradient in products(network, TOKENS[0]).items():
        assert (gradient - truth[name]).norm() < 0.05 * truth[name].norm()


class Routed(nn.Module):
    """A linear called twice, once in vain; experts that take 2 of the positions, or none; and a block without text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 8)
        names = ("first", "shared", "some", "empty", "absent", "vain")
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(8, 8) for name in names})])
        self.head = nn.Linear(8, 96)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in self.parameters():
                nn.init.normal_(parameter)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        layer = self.layers[0]
        hidden = layer["first"](self.embedding(input_ids)).tanh()
        hidden = layer["shared"](input=layer["shared"](hidden).tanh()).tanh()
        layer["vain"](hidden)
        hidden = hidden + layer["vain"](hidden).tanh()
        flat = hidden.flatten(0, 1)
        flat = flat.index_add(0, torch.tensor([1, 4]), layer["some"](flat[[1, 4]]).tanh())
        flat = flat.index_add(0, torch.tensor([], dtype=torch.long), layer["empty"](flat[:0]))
        return SimpleNamespace(logits=self.head(flat.view_as(hidden)))


@pytest.fixture
def routed() -> Network:
    model = Routed()
    names = tuple(f"layers.0.{name}" for name in model.layers[0])
    return Network(model, (Block("layers.0", tuple(Group((name,), None, name) for name in names)),))


def test_linears_called_twice_in_part_or_not_at_all(routed: Network) -> None:
    found = products(routed, TOKENS[0])
    truth = weight_gradients(routed, TOKENS[0])
    assert set(routed.linears) - set(found) == {"layers.0.absent"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=1e-5)
    assert not found["layers.0.empty"].any()


@pytest.mark.parametrize("metric", [DRAWS, FisherTrace(), FisherDiagonal(), KFAC()], ids=lambda m: m.name)
def test_a_linear_without_tokens_counts_as_0_and_is_reported(
    routed: Network, metric: Metric, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = metric(subject_of(routed))
    assert all(value == 0 for key, value in found.values.items() if "absent" in key or "empty" in key)
    assert all(value > 0 for key, value in found.values.items() if "some" in key or "shared" in key)
    assert "layers.0.absent" in caplog.text and "layers.0.empty" not in caplog.text


def test_inputs_are_freed_as_soon_as_they_were_visited(minute_llama: Network) -> None:
    down = next(name for name in minute_llama.linears if "down" in name)
    storages: list[StorageWeakRef] = []
    held: dict[str, bool] = {}

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        storages.append(StorageWeakRef(args[0].untyped_storage()))

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        held[name] = not storages[0].expired()

    with hooks([minute_llama.linear(down).register_forward_pre_hook(keep)]):
        propagate(minute_llama, TOKENS[0], visit)
    assert [name for name, alive in held.items() if alive] == [down]


@pytest.mark.parametrize("rows", [2, 50])
def test_the_squared_norm_in_either_order(rows: int) -> None:
    x, g = (torch.randn(rows, size, generator=seeded(size)) for size in (7, 11))
    torch.testing.assert_close(squared_norm(x, g), (g.T @ x).norm() ** 2)


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([[0.0, -inf, 2.0, 1.0], [5.0, -inf, -inf, -inf]]).repeat_interleave(20000, 0)
    tokens = draw(logits, seeded())
    assert torch.equal(tokens, draw(logits, seeded()))
    assert not torch.equal(tokens, draw(logits, seeded(1)))
    assert (tokens[20000:] == 0).all()
    for token, p in enumerate(logits[0].softmax(0).tolist()):
        assert abs(float((tokens[:20000] == token).double().mean()) - p) <= 4 * sqrt(p * (1 - p) / 20000)


def test_impossible_tokens_are_not_drawn_either_when_the_number_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.zeros(size))
    assert draw(torch.tensor([[-inf, -inf, 0.0, 0.0]]), seeded()).tolist() == [2]


def test_drawn_labels_replace_those_of_the_text(minute_llama: Network) -> None:
    drawn = products(minute_llama, TOKENS[0], seeded())
    with torch.no_grad():
        labels = draw(minute_llama.logits(TOKENS[:1])[0, :-1], seeded())
    weight = minute_llama.linear(minute_llama.linears[0]).weight.requires_grad_(True)
    loss = F.cross_entropy(minute_llama.logits(TOKENS[:1])[0, :-1], labels, reduction="sum")
    (truth,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(drawn[minute_llama.linears[0]], truth, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was_even_after_an_error(minute_llama: Network) -> None:
    model = minute_llama.model.requires_grad_(False).train()
    kept = model.get_parameter("model.norm.weight").requires_grad_(True)
    model.get_submodule("model.norm").eval()

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
        if name == minute_llama.linears[2]:
            raise LookupError(name)

    with torch.no_grad():
        with pytest.raises(LookupError):
            propagate(minute_llama, TOKENS[0], visit)
        assert not torch.is_grad_enabled()
    assert [p for p in model.parameters() if p.requires_grad] == [kept]
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_runs_in_bf16_and_counts(small_llama: Callable[..., Network], metric: Metric) -> None:
    network = small_llama()
    truth = metric(subject_of(network))
    keys = [entry(name, f) for name in network.linears for f in FORMATS] if metric.per_format else network.linears
    assert set(truth.values) == set(truth.error) == set(keys)
    assert truth.cost.passes >= 2 * len(TOKENS) and truth.cost.seconds > 0
    assert truth.values == metric(subject_of(network)).values
    network.model.to(torch.bfloat16)
    for key, value in metric(subject_of(network)).values.items():
        # Drawn labels may change with the last bits of the probabilities; rounding errors of the weights do, too.
        assert value == pytest.approx(truth.values[key], rel=0.5 if metric.name in ("gauss_newton", "kfac") else 0.2)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_scores_grow_with_the_square_of_the_loss(
    minute_llama: Network, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = metric(subject_of(minute_llama)).values
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: 3 * original(*args, **kwargs))
    power = 3 if metric.name == "autoscheme" else 9
    for key, value in metric(subject_of(minute_llama)).values.items():
        assert value == pytest.approx(power * before[key], rel=1e-4)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_gradients_that_are_not_finite_are_an_error(minute_llama: Network, metric: Metric) -> None:
    minute_llama.model.get_parameter("model.norm.weight").data.fill_(nan)
    with pytest.raises(FloatingPointError, match="load the model"):
        metric(subject_of(minute_llama))


def test_too_little_text_is_refused(minute_llama: Network) -> None:
    with pytest.raises(ValueError, match="not 1 of 9"):
        sequences(subject_of(minute_llama), 1, 9)
    with pytest.raises(ValueError, match="not 6 of 1"):
        sequences(subject_of(minute_llama), 100, 1)
    assert torch.equal(sequences(subject_of(minute_llama), 2, 5), TOKENS[:2, :5])


def test_rounding_errors_are_kept_as_long_as_there_is_room(
    minute_llama: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[str, Integer]] = []
    original = Subject.delta

    def counting(self: Subject, linear: str, fmt: Integer) -> Tensor:
        computed.append((linear, fmt))
        return original(self, linear, fmt)

    monkeypatch.setattr(Subject, "delta", counting)
    name, subject = minute_llama.linears[0], subject_of(minute_llama)
    errors = RoundingErrors(subject, room=4 * minute_llama.linear(name).weight.numel())
    for _ in range(3):
        for fmt in FORMATS:
            assert torch.equal(errors(name, fmt), original(subject, name, fmt))
    assert computed == [(name, FORMATS[0])] + 3 * [(name, FORMATS[1])]


def test_samples_have_means_and_standard_errors() -> None:
    samples = Samples(["a", "b"])
    for row in ({"a": 1.0}, {"a": 2.0, "b": 3.0}, {"a": 6.0}):
        samples.add(row)
    found = samples.result(Cost(), scale=2)
    assert found.values == {"a": 6.0, "b": 2.0}
    assert found.error["a"] == pytest.approx(2 * sqrt((4 + 1 + 9) / 2 / 3))
    assert found.error["b"] == pytest.approx(2 * sqrt((1 + 4 + 1) / 2 / 3))
