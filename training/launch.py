"""Runs from the command line: sets one up and trains it, or takes one from its folder and evaluates it."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from torch import nn

import checkpoint
from checkpoint import CheckpointError
from comparing.runs import LOCK, METRICS
from config import (
    CODE_KEYS,
    CommandLine,
    Config,
    ConfigError,
    filled,
    require_trust,
    to_yaml,
    validate_choices,
    validate_ranges,
)
from envs.dynamics_map import CONTEXTS
from envs.gym_vector import EnvironmentCrashed
from envs.routing import RULES
from envs.tasks import ObservationTask, Task
from guard import Guard, GuardSettings, NonFinite
from parts.observations import readings
from system.memory import is_exhausted, memory_at_hand, readable_bytes
from system.safe_files import refuse_links
from system.terminal import show, tell
from training.agent import Agent
from training.evaluation import film
from training.logger import CONFIG_FILE, LogdirInUseError, Logger, RunLock, save_run_facts
from training.replay import REWARD_AND_ENDS, Replay, Spaces
from training.resuming import (
    RUN,
    WEIGHTS,
    Changes,
    changes_since,
    fitting,
    history,
    listed,
    load_start,
    require,
    require_class,
    saved_config,
)
from training.setup import TRAINING_ENV, Setup, make_one, make_setup, reading_of_observations, require_room
from training.trainer import OWN_FOLDERS, REPLAY, Settings, Trainer

USER_ERRORS = (CheckpointError, LogdirInUseError, NonFinite, EnvironmentCrashed, DependencyNotInstalled)
DREAMER = "dreamer.py"
ENTRY_KEYS = {
    "evaluate": "evaluate the latest checkpoint of this logdir instead of training",
    "video": "with --evaluate: write a film of the first episodes into this folder",
    "resume": "go on from this checkpoint file instead of the logdir's latest.pt",
    "init": "begin a new run with the weights of this checkpoint file",
    "trust": "true: with --evaluate, import and call what the run's config names (false)",
}
# What --evaluate takes from the command line; all else is the run's own.
OF_EVALUATION = (
    *("eval_episodes", "eval_instances", "import"),
    *("envs", "env_processes", "env_timeout", "env_restarts"),
)
OF_THE_MACHINE = ("device", "threads")
OF_A_TEST = {"eval_episodes": (1, math.inf)}
# Entry keys that name files and folders.
PATHS = ("resume", "init")
# Weights for acting are in half precision and without a critic, whose sizes their config alone tells; bytes.
MOST_GROWTH, ALWAYS_ROOM = 16, 2**28
AT_THE_START = "sac.initial_alpha."
ROLES = ("environment", "acting", "replay", "model", "imagination")
CHOICES = {"prefill_policy": ("random", "nearest"), "context": CONTEXTS, "eval_env": ("own", TRAINING_ENV)}
RANGES = {
    **dict.fromkeys(("steps", "log_every", "checkpoint_every"), (1, math.inf)),
    "envs": (1, math.inf),
    "threads": (1, 4096),
    # The field's test sets have 10,000.
    **dict.fromkeys(("valid_instances", "eval_instances"), (1, 1_000_000)),
    "valid_episodes": (1, math.inf),
    **dict.fromkeys(("eval_every", "eval_episodes", "env_timeout", "env_restarts"), (0, math.inf)),
    **dict.fromkeys(("prefill", "train_ratio", "guard.max_rollbacks", "guard.recovery"), (0, math.inf)),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("guard.max_skips", "guard.snapshot_every"), (1, math.inf)),
    "reward_scale": (1e-12, 1e12),
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
        # What is there and draws no numbers (meta) is no place to learn.
        torch.Generator(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # PyTorch's own words on it fill a screen.
        cause = textwrap.shorten(str(error), 80, placeholder=" ...")
        if name.startswith("cuda") and not torch.cuda.is_available():
            cause = "PyTorch finds no CUDA"
        raise ConfigError(f"device {name!r} cannot be used here ({cause}); give --device cpu, or auto") from error
    return device


def train(
    command: CommandLine,
    *,
    argv: list[str],
    make_agent: Callable[..., Agent],
    make_pictures: Callable[[Any], Any] | None = None,
) -> None:
    """A whole run, from the command line to the final evaluation.

    Raises:
        UserError, CheckpointError, LogdirInUseError: a mistake of the user's, before any training.
        NonFinite: training met a value that is not finite.
    """
    config, command = command.config, _with_absolute_paths(command)
    if command.entry["video"]:
        raise ConfigError("--video goes with --evaluate")
    logdir = Path(str(config.logdir or default_logdir(argv[0], command))).absolute()
    validate_ranges(config, RANGES)
    validate_choices(config, CHOICES)
    settings = Settings.of(config)
    device = prepare_torch(config)
    with _telling_of_crashes():
        setup = make_setup(config, device)
    generators = make_generators(config.seed, device)
    guard = Guard(device, GuardSettings(**{name: config.guard[name] for name in GuardSettings._fields}))
    with _within_memory():
        agent = make_agent(setup.task, config, device=device, generators=generators, guard=guard)
    env = setup.make_env(generators)
    with ExitStack() as stack:
        stack.callback(env.close)
        replay = _make_replay(config, setup.task.stored(env), memory=agent.memory_spaces, device=device)
        _require_windows(config, agent.batch_length)
        stack.enter_context(claimed(logdir))
        # References can take minutes to find: what does not fit the run in the logdir is said before.
        state, folder, changes = _take_up(
            command, agent, replay, logdir, device=device, program=argv[0], make_agent=make_agent
        )
        # Nothing is written before everything that can be wrong with the config has been looked at.
        evaluator = setup.make_evaluator(None if make_pictures is None else make_pictures(agent))
        step = None if state is None else state["step"]
        with writing_to(logdir):
            logger = Logger(logdir, resume_step=step)
        stack.callback(logger.close)
        trainer = Trainer(
            agent,
            setup.task,
            settings=settings,
            env=env,
            replay=replay,
            evaluator=evaluator,
            generators=generators,
            guard=guard,
            logger=logger,
            logdir=logdir,
            device=device,
            files={CONFIG_FILE: to_yaml(config)},
        )
        if state is not None:
            with fitting(folder, changes), writing_to(logdir):
                trainer.load(state, elsewhere=folder.resolve() != logdir.resolve())
            changes = _told(changes, folder)
        past = [] if state is None else history(folder, changes, step=state["step"])
        with writing_to(logdir):
            logger.text("config", save_run_facts(logdir, config, argv, defaults=command.defaults, changes=past))
        for line in opening(config, setup.task, replay, logdir=logdir, device=device, step=step):
            tell(line)
        trainer.run()


def _take_up(
    command: CommandLine,
    agent: Agent,
    replay: Replay,
    logdir: Path,
    *,
    device: torch.device,
    program: str,
    make_agent: Callable[..., Agent],
) -> tuple[dict[str, Any] | None, Path, Changes]:
    """The checkpoint to go on from, if any, its folder, and what has changed since; agent and replay have their parts.

    Raises:
        UserError, CheckpointError: the logdir's run, or the weights to begin with, cannot be used or do not fit.
    """
    changes: Changes = {}

    def take(state: dict[str, Any], path: Path) -> None:
        require(state, RUN, path)
        require_class(state, make_agent, path)
        changes.update(changes_since(path.parent, state, command.config, defaults=command.defaults))
        with fitting(path, changes):
            agent.load_state_dict(state["agent"])
            replay.load_chunks(path.parent / REPLAY, state["replay"])

    state, folder = load_start(command, logdir, device, program=program, take=take)
    if command.entry["init"]:
        path = Path(command.entry["init"])
        weights = checkpoint.load(path, device)
        require(weights, WEIGHTS, path)
        require_class(weights, make_agent, path)
        with fitting(path):
            agent.load_weights(weights["agent"])
    return state, folder, changes


def opening(
    config: Config, task: Task, replay: Replay, *, logdir: Path, device: torch.device, step: int | None
) -> list[str]:
    """What a run says of itself before it begins: where it stands, what it reads, what it will take.

    Args:
        config: the run's.
        task: what is to be solved.
        replay: what has been lived through.
        logdir: the run's folder.
        device: where it learns.
        step: of the checkpoint that the run goes on from; None for a new run.
    """
    model = config.model
    if isinstance(task, ObservationTask):
        seen = readings(task, encode_keys=model.encode_keys, decode_keys=model.decode_keys)
    else:
        seen = [f"{config.task} of {config.nodes} nodes: {', '.join(sorted({*replay.rows} - {*REWARD_AND_ENDS}))}"]
    # Only a CPU gives memory as it is written to.
    rows, taken = rows_when_full(config), "when full, taken as it fills"
    if device.type != "cpu":
        rows, taken = replay.length * replay.num_envs, "taken at once"
    held = f", of which {len(replay):,} are there" if len(replay) else ""
    size = f"{readable_bytes(rows * replay.row_bytes)} {taken}"
    threads = f", {config.threads} thread{'s' if config.threads > 1 else ''}" if device.type == "cpu" else ""
    begins = "a new run" if step is None else f"goes on from its checkpoint at step {step:,}"
    facts = {
        "logdir": [f"{logdir} ({begins}, to step {config.steps:,})"],
        "device": [f"{device}{threads}"],
        "sees": seen,
        "replay": [f"{rows:,} rows of {readable_bytes(replay.row_bytes)}{held}; {size}"],
        "curves": [f"tensorboard --logdir {shlex.quote(str(logdir.parent))}"],
    }
    return [
        f"{name if index == 0 else '':<8}{line}" for name, lines in facts.items() for index, line in enumerate(lines)
    ]


def _with_absolute_paths(command: CommandLine) -> CommandLine:
    """The same command after an environment has changed the working directory."""
    paths = {key: str(Path(str(command.entry[key])).absolute()) for key in PATHS if command.entry[key]}
    return command._replace(entry={**command.entry, **paths})


@contextmanager
def _telling_of_crashes() -> Iterator[None]:
    """Print an environment's own traceback where there is no logdir yet to save it in."""
    try:
        yield
    except EnvironmentCrashed as error:
        tell(error.crash.trace.rstrip())
        raise


def _make_replay(config: Config, spaces: Spaces, *, memory: Spaces, device: torch.device) -> Replay:
    """Replay with room for what the config keeps of what the run will live through.

    Raises:
        ConfigError: memory would not hold it.
    """
    # Each decision is a row, and so is the end of each episode, which is of one decision at least.
    rows_to_come = 2 * (config.steps + config.envs)
    replay = Replay(
        spaces,
        num_envs=config.envs,
        capacity=config.replay_capacity,
        device=device,
        memory=memory,
        rows_to_come=rows_to_come,
    )
    rows, free = rows_when_full(config), memory_at_hand()
    # Any other device has given all of it already.
    if device.type == "cpu" and free is not None and rows * replay.row_bytes > free:
        raise ConfigError(
            f"replay will hold {rows:,} rows of {readable_bytes(replay.row_bytes)}, which are"
            f" {readable_bytes(rows * replay.row_bytes)}, and {readable_bytes(free)} of memory are free; give"
            f" --replay_capacity {free // replay.row_bytes} at most"
        )
    return replay


def rows_when_full(config: Config) -> int:
    """Rows that replay will hold in the end, but for the last rows of episodes."""
    return min(config.replay_capacity, config.steps)


def prepare_torch(config: Config) -> torch.device:
    """Threads, arithmetic and the seed of everything that has no generator of its own; the device to work on."""
    torch.set_num_threads(config.threads)
    # Denormal numbers are many times slower on a CPU, and nothing here needs them.
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    return choose_device(config.device)


def _require_windows(config: Config, rows: int) -> None:
    """Check that replay will hold a window when the first update samples one, and at all.

    Raises:
        ConfigError: prefill or capacity is too small.
    """
    least = dict.fromkeys(("prefill", "replay_capacity"), config.envs * rows)
    require_room(config, least, what=f"a window of {rows} rows each")


class LoadedRun(NamedTuple):
    """A finished or running run, taken from its folder."""

    config: Config
    setup: Setup
    agent: Agent
    step: int


def load_run(
    run: Path,
    *,
    make_agent: Callable[..., Agent],
    device: torch.device,
    defaults: Config,
    changes: dict[str, Any] | None = None,
    given: Config | None = None,
    trust: bool = False,
    to_play: bool = False,
) -> LoadedRun:
    """The agent of a run as its checkpoint has it, in its setup.

    Args:
        run: the run's folder, for its latest checkpoint; one of its checkpoint files, with config.yaml beside it; or a
            file of weights alone, which holds its config.
        make_agent: as for `train`.
        device: where the agent will act.
        defaults: gives the keys that did not exist when the run was made.
        changes: what the config is to have otherwise than the run's, by dotted key.
        given: the config of the user's own command line. Code that the run's config names is run where this one names
            the same.
        trust: run whatever code the run's config names.
        to_play: make as many gymnasium environments as the config says, and not one alone to learn what the task is.

    Raises:
        ConfigError: there is no such run, or its config names code that the user has not named.
        CheckpointError: the checkpoint cannot be read, or belongs to another config.
    """
    if not run.exists():
        raise ConfigError(f"{run} does not exist; give a run's folder, or a checkpoint in one")
    if run.is_dir():
        found = checkpoint.load_latest(run, device, to_go_on=False)
        if found is None:
            raise ConfigError(f"{run} has no checkpoint yet; give a run that has saved one")
        state = found
    else:
        state = checkpoint.load(run, device)
    require(state, WEIGHTS, run)
    if "config" in state:
        config = filled(state["config"], defaults, where=str(run))
    else:
        config = saved_config(run if run.is_dir() else run.parent, state, defaults=defaults)
    require_class(state, make_agent, run)
    config = config.replace(**(changes or {}))
    require_trust(config, run, given=given, trust=trust)
    validate_ranges(config, RANGES)
    alone = {"envs": 1, "env_processes": False} if config.task in RULES or not to_play else {}
    setup = make_setup(config.replace(**alone), device)
    _require_fit(state["agent"], run, make_agent=make_agent, task=setup.task, config=config)
    agent = make_agent(
        setup.task, config, device=device, generators=make_generators(config.seed, device), guard=Guard(device)
    )
    with fitting(run):
        agent.load_weights(state["agent"])
    return LoadedRun(config, setup, agent, state["step"])


def _require_fit(weights: Any, source: Path, *, make_agent: Callable[..., Agent], task: Task, config: Config) -> None:
    """Check that weights fit their config before the sizes in it take memory: on a device that has none.

    Raises:
        CheckpointError: they do not.
    """
    nowhere, generators = torch.device("meta"), make_generators(config.seed, torch.device("cpu"))
    # Sizes beyond what PyTorch can count are refused while the agent is made.
    with nowhere, warnings.catch_warnings(), fitting(source):
        # PyTorch warns of weights that are loaded into nothing.
        warnings.simplefilter("ignore")
        agent = make_agent(task, config, device=nowhere, generators=generators, guard=Guard(nowhere))
        agent.load_weights(weights)
        modules = [part for part in vars(agent).values() if isinstance(part, nn.Module)]
        needed = sum(each.numel() * each.element_size() for module in modules for each in module.parameters())
    if needed > MOST_GROWTH * checkpoint.claimed_bytes(weights) + ALWAYS_ROOM:
        raise CheckpointError(f"{source} does not fit this config, whose sizes need {needed / 1e9:.1f} GB")


def evaluate_run(command: CommandLine, *, make_agent: Callable[..., Agent]) -> None:
    """Let a run's agent play the final evaluation again, and print how it did.

    Raises:
        UserError, CheckpointError: there is no run that can be evaluated.
    """
    path, video = Path(str(command.entry["evaluate"])), command.entry["video"]
    # An environment may change the working directory.
    folder = None if video is None else Path(video).absolute()
    validate_ranges(command.config, {**RANGES, **OF_A_TEST})
    device = prepare_torch(command.config)
    changes = {key: command.config[key] for key in command.overrides if key in OF_EVALUATION}
    with _telling_of_crashes():
        run = load_run(
            path,
            make_agent=make_agent,
            device=device,
            defaults=command.defaults,
            # The environments that are made to learn what the task is are played in, too.
            changes={**changes, "eval_env": TRAINING_ENV},
            given=command.config,
            trust=_trusts(command),
            to_play=True,
        )
    validate_ranges(run.config, OF_A_TEST)
    if video and not isinstance(run.setup.task, ObservationTask):
        raise ConfigError("--video films gymnasium tasks; python solve.py draws tours")
    others = [f"--{key}" for key in ("init", "resume") if command.entry[key]]
    obeyed = (*OF_EVALUATION, *OF_THE_MACHINE, *_repeated(run.config, command.config))
    others += [f"--{key}" for key in command.overrides if key not in obeyed]
    if others or command.sections:
        ignored = " ".join([*others, *(["--configs"] if command.sections else [])])
        tell(f"the run has a config of its own: {ignored} changes nothing")
    setup, filmed = run.setup, None
    if folder is not None:
        # First, since what it lacks should not show after a hundred episodes; alone, as a simulator may exist once.
        setup.close()
        make_env, reading = make_one(run.config, render_mode="rgb_array"), reading_of_observations(run.config)
        filmed = film(run.agent, make_env, folder=folder, device=device, most_envs=run.config.envs, **reading)
        setup = make_setup(run.config, device)
    with _telling_of_crashes(), closing(setup):
        report = setup.make_evaluator(None).test(run.agent)
    assert report is not None, "there are episodes to be played"
    for line in report.notices:
        tell(line)
    show(f"{path} at step {run.step}: {report.summary}")
    if filmed is not None:
        show(f"film: {filmed}")


def _trusts(command: CommandLine) -> bool:
    """Whether the user trusts the files that are read.

    Raises:
        ConfigError: `--trust` says neither true nor false.
    """
    answer = command.entry["trust"]
    if answer not in (None, "true", "false"):
        raise ConfigError(f"--trust is {answer!r}; it takes true or false")
    return answer == "true"


def _repeated(config: Config, given: Config) -> list[str]:
    """The keys that may name code and whose value the command line has too."""
    return [key for key in CODE_KEYS if config[key] == given[key]]


def default_logdir(program: str, command: CommandLine) -> Path:
    """logdir/<sections, or else the task>-seed<seed>, so that the same command goes on with its own run."""
    of_task = command.config.task if program == DREAMER else f"{Path(program).stem}-{command.config.task}"
    name = re.sub("[^A-Za-z0-9_.-]+", "_", "-".join(command.sections) or of_task)
    return Path("logdir") / f"{name}-seed{command.config.seed}"


def unused_logdir(config: Config) -> Path:
    """The folder that the config names, for a run that is not ours to go on with.

    Raises:
        ConfigError: it names none, or one with a run in it.
    """
    if config.logdir is None or (Path(str(config.logdir)) / METRICS).exists():
        raise ConfigError(f"--logdir is {config.logdir}; name a folder that has no run yet")
    return Path(str(config.logdir))


@contextmanager
def _within_memory() -> Iterator[None]:
    """Say in one line that networks are larger than memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        remedy = "give smaller ones (units, bins, rssm, pointer)"
        raise ConfigError(f"the networks do not fit into memory; {remedy}") from error


def _told(changes: Changes, folder: Path) -> Changes:
    """Tell the user of the changes; those that have an effect."""
    if late := [key for key in changes if key.startswith(AT_THE_START)]:
        tell(f"the run in {folder} has begun: {', '.join(late)} changes nothing any more")
    effective = {key: change for key, change in changes.items() if key not in late}
    if effective:
        tell(f"going on with the run in {folder}, changed: {listed(effective)}")
    return effective


@contextmanager
def claimed(logdir: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be, and goes away again if nothing came of it.

    Raises:
        ConfigError: it cannot be made or written to.
        LogdirInUseError: another process has it.
    """
    made = [folder for folder in (logdir, *logdir.parents) if not folder.exists()]
    with writing_to(logdir):
        logdir.mkdir(parents=True, exist_ok=True)
        refuse_links(logdir, (METRICS, *OWN_FOLDERS))
        lock = RunLock(logdir)
    try:
        yield
    finally:
        lock.release()
        if made and [path.name for path in logdir.iterdir()] == [LOCK]:
            (logdir / LOCK).unlink()
            for folder in made:
                # Another run may have begun beside this one.
                with suppress(OSError):
                    folder.rmdir()


@contextmanager
def writing_to(logdir: Path) -> Iterator[None]:
    """Say in one line that a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"logdir {logdir} cannot be written to ({error.strerror or error}); give another --logdir, or make room"
        ) from error
