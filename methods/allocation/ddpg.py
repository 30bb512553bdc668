"""Allocation by reinforcement learning: HAQ (Wang et al., CVPR 2019, arXiv 1811.08886), and NNCF's AutoQ after it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, tanh
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.completion import by_cost, completed, dearest, reachable
from methods.allocation.controls import Uniform


@SOLVERS.register("autoq")
@dataclass(frozen=True)
class DDPGAgent(Solver):
    """A DDPG agent walks through the groups, choosing one option a step; plans are judged by `Problem.measured`.

    Actions, wall and hyper-parameters are those of HAQ's code. The reward, known at the end of an episode, is
    rescaled to order 1 and shared equally among its steps, as in NNCF. The result is the best plan seen inside the
    window. Differences from HAQ: nothing is fine-tuned before a plan is judged; no group is pinned to 8 bits; the
    state holds what `Problem` knows of a group instead of the shape of a convolution; exploration noise is clipped
    to the range of actions rather than drawn from a truncated normal distribution; and the moving average that HAQ
    subtracts from rewards is left out.

    Needs stable-baselines3 and gymnasium. The problem's seed decides everything; the global random states that
    stable-baselines3 seeds are put back.

    Args:
        episodes: plans tried (HAQ: 600). A plan tried before is not measured again.
        warm_up: of these, at first, of uniformly random actions.
        hidden: units of each of the two hidden layers of actor and critic.
        actor_rate, critic_rate: learning rates.
        batch_size, memory: transitions a gradient step; transitions remembered for each group.
        target_rate: step of the target networks towards the trained ones (τ).
        noise, noise_decay: standard deviation of the exploration noise on an action in [0, 1] at first, and what
            it is multiplied by after each episode.
    """

    episodes: int = 300
    warm_up: int = 20
    hidden: int = 300
    actor_rate: float = 1e-4
    critic_rate: float = 1e-3
    batch_size: int = 64
    memory: int = 128
    target_rate: float = 0.01
    noise: float = 0.5
    noise_decay: float = 0.99

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        if not reachable(problem, low, high):
            return None
        walk = Walk(problem, low, high)
        with isolated():
            agent = self._agent(walk, problem.seed)
            agent.learn(self.episodes * len(problem.costs))
        return walk.best if walk.best is not None else completed(problem, walk.plan, low, high)

    def _agent(self, walk: Walk[Choice], seed: int) -> Any:
        """An agent of stable-baselines3 in front of the walk."""
        try:
            from stable_baselines3 import DDPG
        except ImportError as error:
            raise ImportError("the autoq solver needs stable-baselines3: pip install 'hawq-bench[rl]'") from error
        groups = len(walk.problem.costs)
        exploration: Any = Noise(self.noise, self.noise_decay, self.warm_up, np.random.default_rng(seed))
        agent: Any = DDPG(
            "MlpPolicy",
            _environment(walk),
            buffer_size=self.memory * groups,
            replay_buffer_class=_shared_rewards(),
            learning_starts=self.warm_up * groups,
            batch_size=self.batch_size,
            tau=self.target_rate,
            gamma=1.0,
            train_freq=(1, "episode"),
            gradient_steps=-1,  # as many as the episode had steps
            action_noise=exploration,
            policy_kwargs={"net_arch": [self.hidden, self.hidden]},
            seed=seed,
            device="cpu",
        )
        # The library would set one rate for both at each update.
        agent._update_learning_rate = lambda _: None
        for network, rate in ((agent.actor, self.actor_rate), (agent.critic, self.critic_rate)):
            for group in network.optimizer.param_groups:
                group["lr"] = rate
        return agent


@dataclass
class Walk(Generic[Choice]):
    """One episode after another over the groups of a problem.

    Attributes:
        plan: that of the last finished episode.
        best: the best plan so far that costs between `low` and `high`.
    """

    problem: Problem[Choice]
    low: int
    high: int
    plan: dict[str, Choice] = field(default_factory=dict)
    best: dict[str, Choice] | None = None

    def __post_init__(self) -> None:
        self.ladders = {group: by_cost(self.problem, group) for group in self.problem.costs}
        self.features = _features(self.problem, self.ladders)  # [groups, features]
        self.measured: dict[tuple[int, ...], float] = {}
        self.least = inf
        flat = Uniform()(self.problem)
        self.reference = self.problem.measured(flat)
        self.scale = abs(self.reference - self.problem.measured(dearest(self.problem))) or 1.0
        self.reset()

    def reset(self) -> NDArray[np.float32]:
        """Start an episode; returns the first state."""
        self.rungs: list[int] = []
        return self._state(1.0)

    def step(self, action: float) -> tuple[NDArray[np.float32], float, bool]:
        """Choose for the next group. Returns the next state, the reward, and whether the episode is over."""
        count = len(list(self.ladders.values())[len(self.rungs)])
        # Each option has a share of [0, 1] of the same length; HAQ: round((b_max − b_min + 1)·a + b_min − ½).
        self.rungs.append(min(max(round(action * count - 0.5), 0), count - 1))
        if len(self.rungs) < len(self.ladders):
            return self._state(action), 0.0, False
        return np.append(self.features[-1], action).astype(np.float32), self._finish(), True

    def _state(self, action: float) -> NDArray[np.float32]:
        """Features of the next group and the previous action."""
        return np.append(self.features[len(self.rungs)], action).astype(np.float32)

    def _finish(self) -> float:
        """Bring the plan into the window, measure it, and return the reward: 0 for what a uniform plan loses,
        tanh(1) for what the dearest options lose."""
        self._lower()
        self._raise()
        key = tuple(self.rungs)
        self.plan = {group: options[rung] for (group, options), rung in zip(self.ladders.items(), key, strict=True)}
        if key not in self.measured:
            self.measured[key] = self.problem.measured(self.plan)
        loss = self.measured[key]
        if loss < self.least and self.low <= self.problem.cost(self.plan):
            self.best, self.least = self.plan, loss
        return tanh((self.reference - loss) / self.scale)

    def _lower(self) -> None:
        """HAQ's wall: from the last group to the first, and again, one option down until the plan fits."""
        ladders = [[self.problem.costs[group][option] for option in rungs] for group, rungs in self.ladders.items()]
        cost = sum(costs[rung] for costs, rung in zip(ladders, self.rungs, strict=True))
        while cost > self.high:
            for place, costs in reversed(list(enumerate(ladders))):
                if cost > self.high and self.rungs[place] > 0:
                    self.rungs[place] -= 1
                    cost -= costs[self.rungs[place] + 1] - costs[self.rungs[place]]

    def _raise(self) -> None:
        """The wall's mirror image: from the first group to the last, one option up wherever it fits, until the
        plan is inside the window."""
        ladders = [[self.problem.costs[group][option] for option in rungs] for group, rungs in self.ladders.items()]
        cost = sum(costs[rung] for costs, rung in zip(ladders, self.rungs, strict=True))
        before = None
        while cost < self.low and self.rungs != before:
            before = list(self.rungs)
            for place, costs in enumerate(ladders):
                rung = self.rungs[place]
                if cost < self.low and rung + 1 < len(costs) and cost + costs[rung + 1] - costs[rung] <= self.high:
                    self.rungs[place] += 1
                    cost += costs[rung + 1] - costs[rung]


@dataclass
class Noise:
    """Normal exploration noise that shrinks from episode to episode; none while actions are random anyway.

    stable-baselines3 adds it to actions scaled to [−1, 1], hence the factor 2.
    """

    deviation: float
    decay: float
    warm_up: int
    rng: np.random.Generator
    episode: int = 0

    def __call__(self) -> NDArray[np.float64]:
        if self.episode < self.warm_up:
            return np.zeros(1)
        return self.rng.normal(0, 2 * self.deviation * self.decay ** (self.episode - self.warm_up), 1)

    def reset(self) -> None:
        """Called at the end of an episode."""
        self.episode += 1


def _features(problem: Problem[Choice], ladders: dict[str, list[Choice]]) -> NDArray[np.float64]:
    """Place in the network, log of the lowest and of the highest cost, loss at each of the two: each scaled to
    [0, 1] over the groups. Losses, which may be negative, go through asinh, a logarithm for large values."""
    ends = [(group, options[0], options[-1]) for group, options in ladders.items()]
    costs = np.array([[problem.costs[group][option] for option in pair] for group, *pair in ends], dtype=float)
    losses = np.array([[problem.losses[group][option] for option in pair] for group, *pair in ends])
    unit = np.median(np.abs(losses[losses != 0])) if losses.any() else 1.0
    place = np.arange(len(ends), dtype=float)[:, None]
    features = np.hstack([place, np.log1p(costs), np.arcsinh(losses / unit)])
    span = np.ptp(features, axis=0)
    return (features - features.min(axis=0)) / np.where(span > 0, span, 1.0)


def _environment(walk: Walk[Any]) -> Any:
    """A gymnasium environment around a walk."""
    from gymnasium import Env
    from gymnasium.spaces import Box

    class Groups(Env):
        observation_space = Box(0.0, 1.0, (walk.features.shape[1] + 1,), np.float32)
        action_space = Box(0.0, 1.0, (1,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
            super().reset(seed=seed, options=options)
            return walk.reset(), {}

        def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict]:
            state, reward, over = walk.step(float(action[0]))
            return state, reward, over, False, {}

    return Groups()


def _shared_rewards() -> Any:
    """A replay memory that learns of an episode when it is over, with its reward shared equally among the steps."""
    from stable_baselines3.common.buffers import ReplayBuffer

    class SharedRewards(ReplayBuffer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.episode: list[list[Any]] = []

        def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: Any) -> None:
            self.episode.append([obs, next_obs, action, reward, done, infos])
            if done.all():
                share = sum(step[3] for step in self.episode) / len(self.episode)
                for obs, next_obs, action, _, done, infos in self.episode:
                    super().add(obs, next_obs, action, share, done, infos)
                self.episode = []

    return SharedRewards


@contextmanager
def isolated() -> Iterator[None]:
    """Put the global random states of Python, numpy and torch back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
