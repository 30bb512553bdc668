"""The criteria by which NNCF chooses between INT4 and INT8 (openvinotoolkit/nncf, weight compression,
`mixed_precision.py`).

NNCF rounds linears to INT4 in ascending order of a criterion, until a share of all weights is reached; the others
stay in its backup format, INT8, asymmetric, per output channel. All but one of its criteria divide by the error of
this backup format: other things equal, a linear that INT8 already hurts is *more* likely to become INT4.

Differences from NNCF, whose activations are averages over samples (sequences) of a number for each: statistics
here are over all calibration tokens at once. Variances therefore include those between sequences, and maxima over
tokens, or over channels, are not averaged over sequences. The backup format's range contains zero and its scale is
in fp16, as everywhere in this project.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Stat
from methods.formats.base import Format
from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.base import METRICS, Losses, Metric, Sensitivity, Subject, exact

BACKUP = Integer(8)
EPSILON = torch.finfo(torch.float32).eps
"""NNCF takes that of the checkpoint's dtype. In half precision it would swamp the error it is added to."""


@dataclass(frozen=True)
class Criterion(Metric):
    """A score of NNCF: the larger, the sooner a linear gets the wide format."""

    @abstractmethod
    def score(self, subject: Subject, linear: str) -> float:
        """The score of one linear."""

    def __call__(self, subject: Subject) -> Sensitivity:
        with subject.cost() as cost:
            values = {name: self.score(subject, name) for name in subject.network.linears}
        return exact(values, cost)

    def losses(self, found: Sensitivity, network: Network, formats: Sequence[Format]) -> Losses:
        """Score × 4^(−bits), so that linears are ordered by score in every format, and by score is what a wider
        format saves.

        4^(−bits) is how squared rounding errors fall with the width. The linear's own error, which the default
        multiplies by, would undo what the scores divide by, and with it NNCF's order.
        """
        return {name: {f: found.values[name] * 4.0**-f.bits for f in formats} for name in network.linears}


@METRICS.register("nncf_weight_error")
@dataclass(frozen=True)
class WeightError(Criterion):
    """NNCF `weight_quantization_error`: 1 / (largest mean squared INT8 error of an output channel + ε)."""

    def score(self, subject: Subject, linear: str) -> float:
        worst = subject.delta(linear, BACKUP).square().mean(1).max()
        return 1 / (float(worst) + EPSILON)


@METRICS.register("nncf_hessian")
@dataclass(frozen=True)
class HessianInput(Criterion):
    """NNCF `hessian_input_activation` (class `HAWQCriterion`): twice the mean square of the linear's input, that is
    the mean diagonal of the Hessian 2 E[x xᵀ] of its output error, times ‖Q(W) − W‖ in INT8, not squared.

    NNCF means an average over samples, but divides its running sum by the size of every new sample, so that
    nearly all weight is on the last one. Here it is the average.
    """

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MEAN_SQUARE})

    def score(self, subject: Subject, linear: str) -> float:
        curvature = 2 * float(subject.statistics(Stat.MEAN_SQUARE, linear).mean())
        return curvature * float(subject.delta(linear, BACKUP).norm())


@dataclass(frozen=True)
class ActivationCriterion(WeightError):
    """A number that describes the linear's input, times the inverse INT8 error of its weight."""

    @abstractmethod
    def activation(self, subject: Subject, linear: str) -> float:
        """The number."""

    def score(self, subject: Subject, linear: str) -> float:
        return self.activation(subject, linear) * super().score(subject, linear)


@METRICS.register("nncf_mean_variance")
@dataclass(frozen=True)
class MeanVariance(ActivationCriterion):
    """NNCF `mean_activation_variance`: the variance of an input channel over tokens, mean over channels, times the
    inverse INT8 error."""

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MEAN, Stat.MEAN_SQUARE})

    def activation(self, subject: Subject, linear: str) -> float:
        return float(variance(subject, linear).mean())


@METRICS.register("nncf_max_variance")
@dataclass(frozen=True)
class MaxVariance(ActivationCriterion):
    """NNCF `max_activation_variance`, its default where there are data: the variance of an input channel over
    tokens, maximum over channels, times the inverse INT8 error."""

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MEAN, Stat.MEAN_SQUARE})

    def activation(self, subject: Subject, linear: str) -> float:
        return float(variance(subject, linear).max())


@METRICS.register("nncf_mean_magnitude")
@dataclass(frozen=True)
class MeanMagnitude(ActivationCriterion):
    """NNCF `mean_activation_magnitude`: the maximum of |x| over tokens, mean over input channels, times the inverse
    INT8 error."""

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MAX_ABS})

    def activation(self, subject: Subject, linear: str) -> float:
        return float(subject.statistics(Stat.MAX_ABS, linear).mean())


def variance(subject: Subject, linear: str) -> Tensor:
    """The variance of each input channel over calibration tokens: fp64 [in]."""
    mean, square = (subject.statistics(stat, linear).double() for stat in (Stat.MEAN, Stat.MEAN_SQUARE))
    return (square - mean.square()).clamp(min=0)  # of a constant channel, rounding errors leave either sign
