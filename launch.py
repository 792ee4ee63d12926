"""Sets a run up: from the command line to a trainer with everything it needs, each mistake named before it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from config import CommandLine, Config, ConfigError, validate_choices, validate_ranges
from envs.instances import TEST_SEED, VALIDATION_SEED, field_test_coords, reference_lengths
from envs.tasks import Task
from envs.vector import RoutingVectorEnv
from guard import Guard, NonFinite
from logger import LogdirInUseError, Logger, RunLock, save_run_facts
from replay import Replay
from trainer import Agent, Evaluation, Settings, Trainer

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
