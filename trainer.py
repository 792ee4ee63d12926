"""The training loop: collect, learn, evaluate, log, checkpoint, resume. Every agent runs on it."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from config import CommandLine, Config, ConfigError, validate_choices, validate_ranges
from envs.drawing import draw_tour
from envs.instances import TEST_SEED, VALIDATION_SEED, field_test_coords, reference_lengths
from envs.routing import nearest_node
from envs.tasks import Task
from envs.vector import RoutingVectorEnv
from guard import Guard, NonFinite
from logger import LogdirInUseError, Logger, MetricAverages, ProgressBar, RunLock, save_run_facts
from replay import REWARD_AND_ENDS, Replay
from tools import OneHotDist

USER_ERRORS = (ValueError, CheckpointError, LogdirInUseError, NonFinite)
ENTRY_KEYS = {
    "resume": "go on from this checkpoint file instead of the logdir's latest.pt",
    "init": "begin a new run with the weights of this checkpoint file",
}
ROLES = ("environment", "acting", "replay", "model", "imagination")
CHOICES = {"prefill_policy": ("random", "nearest")}
RANGES = {
    **dict.fromkeys(("steps", "log_every", "eval_every", "checkpoint_every"), (1, math.inf)),
    **dict.fromkeys(("envs", "threads", "valid_instances", "eval_instances"), (1, math.inf)),
    **dict.fromkeys(("prefill", "train_ratio", "seed"), (0, math.inf)),
}
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


def make_generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """One random generator per role, so that what one of them draws changes nothing for the others."""
    children = np.random.SeedSequence(seed).spawn(len(ROLES))
    return {
        role: torch.Generator(device).manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1))
        for role, child in zip(ROLES, children, strict=True)
    }


def choose_device(name: str) -> torch.device:
    """The device that the config names; `auto` is CUDA where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def make_evaluation(num_nodes: int, count: int, *, seed: int) -> Evaluation:
    """The first `count` instances that `seed` gives, with LKH's lengths."""
    coords = field_test_coords(num_nodes, count, seed=seed)
    return Evaluation(coords=torch.from_numpy(coords).float(), references=reference_lengths(coords))


def train(
    command: CommandLine,
    *,
    argv: list[str],
    make_task: Callable[[Config], Task],
    make_agent: Callable[..., Agent],
    make_draw: Callable[[Any], Callable[[Tensor], np.ndarray] | None] | None = None,
) -> None:
    """A whole run, from the command line to the final evaluation.

    Raises:
        ValueError, CheckpointError, LogdirInUseError: a mistake of the user's, before any training.
        NonFinite: training met a value that is not finite.
    """
    config = command.config
    validate_ranges(config, RANGES)
    validate_choices(config, CHOICES)
    settings = Settings.of(config)
    torch.set_num_threads(config.threads)
    # Denormal numbers are many times slower on a CPU, and nothing here needs them.
    torch.set_flush_denormal(True)
    device = choose_device(config.device)
    task = make_task(config)
    assert task.rules is not None
    torch.manual_seed(config.seed)
    generators = make_generators(config.seed, device)
    guard = Guard(device)
    agent = make_agent(task, config, device=device, generators=generators, guard=guard)
    env = RoutingVectorEnv(
        task.rules, num_envs=config.envs, num_nodes=config.nodes, device=device, generator=generators["environment"]
    )
    obs, _ = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
    spaces["action"] = ((), torch.int64)
    replay = Replay(spaces, num_envs=config.envs, capacity=config.replay_capacity, device=device)
    _require_episodes(config, task.rules.episode_steps(config.nodes) + 1)
    validation = make_evaluation(config.nodes, config.valid_instances, seed=VALIDATION_SEED)
    test = make_evaluation(config.nodes, config.eval_instances, seed=TEST_SEED)
    # Nothing is written before everything that can be wrong with the config has been looked at.
    logdir = Path(str(config.logdir or default_logdir(argv, config)))
    with ExitStack() as stack:
        try:
            logdir.mkdir(parents=True, exist_ok=True)
            stack.callback(RunLock(logdir).release)
        except OSError as error:
            raise ConfigError(
                f"logdir {logdir} cannot be written to ({error.strerror}); give another --logdir"
            ) from error
        state, folder = load_start(command, logdir, device)
        if command.entry["init"]:
            path = Path(command.entry["init"])
            with _fitting(path):
                agent.load_weights(checkpoint.load(path, device)["agent"])
        logger = Logger(logdir, resume_step=None if state is None else state["step"])
        stack.callback(logger.close)
        trainer = Trainer(
            agent,
            task,
            settings=settings,
            env=env,
            replay=replay,
            validation=validation,
            test=test,
            generators=generators,
            guard=guard,
            logger=logger,
            logdir=logdir,
            device=device,
            draw=None if make_draw is None else make_draw(agent),
        )
        if state is not None:
            with _fitting(folder):
                trainer.load(state, folder)
        logger.text("config", save_run_facts(logdir, config, argv, defaults=command.defaults))
        trainer.run()


def _require_episodes(config: Config, rows: int) -> None:
    """Check that replay will hold whole episodes when the first update samples them.

    Raises:
        ConfigError: prefill or capacity is too small.
    """
    if config.prefill < config.envs * rows:
        raise ConfigError(
            f"prefill is {config.prefill} env steps; {config.envs} environments need {config.envs * rows} for an"
            f" episode of {rows} rows each"
        )
    columns = 2 * rows - 1
    if config.replay_capacity < config.envs * columns:
        raise ConfigError(
            f"replay_capacity is {config.replay_capacity} rows; {config.envs} environments need"
            f" {config.envs * columns} to keep whole episodes of {rows} rows"
        )


@contextmanager
def _fitting(source: Path) -> Iterator[None]:
    """Say in one line that a checkpoint was made with another config."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        cause = str(error).splitlines()
        raise CheckpointError(
            f"{source} does not fit this config ({cause[min(1, len(cause) - 1)].strip()});"
            " give the config that it was made with, or another --logdir"
        ) from error


def load_start(command: CommandLine, logdir: Path, device: torch.device) -> tuple[dict[str, Any] | None, Path]:
    """The checkpoint to go on from, if any, and the folder it stands in.

    Raises:
        ConfigError: `--resume` or `--init` in a logdir that has a run of its own.
        CheckpointError: the file cannot be used.
    """
    resume, init = command.entry["resume"], command.entry["init"]
    if resume and init:
        raise ConfigError("--resume goes on with a run and --init begins one; give one of them")
    has_run = (logdir / checkpoint.LATEST).exists() or (logdir / checkpoint.PREVIOUS).exists()
    if init and has_run:
        raise ConfigError(f"{logdir} has a run of its own; give --init with another --logdir")
    if resume:
        return checkpoint.load(Path(resume), device), Path(resume).parent
    return (checkpoint.load_latest(logdir, device), logdir) if has_run else (None, logdir)


def default_logdir(argv: list[str], config: Config) -> Path:
    """logdir/<sections>-seed<seed>, so that the same command goes on with its own run."""
    names = []
    if "--configs" in argv:
        for argument in argv[argv.index("--configs") + 1 :]:
            if argument.startswith("--"):
                break
            names.append(argument)
    return Path("logdir") / f"{'-'.join(names) or 'defaults'}-seed{config.seed}"
