import itertools
from collections.abc import Callable
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

from methods.network import Block, Group, Network
from methods.sensitivity.base import Subject
from methods.sensitivity.gauss_newton import ROUND, GaussNewton

TOKENS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


def subject_of(network: Network, tokens: Tensor, seed: int = 0) -> Subject:
    return Subject(network, tokens, tokens, (), lambda stat, linear: torch.empty(0), seed)


def dense_gauss_newton(network: Network, tokens: Tensor, linear: str) -> Tensor:
    """Jᵀ (diag p − ppᵀ) J, averaged over predicted tokens: [n, n] in the n weights of one linear."""

    def logits(flat: Tensor) -> Tensor:
        parameters = {f"{linear}.weight": flat.view(network.shape(linear))}
        out = functional_call(network.model, parameters, kwargs={"input_ids": tokens, "use_cache": False}).logits
        return out[:, :-1].flatten(0, 1)

    weight = network.weight(linear).flatten()
    with torch.no_grad():
        p = logits(weight).softmax(-1)
        j = jacfwd(logits)(weight)  # [tokens, vocabulary, n]
    mean = torch.einsum("tv,tvn->tn", p, j)
    return (torch.einsum("tv,tvn,tvm->nm", p, j, j) - mean.T @ mean) / len(p)


def test_the_trace_is_that_of_the_dense_matrix(minute_llama: Network) -> None:
    metric = GaussNewton(tolerance=0, max_draws=4)
    runs = [metric(subject_of(minute_llama, TOKENS, seed)) for seed in range(80)]
    for name in minute_llama.linears:
        estimates = [run.values[name] for run in runs]
        error = stdev(estimates) / len(runs) ** 0.5
        truth = float(dense_gauss_newton(minute_llama, TOKENS, name).trace())
        assert error < 0.1 * truth
        assert abs(fmean(estimates) - truth) < 4 * error


class Softmax(nn.Module):
    """Logits that are linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 5, bias=False)])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in self.parameters():
                nn.init.normal_(parameter)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.layers[0](self.embedding(input_ids)))


@pytest.fixture
def softmax() -> Network:
    return Network(Softmax(), (Block("layers.0", (Group(("layers.0",), None, "layers.0"),)),))


def test_where_logits_are_linear_it_is_the_hessian(
    softmax: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, once the mean over drawn labels is replaced by the expectation over all of them."""
    tokens = TOKENS[:, :4] % 5
    expected = 0.0
    for text in tokens:
        p = softmax.logits(text[None])[0, :-1].softmax(-1).detach()
        for labels in itertools.product(range(5), repeat=3):
            drawn = torch.tensor(labels)
            monkeypatch.setattr("methods.sensitivity.gradients.draw", lambda logits, generator, drawn=drawn: drawn)
            found = GaussNewton(tolerance=0, max_draws=2)(subject_of(softmax, text.expand(2, -1)))
            expected += found.values["layers.0"] * float(p[range(3), drawn].prod()) / len(tokens)
    assert expected == pytest.approx(float(dense_hessian(softmax, tokens, "layers.0").trace()), rel=1e-4)


def test_standard_errors_are_honest(softmax: Network) -> None:
    text = TOKENS[:1].expand(2, -1) % 5  # one sequence, since only the labels are to vary
    runs = [GaussNewton(tolerance=0, max_draws=16)(subject_of(softmax, text, seed)) for seed in range(60)]
    spread = stdev(run.values["layers.0"] for run in runs)
    claimed = fmean(run.error["layers.0"] ** 2 for run in runs) ** 0.5
    assert 0.75 < claimed / spread < 1.33  # 60 runs know their spread to 9 %


def test_it_stops_when_all_are_precise_enough(minute_llama: Network) -> None:
    found = GaussNewton(tolerance=0.2)(subject_of(minute_llama, TOKENS))
    floor = sorted(found.values.values())[len(found.values) // 2]
    assert all(error <= 0.2 * max(found.values[name], floor) for name, error in found.error.items())
    assert 2 * ROUND <= found.cost.passes < 2 * 256
    assert GaussNewton(tolerance=1e9)(subject_of(minute_llama, TOKENS)).cost.passes == 2 * ROUND
    assert GaussNewton(tolerance=0, max_draws=3)(subject_of(minute_llama, TOKENS)).cost.passes == 6


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="at least 2 draws"):
        GaussNewton(max_draws=1)
    with pytest.raises(ValueError, match="tolerance=-1"):
        GaussNewton(tolerance=-1)
