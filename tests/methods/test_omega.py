from collections.abc import Callable, Mapping
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.base import METRICS, Metric, Subject, entry
from methods.sensitivity.eigenvalue import TopEigenvalue
from methods.sensitivity.hutchinson import Hutchinson
from methods.sensitivity.omega import HAWQV1Omega, HAWQV2Omega, QBERTOmega, QBERTScore

TOKENS = torch.randint(96, (6, 7), generator=torch.Generator().manual_seed(1))
FORMATS = (Integer(2, 32), Integer(4, 32), Integer(4, 0, symmetric=True))
EXACT: dict[str, Any] = {"tolerance": 1e-7, "max_iterations": 2000}


class Memory(dict[str, dict[str, Tensor]]):
    """Remembers as the harness does: by name and options, whatever the subject."""

    def __call__(
        self, name: str, options: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        key = f"{name} {sorted(options.items())}"
        if key not in self:
            self[key] = compute()
        return self[key]

    @property
    def names(self) -> list[str]:
        return sorted(key.split()[0] for key in self)


def subject(network: Network, tokens: Tensor = TOKENS, memory: Memory | None = None) -> Subject:
    return Subject(
        network,
        tokens,
        tokens,
        FORMATS,
        lambda stat, linear: torch.empty(0),
        memo=Memory() if memory is None else memory,
    )


def squared_error(network: Network, name: str, fmt: Integer) -> float:
    weight = network.weight(name)
    return float((fmt.fit(weight).snap(weight) - weight).norm() ** 2)


SPECTRA = {"a": [200.0, 2.0, 1.0], "b": [3.0, -7.0, 1.0], "c": [-5.0, -4.0, -1.0, 0.0]}


@pytest.mark.parametrize(
    ("metric", "curvatures"),
    [
        (HAWQV1Omega(**EXACT), {"a": 200, "b": 7, "c": 5}),
        (HAWQV2Omega(), {"a": 203 / 3, "b": -3 / 3, "c": -10 / 4}),
        (QBERTOmega(**EXACT), {"a": 200, "b": 7, "c": 5}),  # this loss is the same on every shard
    ],
)
def test_omega_is_curvature_times_squared_error(
    metric: Metric, curvatures: dict[str, float], quadratic: Callable[..., Network]
) -> None:
    network = quadratic(SPECTRA)
    found = subject(network).measure(metric)
    assert set(found.values) == set(found.error) == {entry(n, f) for n in SPECTRA for f in FORMATS}
    losses = metric.losses(found, network, FORMATS)
    for name, curvature in curvatures.items():
        for fmt in FORMATS:
            assert losses[name][fmt] == pytest.approx(curvature * squared_error(network, name, fmt), rel=1e-3)


def test_standard_errors_are_priced_like_the_values(minute_llama: Network) -> None:
    trace = subject(minute_llama).measure(Hutchinson(max_probes=4))
    omega = subject(minute_llama).measure(HAWQV2Omega(max_probes=4))
    for name in minute_llama.linears:
        assert trace.error[name] > 0
        for fmt in FORMATS:
            price = squared_error(minute_llama, name, fmt) / minute_llama.weight(name).numel()
            assert omega.error[entry(name, fmt)] == pytest.approx(price * trace.error[name], rel=1e-4)


def test_q_bert_adds_the_spread_over_disjoint_shards(
    minute_llama: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor]
) -> None:
    score = subject(minute_llama).measure(QBERTScore(tolerance=1e-5, max_iterations=500, shards=3))
    for name in minute_llama.linears:
        eigenvalues = []
        for shard in (TOKENS[0:2], TOKENS[2:4], TOKENS[4:6]):
            spectrum = torch.linalg.eigvalsh(dense_hessian(minute_llama, shard, name))
            eigenvalues.append(float(spectrum[spectrum.abs().argmax()]))
        assert pstdev(eigenvalues) > 0.05 * abs(fmean(eigenvalues))
        assert score.values[name] == pytest.approx(abs(fmean(eigenvalues)) + pstdev(eigenvalues), rel=5e-3)


def test_q_bert_with_one_shard_is_hawq(minute_llama: Network) -> None:
    hawq = subject(minute_llama).measure(HAWQV1Omega(max_iterations=3))
    qbert = subject(minute_llama).measure(QBERTOmega(max_iterations=3, shards=1))
    assert qbert.values == hawq.values


def test_curvature_is_measured_once_for_all(minute_llama: Network) -> None:
    memory = Memory()
    mine = subject(minute_llama, memory=memory)
    fast = {"max_iterations": 2}
    score = mine.measure(TopEigenvalue(**fast))
    omega = mine.measure(HAWQV1Omega(**fast))
    mine.measure(HAWQV2Omega(max_probes=2))
    mine.measure(Hutchinson(max_probes=2))
    mine.measure(QBERTOmega(**fast))
    assert memory.names == ["eigenvalue", "hawq_v1", "hawq_v2", "hutchinson", "qbert", "qbert_score"]
    assert omega.cost.passes == score.cost.passes > 0
    assert omega.cost.seconds > score.cost.seconds


def test_shards_are_not_mistaken_for_the_whole_text(minute_llama: Network) -> None:
    metric = QBERTScore(max_iterations=2, shards=3)
    memory = Memory()
    subject(minute_llama, memory=memory).measure(TopEigenvalue(max_iterations=2))
    recalled = subject(minute_llama, memory=memory).measure(metric)
    assert recalled.values == metric(subject(minute_llama)).values
    assert recalled.cost.passes == 3 * (2 + 2 * len(minute_llama.linears))


@pytest.mark.parametrize(
    ("metric", "measured", "options"),
    [
        ("hawq_v1", TopEigenvalue, {"tolerance": 0.5, "max_iterations": 2, "sequences": 1, "context": 5}),
        ("hawq_v2", Hutchinson, {"tolerance": 0.5, "max_probes": 2, "context": 5, "blockwise": True}),
    ],
)
def test_options_reach_the_measurement(
    metric: str, measured: type[Metric], options: dict[str, Any], minute_llama: Network
) -> None:
    memory, other = Memory(), Memory()
    subject(minute_llama, memory=memory).measure(METRICS[metric](**options))
    subject(minute_llama, memory=other).measure(measured(**options))
    assert set(other) < set(memory)


def test_senseless_options_are_refused(minute_llama: Network) -> None:
    with pytest.raises(ValueError, match="not positive"):
        QBERTScore(shards=0)
    with pytest.raises(ValueError, match="must be positive"):
        QBERTScore(sequences=0)
    with pytest.raises(ValueError, match="6 sequences cannot make 7 shards"):
        QBERTScore(shards=7)(subject(minute_llama))
