"""How good an agent is: its greedy tours beside reference tours, or what its episodes of any other task return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium
import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from config import UserError
from envs.gym_vector import Crash, GymVectorEnv
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from parts.acting import Sight
from routing.drawing import draw_tour
from routing.instances import TEST_SEED, VALIDATION_SEED
from routing.rules import Instance, each_part
from system.safe_files import replacing
from training.agent import Agent

# Pictures by name, of whatever an agent can show: called with instances, or with an episode.
Pictures = Callable[[Instance], dict[str, np.ndarray]] | Callable[[dict[str, Tensor]], dict[str, np.ndarray]]
# An episode that has not ended by then is counted as it stands.
LONGEST_EPISODE = 10_000
# Of the lines about misbehaving environments; each environment that crashed has one.
MOST_NOTICES = 3


class Report(NamedTuple):
    """The outcome of an evaluation: figures and pictures by name, one line to read, and what went wrong.

    `notices` are lines to read about that, `crashes` the environments that crashed and were replaced.
    """

    values: dict[str, float]
    pictures: dict[str, np.ndarray]
    summary: str
    notices: tuple[str, ...] = ()
    crashes: tuple[Crash, ...] = ()


@runtime_checkable
class Evaluator(Protocol):
    """Judges an agent while it trains (`validate`) and once at the end (`test`), on cases that never change.

    `test` gives None where it is switched off.
    """

    def validate(self, agent: Agent) -> Report: ...

    def test(self, agent: Agent) -> Report | None: ...


class Evaluation(NamedTuple):
    """Instances of a routing problem with the costs of their reference tours, and what those depend on in secret."""

    instance: Instance
    references: Float[np.ndarray, " I"]
    factors: Float[Tensor, "I F"] | None = None

    @property
    def coords(self) -> Float[Tensor, "I N 2"]:
        """Where the nodes lie."""
        return self.instance.coords


def percent_above(cost: float, reference: float) -> float:
    """How much more than a reference a cost is, in percent of the reference's size; NaN where that is 0.

    Where rewards are earned costs are negative, and to earn less than the reference is positive all the same.
    """
    if reference == 0:
        return math.nan
    return math.copysign(100.0, reference) * (cost / reference - 1)


class Result(NamedTuple):
    """How an agent did on an `Evaluation`. Closed tours from their first node; it is repeated where a tour is short."""

    lengths: Float[Tensor, " I"]
    tours: Int[Tensor, "I L"]
    gap: float


def evaluate(agent: Agent, task: RoutingTask, evaluation: Evaluation, *, device: torch.device) -> Result:
    """Greedy tours of every instance, each action checked against the rules.

    Args:
        agent: acts by its mode; nothing random is drawn.
        task: the problem.
        evaluation: instances and the lengths to compare with.
        device: where the agent lives.
    """
    instance = each_part(evaluation.instance, lambda part: part.to(device))
    count, num_nodes, _ = instance.coords.shape
    env = RoutingVectorEnv(
        task.rules,
        num_envs=count,
        num_nodes=num_nodes,
        device=device,
        instances=instance,
        factors=evaluation.factors,
        check_actions=True,
    )
    obs, info = env.reset()
    state = agent.initial_state(count)
    returns = torch.zeros(count, device=device)
    running = torch.ones(count, dtype=torch.bool, device=device)
    first = obs["current_node"]
    visited = [first]
    for _ in range(task.rules.episode_steps(num_nodes)):
        if not task.rules.fixed_length and not bool(running.any()):
            break
        action, state = agent.act(Sight.of(obs, info), state, generator=None)
        obs, reward, terminated, _, info = env.step(action)
        # Rows that have ended begin their instance again, which counts no more.
        returns += reward.masked_fill(~running, 0.0)
        visited.append(torch.where(running, action, first))
        running = running & ~terminated
    lengths = -returns
    gap = percent_above(float(lengths.double().mean()), float(evaluation.references.mean()))
    return Result(lengths=lengths, tours=torch.stack(visited[:-1], 1), gap=gap)


class RoutingEvaluator:
    """Greedy tours of fixed instances, by their gap to the reference."""

    def __init__(
        self,
        task: RoutingTask,
        *,
        validation: Evaluation,
        test: Evaluation,
        device: torch.device,
        pictures: Callable[[Instance], dict[str, np.ndarray]] | None = None,
    ) -> None:
        """Take the instances; `pictures` draws what the agent imagines of the first of them."""
        self.task, self.device, self.pictures = task, device, pictures
        self._validation, self._test = validation, test

    def validate(self, agent: Agent) -> Report:
        """Tours of the validation instances."""
        return self._report(agent, self._validation)

    def test(self, agent: Agent) -> Report:
        """Tours of the test instances."""
        return self._report(agent, self._test)

    def _report(self, agent: Agent, evaluation: Evaluation) -> Report:
        result = evaluate(agent, self.task, evaluation, device=self.device)
        title = f"length {float(result.lengths[0]):.3f}, reference {evaluation.references[0]:.3f}"
        tour = draw_tour(evaluation.coords[0].cpu().numpy(), result.tours[0].cpu().numpy(), title=title)
        pictures = {"tour": tour}
        if self.pictures is not None:
            pictures |= self.pictures(evaluation.instance)
        mean = float(result.lengths.mean())
        summary = (
            f"{len(result.lengths)} instances, mean length {mean:.4f}{_interval(result.lengths)},"
            f" gap {result.gap:.2f} % to the reference"
        )
        return Report({"gap": result.gap, "return": -mean}, pictures, summary)


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
    agent: Agent,
    env: GymVectorEnv,
    *,
    episodes: int | None = None,
    after_step: Callable[[dict[int, int]], None] | None = None,
) -> Episodes:
    """Let the agent play episodes by the mode of its policy: as many at once as there are environments.

    Args:
        agent: plays; nothing random is drawn.
        env: of an evaluation, freshly made or lent, so that its seed decides the episodes.
        episodes: how many; as many as there are environments, where none are given.
        after_step: called after the reset and every step with the environments whose episode still runs, and which
            episode that is.
    """
    count = env.num_envs if episodes is None else episodes
    obs, info = env.reset()
    state = agent.initial_state(env.num_envs)
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
        action, state = agent.act(Sight.of(obs, info), state, generator=None)
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

    def validate(self, agent: Agent) -> Report:
        """Episodes with the validation seeds."""
        return self._report(agent, self.valid_episodes, seed=VALIDATION_SEED)

    def test(self, agent: Agent) -> Report | None:
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

    def _report(self, agent: Agent, count: int, *, seed: int) -> Report:
        with self._environments(count, seed) as env:
            episodes = play(agent, env, episodes=count)
            notices, crashes = _shortened(env.notices), tuple(env.crashes)
        pictures = {} if self.pictures is None else self.pictures(episodes.first)
        mean = float(episodes.returns.mean())
        values = {"return": mean, "length": float(episodes.lengths.float().mean())}
        summary = (
            f"{count} episodes, mean return {mean:.4g}{_interval(episodes.returns)},"
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


def film(
    agent: Agent,
    make_env: Callable[[], gymnasium.Env],
    *,
    folder: Path,
    device: torch.device,
    episodes: int = 3,
    most_envs: int = 3,
    **reading: Any,
) -> Path:
    """Write a GIF of the first test episodes into `folder`.

    Args:
        agent: plays.
        make_env: makes an environment that draws itself, in this process.
        folder: made if need be.
        device: where the agent lives.
        episodes: how many, one after another.
        most_envs: environments at once.
        reading: `wanted_keys`, `zero_keys` and `drop_keys`; see `GymVectorEnv`.

    Raises:
        UserError: the environment does not draw itself, or the film cannot be written.
    """
    films: list[list[Image.Image]] = [[] for _ in range(episodes)]
    made: list[gymnasium.Env] = []

    def make_and_keep() -> gymnasium.Env:
        made.append(make_env())
        return made[-1]

    def shoot(playing: dict[int, int]) -> None:
        for row, episode in playing.items():
            films[episode].append(_frame(made[row]))

    num_envs = min(episodes, most_envs)
    env = GymVectorEnv(make_and_keep, num_envs=num_envs, device=device, seed=TEST_SEED, evaluation=True, **reading)
    try:
        if made[0].render_mode != "rgb_array":
            raise UserError(f"{made[0].spec} has no render_mode rgb_array, so it cannot be filmed")
        with _writing_film(folder):
            folder.mkdir(parents=True, exist_ok=True)
        play(agent, env, episodes=episodes, after_step=shoot)
        pace = made[0].metadata.get("render_fps", 30)
    finally:
        env.close()
    frames = [frame for film in films for frame in film]
    path = folder / "episodes.gif"
    with _writing_film(folder), replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=1000 / pace, loop=0)
    return path


def _frame(env: gymnasium.Env) -> Image.Image:
    """What an environment draws.

    Raises:
        UserError: it is no picture.
    """
    frame = np.asarray(env.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise UserError(
            f"{env.spec} draws {frame.dtype} {frame.shape}, so it cannot be filmed: let render() give uint8"
            " [height, width, 3]"
        )
    return Image.fromarray(frame)


@contextmanager
def _writing_film(folder: Path) -> Iterator[None]:
    """Say in one line that a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"no film can be written to {folder} ({error.strerror}); give another folder") from error


def _shortened(notices: list[str]) -> tuple[str, ...]:
    more = len(notices) - MOST_NOTICES
    return (*notices[:MOST_NOTICES], *([f"and {more} more like these"] if more > 0 else []))


def _interval(values: Float[Tensor, " I"]) -> str:
    """The half-width of the mean's 95 % confidence interval, by the normal approximation."""
    if len(values) < 2:
        return ""
    return f" +- {1.96 * float(values.std()) / len(values) ** 0.5:.2g} (95 %)"
