"""How good an agent is at a gymnasium task: what its episodes return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from envs.gym_vector import GymVectorEnv
from parts.acting import Sight
from routing.instances import TEST_SEED, VALIDATION_SEED
from training.agent import POLICY, Player, Trained
from training.evaluation import Report, interval

# An episode that has not ended after so many steps is counted as it stands.
LONGEST_EPISODE = 10_000
# How many lines about misbehaving environments are shown; each environment that crashed has one.
MOST_NOTICES = 3


class Episodes(NamedTuple):
    """Episodes of a gymnasium task, and the first of them step by step.

    `crashed` is how many of them a crash cut short, `bad_inputs` how many gave numbers that were not finite, `cut` how
    many had not ended after `LONGEST_EPISODE` steps.
    """

    returns: Float[Tensor, " I"]
    lengths: Int[Tensor, " I"]
    first: dict[str, Tensor]
    crashed: int
    bad_inputs: int
    cut: int


@torch.no_grad()
def play(
    player: Player,
    env: GymVectorEnv,
    *,
    episodes: int | None = None,
    after_step: Callable[[dict[int, int]], None] | None = None,
) -> Episodes:
    """Let a player play episodes by its mode: as many at once as there are environments.

    Args:
        player: plays; nothing random is drawn.
        env: of an evaluation, freshly made or lent, so that its seed decides the episodes.
        episodes: how many; as many as there are environments, where none are given.
        after_step: called after the reset and every step with the environments whose episode still runs, and which
            episode that is.
    """
    count = env.num_envs if episodes is None else episodes
    obs, info = env.reset()
    state = player.initial_state(env.num_envs)
    returns, lengths = np.zeros(count, np.float32), np.zeros(count, np.int64)
    prev_action = torch.zeros((1, *env.actions.shape), dtype=env.actions.dtype, device=env.device)
    rows: list[dict[str, Tensor]] = []
    ended, crashed, bad_inputs, cut = set[int](), set[int](), set[int](), set[int]()
    bad_inputs.update(info["bad_inputs"])
    while len(ended) < count:
        playing = {row: case for row, case in enumerate(env.cases) if case < count and case not in ended}
        if after_step is not None:
            after_step(playing)
        if playing.get(0) == 0:
            first = {name: value[:1] for name, value in obs.items()}
            rows.append({**first, "prev_action": prev_action, "is_first": info["is_first"][:1]})
        action, state = player.act(Sight.of(obs, info), state, generator=None)
        prev_action = action[:1]
        obs, reward, terminated, truncated, info = env.step(action)
        earned, over = reward.cpu().numpy(), (terminated | truncated).tolist()
        for row, case in playing.items():
            returns[case] += earned[row]
            lengths[case] += 1
            if not over[row] and lengths[case] >= LONGEST_EPISODE:
                cut.add(case)
                env.give_up(row)
            if over[row] or case in cut:
                ended.add(case)
        crashed.update(playing[row] for row in info["crashed"] if row in playing)
        # A row that has not played begins an episode in this step.
        bad_inputs.update(playing.get(row, env.cases[row]) for row in info["bad_inputs"])
    first_episode = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
    bad = sum(case < count for case in bad_inputs)
    return Episodes(torch.from_numpy(returns), torch.from_numpy(lengths), first_episode, len(crashed), bad, len(cut))


class GymEvaluator:
    """Episodes with fixed seeds, by their mean return."""

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        *,
        valid_episodes: int,
        eval_episodes: int,
        most_envs: int,
        device: torch.device,
        training_env: GymVectorEnv | None = None,
        pictures: Callable[[dict[str, Tensor]], dict[str, np.ndarray]] | None = None,
        **options: Any,
    ) -> None:
        """Remember how to make environments; each evaluation makes its own, or borrows those of training.

        Args:
            make_env: makes one.
            valid_episodes: of each evaluation during training.
            eval_episodes: of the final one; 0: there is none.
            most_envs: environments at once.
            device: where the agent lives.
            training_env: played in, where given: no environment is made.
            pictures: draws what the agent imagines of an episode.
            options: of environments that are made; see `GymVectorEnv`.
        """
        self.options, self.most_envs, self.training_env = options, most_envs, training_env
        self.make_env, self.device, self.pictures = make_env, device, pictures
        self.valid_episodes, self.eval_episodes = valid_episodes, eval_episodes

    def validate(self, agent: Trained) -> Report:
        """Episodes with the validation seeds."""
        return self._report(agent, self.valid_episodes, seed=VALIDATION_SEED)

    def test(self, agent: Trained) -> Report | None:
        """Episodes with the test seeds; None where there are to be none."""
        return self._report(agent, self.eval_episodes, seed=TEST_SEED) if self.eval_episodes else None

    @contextmanager
    def _environments(self, count: int, seed: int) -> Iterator[GymVectorEnv]:
        if self.training_env is not None:
            with self.training_env.lent(seed):
                yield self.training_env
            return
        env = GymVectorEnv(
            self.make_env,
            num_envs=min(count, self.most_envs),
            device=self.device,
            seed=seed,
            evaluation=True,
            **self.options,
        )
        try:
            yield env
        finally:
            env.close()

    def _report(self, agent: Trained, count: int, *, seed: int) -> Report:
        with self._environments(count, seed) as env:
            episodes = play(agent.players[POLICY], env, episodes=count)
            notices, crashes = _shortened(env.notices), tuple(env.crashes)
        pictures = {} if self.pictures is None else self.pictures(episodes.first)
        mean = float(episodes.returns.mean())
        values = {"return": mean, "length": float(episodes.lengths.float().mean())}
        summary = (
            f"{count} episodes, mean return {mean:.4g}{interval(episodes.returns)},"
            f" from {float(episodes.returns.min()):.4g} to {float(episodes.returns.max()):.4g}"
        )
        if episodes.crashed:
            values["restarts"] = episodes.crashed
            summary += f"; {episodes.crashed} cut short by crashes"
        if episodes.bad_inputs:
            values["bad_inputs"] = episodes.bad_inputs
            summary += f"; {episodes.bad_inputs} with numbers that were not finite"
        if episodes.cut:
            values["cut"] = episodes.cut
            summary += f"; {episodes.cut} cut at {LONGEST_EPISODE} steps"
            notices += (
                f"{episodes.cut} of {count} episodes had not ended after {LONGEST_EPISODE} steps and count as they"
                " stood; register the environment with max_episode_steps to end them sooner",
            )
        return Report(values, pictures, summary, notices, crashes)


def _shortened(notices: list[str]) -> tuple[str, ...]:
    more = len(notices) - MOST_NOTICES
    return (*notices[:MOST_NOTICES], *([f"and {more} more like these"] if more > 0 else []))
