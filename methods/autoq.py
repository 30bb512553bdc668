"""HAQ (Wang et al., CVPR 2019, arXiv 1811.08886) and its descendant, NNCF's AutoQ (removed in December 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.allocation.ddpg import DDPGAgent
from methods.base import register
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.output_error import OutputMSE


@register("autoq")
@dataclass(frozen=True)
class AutoQ(MixedPrecision):
    """A DDPG agent walks the groups, picks a width for each, and is rewarded with the measured loss at the end.

    Args:
        episodes: see `methods.allocation.ddpg`. HAQ runs 600, with a training epoch after each; here nothing is
            trained but the agent.
        judge_sequences: sequences of scoring text on which an episode is measured.
    """

    extra: ClassVar[str] = "rl"

    solver: str = "autoq"
    judge_sequences: int = 2
    episodes: int = DDPGAgent.episodes

    def sensitivity(self) -> OutputMSE:
        return OutputMSE()

    def allocation(self) -> DDPGAgent:
        return DDPGAgent(episodes=self.episodes)
