"""The training loop: collect, learn, evaluate, log, checkpoint, resume. Every agent runs on it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import checkpoint
from config import Config
from envs.drawing import draw_tour
from envs.routing import nearest_node
from envs.tasks import Task
from envs.vector import RoutingVectorEnv
from guard import Guard, NonFinite
from logger import Logger, MetricAverages, ProgressBar
from replay import REWARD_AND_ENDS, Replay
from tools import OneHotDist

# A metric above its threshold is worth a line on the terminal.
WARN_ABOVE = {"target_clip_rate": 0.01, "miss_rate": 0.0, "env_miss_rate": 0.0}


@runtime_checkable
class Agent(Protocol):
    """What the loop knows of an agent."""

    rows_per_update: int

    def initial_state(self, num_envs: int) -> dict[str, Any]: ...

    def act(
        self,
        obs: dict[str, Tensor],
        state: dict[str, Any],
        *,
        is_first: Bool[Tensor, " E"],
        any_first: bool,
        generator: torch.Generator | None,
    ) -> tuple[Int[Tensor, " E"], dict[str, Any]]: ...

    def update(self, replay: Replay, *, progress: float) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_weights(self, state: dict[str, Any]) -> None: ...


class Settings(NamedTuple):
    """The keys of the config that the loop itself obeys."""

    steps: int
    prefill: int
    prefill_policy: str
    train_ratio: float
    log_every: int
    eval_every: int
    checkpoint_every: int
    checkpoint_numbered: bool

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Pick them out."""
        return cls(**{name: config[name] for name in cls._fields})


class Evaluation(NamedTuple):
    """Instances with the lengths of their reference tours."""

    coords: Float[Tensor, "I N 2"]
    references: Float[np.ndarray, " I"]


class Result(NamedTuple):
    """How an agent did on an `Evaluation`."""

    lengths: Float[Tensor, " I"]
    tours: Int[Tensor, "I N"]
    gap: float


def evaluate(agent: Agent, task: Task, evaluation: Evaluation, *, device: torch.device) -> Result:
    """Greedy tours of every instance, each action checked against the rules.

    Args:
        agent: acts by its mode; nothing random is drawn.
        task: the problem.
        evaluation: instances and the lengths to compare with.
        device: where the agent lives.
    """
    assert task.rules is not None
    coords = evaluation.coords.to(device)
    count, num_nodes, _ = coords.shape
    env = RoutingVectorEnv(
        task.rules, num_envs=count, num_nodes=num_nodes, device=device, instances=coords, check_actions=True
    )
    obs, info = env.reset()
    state = agent.initial_state(count)
    returns = torch.zeros(count, device=device)
    visited = [obs["current_node"]]
    for _ in range(task.rules.episode_steps(num_nodes)):
        action, state = agent.act(obs, state, is_first=info["is_first"], any_first=info["any_first"], generator=None)
        obs, reward, _, _, info = env.step(action)
        returns += reward
        visited.append(action)
    lengths = -returns
    gap = 100 * (float(lengths.double().mean()) / float(evaluation.references.mean()) - 1)
    return Result(lengths=lengths, tours=torch.stack(visited[:-1], 1), gap=gap)


class Trainer:
    """One run: its environments, replay, counters and clocks."""

    def __init__(
        self,
        agent: Agent,
        task: Task,
        *,
        settings: Settings,
        env: RoutingVectorEnv,
        replay: Replay,
        validation: Evaluation,
        test: Evaluation,
        generators: dict[str, torch.Generator],
        guard: Guard,
        logger: Logger,
        logdir: Path,
        device: torch.device,
        draw: Callable[[Float[Tensor, "N 2"]], np.ndarray] | None = None,
    ) -> None:
        """Take the parts together; `run` begins, after `load` where there is something to go on from."""
        assert task.rules is not None
        self.agent, self.task, self.rules, self.settings = agent, task, task.rules, settings
        self.env, self.replay, self.guard = env, replay, guard
        self.validation, self.test = validation, test
        self.generators, self.logger, self.logdir, self.device = generators, logger, logdir, device
        self.draw = draw
        self.averages = MetricAverages()
        self.step = 0
        self.seconds = 0.0
        self.updates_owed = 0.0
        self.updates = 0
        self.row: dict[str, Tensor] = {}
        self.any_first = True
        self.acting = agent.initial_state(env.num_envs)
        self.episode_return = torch.zeros(env.num_envs, device=device)
        self.latest: dict[str, float] = {}
        self.finished = False
        self._stop_signal: str | None = None

    def run(self) -> None:
        """Train until `steps`, then evaluate on the test set. SIGINT and SIGTERM save and end early."""
        self._clock = time.monotonic()
        self._progress = ProgressBar(self.settings.steps, initial=self.step)
        self._logged_at = (self.step, self._elapsed())
        handlers = {number: signal.signal(number, self._request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if not self.row:
                obs, info = self.env.reset()
                self.row = self._first_row(obs)
                self.any_first = info["any_first"]
                self._evaluate()
            while self.step < self.settings.steps and self._stop_signal is None:
                before = self.step
                self._collect()
                self._learn()
                if self._crossed("log_every", before):
                    self._log()
                if self._crossed("eval_every", before):
                    self._evaluate()
                if self._crossed("checkpoint_every", before):
                    self._save()
            if self.finished:
                self._progress.say(f"this run ended at step {self.step}; give more --steps to go on")
                return
            if self._stop_signal is None:
                self._finish()
            self._save()
        finally:
            self._progress.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._stop_signal is not None:
            print(
                f"stopped by {self._stop_signal} at step {self.step}; saved. The same command goes on from there.",
                file=sys.stderr,
            )

    def _collect(self) -> None:
        """One step of every environment."""
        obs = {key: value for key, value in self.row.items() if key not in REWARD_AND_ENDS}
        if self.step < self.settings.prefill:
            action = self._prefill_action(obs)
        else:
            action, self.acting = self.agent.act(
                obs,
                self.acting,
                is_first=self.row["is_first"],
                any_first=self.any_first,
                generator=self.generators["acting"],
            )
        self.replay.add({**self.row, "action": action})
        ended = self.row["is_last"]
        obs, reward, terminated, truncated, info = self.env.step(action)
        is_first = info["is_first"]
        if info["decisions"]:
            legal = self.row["action_mask"].gather(-1, action[:, None]).squeeze(-1) | ended
            self.averages.add({"env_miss_rate": (~legal).float().mean()})
        self.row = {
            **obs,
            "reward": reward,
            "is_first": is_first,
            "is_last": terminated | truncated,
            "is_terminal": terminated,
        }
        self.any_first = info["any_first"]
        self.step += info["decisions"]
        self.episode_return = torch.where(is_first, 0.0, self.episode_return) + reward
        if self.rules.fixed_length and self.env.all_ended:
            self.averages.add({"train_return": self.episode_return.mean()})
        if self.step >= self.settings.prefill:
            self.updates_owed += info["decisions"] * self.settings.train_ratio / self.agent.rows_per_update

    def _learn(self) -> None:
        while self.updates_owed >= 1:
            progress = min(1.0, self.step / self.settings.steps)
            self.averages.add(self.agent.update(self.replay, progress=progress))
            self.updates += 1
            self.updates_owed -= 1

    def _prefill_action(self, obs: dict[str, Tensor]) -> Int[Tensor, " E"]:
        if self.settings.prefill_policy == "nearest":
            return nearest_node(*self.rules.restore(obs))
        mask = obs["action_mask"]
        noise = torch.rand(mask.shape[0], generator=self.generators["acting"], device=self.device)
        return OneHotDist(torch.zeros(mask.shape, device=self.device), mask=mask).sample(noise)

    def _first_row(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        yes = torch.ones(self.env.num_envs, dtype=torch.bool, device=self.device)
        return {
            **obs,
            "reward": torch.zeros(self.env.num_envs, device=self.device),
            "is_first": yes,
            "is_last": ~yes,
            "is_terminal": ~yes,
        }

    def _crossed(self, key: str, before: int) -> bool:
        every = getattr(self.settings, key)
        return self.step // every > before // every

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._clock

    def _log(self) -> None:
        """Fetch the averages, the one time that the loop waits for the device, and check the guard."""
        values = self.averages.fetch()
        seconds = self._elapsed()
        step, since = self._logged_at
        values["fps"] = (self.step - step) / max(seconds - since, 1e-9)
        values["updates"] = self.updates
        self._logged_at = (self.step, seconds)
        self.latest |= values
        self.logger.scalars(self.step, seconds, values)
        self._show()
        for name, threshold in WARN_ABOVE.items():
            if values.get(name, 0.0) > threshold:
                self._progress.say(f"warning: {name} is {values[name]:.3g}, above {threshold}")
        finding = self.guard.report()
        if finding is not None:
            # Every non-finite update was skipped, so what is saved is the last good state.
            self._save()
            raise NonFinite(
                f"{finding}; stopped at step {self.step}. {self.logdir / checkpoint.LATEST} holds the last good state;"
                " its replay may hold the value: begin in a new logdir, with --init and a lower learning rate"
            )

    def _show(self) -> None:
        names = {"fps": "fps", "train_return": "return", "valid_gap": "gap %", "actor_entropy": "entropy"}
        self._progress.update(self.step, {names[key]: self.latest[key] for key in names if key in self.latest})

    def _evaluate(self) -> None:
        result = evaluate(self.agent, self.task, self.validation, device=self.device)
        values = {"valid_gap": result.gap, "valid_return": -float(result.lengths.mean())}
        self.latest |= values
        self.logger.scalars(self.step, self._elapsed(), values)
        self._draw("validation", self.validation, result)
        self._show()

    def _finish(self) -> None:
        """The test set, once."""
        if self.step > self._logged_at[0]:
            self._log()
        result = evaluate(self.agent, self.task, self.test, device=self.device)
        values = {"eval_gap": result.gap, "eval_return": -float(result.lengths.mean())}
        self.logger.scalars(self.step, self._elapsed(), values)
        self.finished = True
        self._draw("test", self.test, result)
        self._progress.say(
            f"test set: {len(result.lengths)} instances, mean length {-values['eval_return']:.4f},"
            f" gap {result.gap:.2f} % to the reference"
        )

    def _draw(self, name: str, evaluation: Evaluation, result: Result) -> None:
        coords = evaluation.coords[0].cpu().numpy()
        title = f"length {float(result.lengths[0]):.3f}, reference {evaluation.references[0]:.3f}"
        self.logger.image(self.step, f"{name}_tour", draw_tour(coords, result.tours[0].cpu().numpy(), title=title))
        if self.draw is not None:
            self.logger.image(self.step, f"{name}_imagined", self.draw(evaluation.coords[0]))

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        self._stop_signal = signal.Signals(number).name

    def _save(self) -> None:
        """Write latest.pt: all that going on exactly needs."""
        state = {
            "agent": self.agent.state_dict(),
            "replay": self.replay.save_chunks(self.logdir / "replay"),
            "env": self.env.state_dict(),
            "generators": checkpoint.generator_state(self.generators),
            "averages": self.averages.state_dict(),
            "logger": self.logger.state_dict(),
            "acting": self.acting,
            "row": self.row,
            "any_first": self.any_first,
            "episode_return": self.episode_return,
            "step": self.step,
            "updates": self.updates,
            "updates_owed": self.updates_owed,
            "seconds": self._elapsed(),
            "latest": self.latest,
            "finished": self.finished,
        }
        checkpoint.save(self.logdir / checkpoint.LATEST, state)
        if self.settings.checkpoint_numbered:
            checkpoint.save(self.logdir / f"step_{self.step:09d}.pt", state)

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from a checkpoint whose replay lies under `folder`."""
        self.agent.load_state_dict(state["agent"])
        self.replay.load_chunks(folder / "replay", state["replay"])
        self.env.load_state_dict(state["env"])
        checkpoint.restore_generators(self.generators, state["generators"])
        self.averages.load_state_dict(state["averages"])
        self.logger.load_state_dict(state["logger"])
        for name in (
            "acting",
            "row",
            "any_first",
            "episode_return",
            "step",
            "updates",
            "updates_owed",
            "seconds",
            "latest",
        ):
            setattr(self, name, state[name])
        # With more steps than it had, a run that has ended goes on.
        self.finished = state["finished"] and self.step >= self.settings.steps
