import random
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from methods.allocation.base import SOLVERS, Problem
from methods.allocation.ddpg import DDPGAgent, Noise, Walk, isolated
from methods.formats.integer import Integer

TWO, THREE, FOUR, EIGHT = FORMATS = [Integer(2), Integer(3), Integer(4), Integer(8)]
SMALL = DDPGAgent(episodes=12, warm_up=4, hidden=16, batch_size=8)


def problem(seed: int = 0, limit: float = 3.5, groups: int = 5, **options) -> Problem:
    rng = random.Random(seed)
    sizes = [rng.choice([10, 20, 30]) for _ in range(groups)]
    losses = {f"g{i}": {f: rng.lognormvariate(0, 1) * 4.0**-f.width for f in FORMATS} for i in range(groups)}
    costs = {f"g{i}": {f: n * f.width for f in FORMATS} for i, n in enumerate(sizes)}
    return Problem(losses, costs, sum(sizes), limit, **{"slack": 0.5, "seed": seed, **options})


def walk(given: Problem) -> Walk:
    return Walk(given, *given.window)


def test_the_solver_is_found_by_name() -> None:
    assert SOLVERS["autoq"] is DDPGAgent


def test_actions_share_the_interval_equally_among_the_options() -> None:
    """HAQ's rounding: with b_min..b_max the whole numbers, round((b_max − b_min + 1)·a + b_min − ½)."""
    given = problem(limit=8)
    episode, chosen = walk(given), []
    for action in np.linspace(0, 1, 4001):
        episode.reset()
        episode.step(float(action))
        chosen.append(episode.rungs[0])
    assert chosen == sorted(chosen)
    assert [chosen.count(rung) / 4001 for rung in range(4)] == pytest.approx([0.25] * 4, abs=1e-3)


def test_the_wall_lowers_one_option_at_a_time_from_the_last_group_back() -> None:
    """Five groups of one size from 4 bits: 2 of them (the last) go to 3 bits, then further round."""
    costs = {f"g{i}": {f: 10 * f.width for f in FORMATS} for i in range(5)}
    for limit, expected in ((4.0, [4, 4, 4, 4, 4]), (3.6, [4, 4, 4, 3, 3]), (2.8, [3, 3, 3, 3, 2])):
        episode = walk(Problem(costs, costs, 50, limit))
        for _ in range(5):
            _, _, over = episode.step(0.6)  # the third of four options
        assert over
        assert [fmt.bits for fmt in episode.plan.values()] == expected


def test_a_plan_below_the_window_is_raised_from_the_first_group_on() -> None:
    costs = {f"g{i}": {f: 10 * f.width for f in FORMATS} for i in range(5)}
    for limit, expected in ((2.6, [3, 3, 3, 2, 2]), (3.2, [4, 3, 3, 3, 3])):
        episode = walk(Problem(costs, costs, 50, limit))
        for _ in range(5):
            episode.step(0.0)
        assert [fmt.bits for fmt in episode.plan.values()] == expected
        assert episode.best == episode.plan


def test_the_reward_does_not_depend_on_the_unit_or_the_offset_of_the_loss() -> None:
    given = problem()
    other = problem(judge=lambda plan: 40.0 + 1000.0 * given.loss(plan))
    for actions in product((0.1, 0.9), repeat=5):
        rewards = []
        for episode in (walk(given), walk(other)):
            for action in actions:
                _, reward, over = episode.step(action)
            assert over
            rewards.append(reward)
        assert rewards[0] == pytest.approx(rewards[1], rel=1e-6, abs=1e-9)
        assert -1 <= rewards[0] <= 1


def test_a_better_plan_has_a_higher_reward_and_uniform_has_none() -> None:
    given = problem(limit=4.0)
    episode, found = walk(given), []
    for actions in product((0.1, 0.6, 0.9), repeat=5):
        episode.reset()
        for action in actions:
            _, reward, _ = episode.step(action)
        found.append((given.loss(episode.plan), reward))
        if set(episode.plan.values()) == {FOUR}:
            assert reward == 0
    found.sort()
    assert [reward for _, reward in found] == sorted((reward for _, reward in found), reverse=True)
    assert given.loss(episode.best) == found[0][0]


def test_a_plan_tried_before_is_not_measured_again() -> None:
    calls = []
    episode = walk(problem(judge=lambda plan: float(len(calls.append(plan) or calls))))
    rewards = []
    for _ in range(3):
        episode.reset()
        rewards.append([episode.step(0.4)[1] for _ in range(5)][-1])
    assert len(calls) == 2 + 1, "the uniform plan and the dearest one, which scale the reward, and this one"
    assert rewards == rewards[:1] * 3


def test_states_hold_the_features_of_the_next_group_and_the_previous_action() -> None:
    losses = {f"g{i}": {f: (i - 2.0) * 100**i * 4.0**-f.width for f in FORMATS} for i in range(5)}
    episode = walk(Problem(losses, problem().costs, problem().divisor, 3.5))
    states = [episode.reset(), *(episode.step(0.3)[0] for _ in range(5))]
    assert all(((state >= 0) & (state <= 1)).all() and state.dtype == np.float32 for state in states)
    assert [float(state[0]) for state in states] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [float(state[-1]) for state in states] == pytest.approx([1] + [0.3] * 5)


def test_noise_starts_after_the_warm_up_and_decays_by_episode() -> None:
    noise = Noise(0.5, 0.9, warm_up=2, rng=np.random.default_rng(0))
    deviations = []
    for _ in range(5):
        deviations.append(np.std([noise() for _ in range(4000)]))
        noise.reset()
    assert deviations[:2] == [0, 0]
    assert deviations[2:] == pytest.approx([1, 0.9, 0.81], rel=0.05)


def states() -> tuple:
    """The global random states."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_global_random_states_are_put_back() -> None:
    before = states()
    with pytest.raises(KeyError), isolated():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyError
    assert states() == before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ImportError, match=r"pip install 'hawq-bench\[rl\]'"):
        DDPGAgent()(problem())


@pytest.fixture
def packages() -> None:
    pytest.importorskip("stable_baselines3", reason="needs the extra rl: pip install 'hawq-bench[rl]'")


@pytest.mark.usefixtures("packages")
def test_the_best_plan_seen_is_returned_and_every_plan_is_inside_the_window() -> None:
    seen = []

    def judge(plan: dict) -> float:
        seen.append(plan)
        return given.loss(plan)

    given = problem()
    judged = problem(judge=judge)
    plan = SMALL(judged)
    tried = seen[2:]  # after the uniform plan and the dearest one, which scale the reward
    low, high = judged.window
    assert all(low <= judged.cost(p) <= high for p in tried)
    assert 1 < len(tried) <= SMALL.episodes
    assert len({tuple(p.values()) for p in tried}) == len(tried), "no plan is measured twice"
    assert given.loss(plan) == min(map(given.loss, tried))


@pytest.mark.usefixtures("packages")
def test_the_seed_decides_whatever_the_global_state_and_leaves_it_alone() -> None:
    def tried(seed: int) -> list[tuple]:
        seen: list[tuple] = []
        plain = problem(limit=4.2)
        before = states()
        SMALL(replace(plain, seed=seed, judge=lambda plan: seen.append(tuple(plan.values())) or plain.loss(plan)))
        assert states() == before
        return seen

    first = tried(0)
    torch.rand(3)
    np.random.rand(3)
    random.random()
    assert tried(0) == first
    assert tried(1) != first


@pytest.mark.usefixtures("packages")
def test_actor_and_critic_learn_at_their_own_rates() -> None:
    agent = SMALL._agent(walk(problem()), seed=0)
    agent.learn(SMALL.episodes * 5)
    assert agent._n_updates == (SMALL.episodes - SMALL.warm_up) * 5
    assert [group["lr"] for group in agent.actor.optimizer.param_groups] == [1e-4]
    assert [group["lr"] for group in agent.critic.optimizer.param_groups] == [1e-3]


@pytest.mark.usefixtures("packages")
def test_the_steps_of_an_episode_share_its_reward_equally() -> None:
    given = problem(limit=8, slack=8)
    losses: list[float] = []
    episode = walk(replace(given, judge=lambda plan: losses.append(given.loss(plan)) or losses[-1]))
    uniform, dearest = losses
    agent = SMALL._agent(episode, seed=0)
    agent.learn(3 * 5)
    shares = agent.replay_buffer.rewards[: 3 * 5, 0].reshape(3, 5)
    rewards = np.tanh((uniform - np.array(losses[2:])) / (abs(uniform - dearest) or 1.0))
    assert shares == pytest.approx(np.repeat(rewards[:, None] / 5, 5, axis=1), rel=1e-5)
    assert agent.replay_buffer.dones[: 3 * 5, 0].reshape(3, 5).tolist() == [[0, 0, 0, 0, 1]] * 3


@pytest.mark.usefixtures("packages")
def test_the_agent_learns() -> None:
    """Every other group is better off narrow, and there is room for all: from its features the agent can tell."""
    losses = {f"g{i}": {TWO: float(i % 2), EIGHT: float(1 - i % 2)} for i in range(4)}
    costs = {group: {TWO: 2, EIGHT: 8} for group in losses}
    episode = walk(Problem(losses, costs, 4, 8, slack=8))
    solver = DDPGAgent(episodes=100, hidden=32)
    with isolated():
        agent = solver._agent(episode, seed=0)
        agent.learn(solver.episodes * 4)
        state = episode.reset()
        for _ in losses:
            action, _ = agent.predict(state, deterministic=True)
            state, _, _ = episode.step(float(action[0]))
    assert episode.problem.loss(episode.plan) == 0
