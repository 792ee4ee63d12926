"""A run from the command line, from its config to its final evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkpoint
from comparing.runs import CONFIG_FILE
from config import CommandLine, Config, ConfigError, to_yaml
from guard import Guard, NonFinite
from settings.families import require_read
from settings.run import EvaluationSettings, RunSettings
from system.memory import is_exhausted
from system.ranks import Ranks, joined
from system.terminal import silent, tell
from training import loading
from training.agent import Agent, AgentClass, Practitioner, Student, Trained
from training.collector import collect_from_here, help_learner, portable
from training.company import Invitation, invitation
from training.devices import make_generator, make_generators, prepare_torch
from training.evaluation import Evaluator, Unjudged
from training.logdirs import claimed, default_logdir, writing_to
from training.logger import Logger, SilentLogger
from training.opening import opening
from training.recorded import read_record, require_columns
from training.replay_room import make_replay, require_sequences
from training.resharing import of_rank
from training.resuming import (
    WEIGHTS,
    Changes,
    changes_since,
    fitting,
    history,
    listed,
    load_start,
    require,
    require_class,
)
from training.ring import REWARD_AND_ENDS
from training.run_facts import save_run_facts
from training.run_lock import LogdirInUseError, SilentLock
from training.setup import Setup, make_setup, require_players, require_task, telling_of_crashes
from training.shares import require_for_ranks, share_of
from training.sinks import find_sinks
from training.sources import Collected, Gathered, Logged, Practised, Recorded, Source
from training.trips import TripLog

USER_ERRORS = (*loading.USER_ERRORS, LogdirInUseError, NonFinite)
ENTRY_KEYS = {
    "evaluate": "evaluate the latest checkpoint of this logdir instead of training",
    "video": "with --evaluate: write a film of the first episodes into this folder",
    "resume": "go on from this checkpoint file instead of the logdir's latest.pt",
    "init": "begin a new run with the weights of this checkpoint file",
    "collectors": "start so many processes here that step the environments; docs/scale.md",
    "listen": "take collectors from other hosts at this HOST:PORT",
    "collect": "be a collector for the run that listens at this HOST:PORT, with the same settings",
    "key": "with --collect: the file of the learner's key, if it is not in the logdir",
    "trust": "true: with --evaluate, import and call what the run's config names (false)",
}
# Entry keys that name files and folders.
PATHS = ("resume", "init", "key")
# Keys with this prefix change nothing once a run has begun.
INITIAL_KEYS = "sac.initial_alpha."


def train(
    command: CommandLine,
    *,
    argv: list[str],
    make_agent: AgentClass,
    make_setup: Callable[..., Setup] = make_setup,
    make_pictures: Callable[[Any], Any] | None = None,
    at_end: Callable[[Any, EvaluationSettings, Path, TripLog | None], None] | None = None,
) -> None:
    """A whole run, from the command line to the final evaluation.

    Args:
        command: the command line.
        argv: the same as it was given.
        make_agent: a class of agents.
        make_setup: makes of the config what stands for its task.
        make_pictures: draws what an agent imagines; called with the agent.
        at_end: called after the last update, before the final evaluation and the last checkpoint: with the agent, how
            it is evaluated, the logdir, and the log of trips that it has learnt from, if any.

    Raises:
        UserError, CheckpointError, LogdirInUseError: a mistake of the user's, before any training.
        NonFinite: training met a value that is not finite.
    """
    if command.entry.get("video"):
        raise ConfigError("--video goes with --evaluate")
    if command.entry.get("collect"):
        logdir = Path(str(command.config.logdir or default_logdir(argv[0], command)))
        collect_from_here(command, make_agent=make_agent, make_setup=make_setup, logdir=logdir)
        return
    with joined() as ranks, silent(not ranks.is_first):
        _train(
            command,
            ranks,
            argv=argv,
            make_agent=make_agent,
            make_setup=make_setup,
            make_pictures=make_pictures,
            at_end=at_end,
        )


def _train(
    command: CommandLine,
    ranks: Ranks,
    *,
    argv: list[str],
    make_agent: AgentClass,
    make_setup: Callable[..., Setup],
    make_pictures: Callable[[Any], Any] | None,
    at_end: Callable[[Any, EvaluationSettings, Path, TripLog | None], None] | None,
) -> None:
    """The whole run, of which this rank does its share."""
    config, command = command.config, _with_absolute_paths(command)
    logdir = Path(str(config.logdir or default_logdir(argv[0], command))).absolute()
    settings, share = RunSettings.of(config), share_of(config, ranks)
    sinks = find_sinks(settings.loop.logger)
    device = prepare_torch(config)
    target = partial(
        help_learner,
        program=argv[0],
        command=command,
        make_agent=make_agent,
        make_setup=make_setup,
        errors=USER_ERRORS,
    )
    guests = invitation(command, ranks, target=target)
    with telling_of_crashes():
        setup = make_setup(share, device) if guests is None else make_setup(share, device, idle=True)
    require_read(config.task, command.given)
    require_task(setup.task, make_agent, config)
    generators = make_generators(config.seed, device)
    guard = Guard(device, settings.guard)
    with _within_memory():
        agent = make_agent.of(setup.task, share, device=device, generators=generators, guard=guard)
    require_players(settings, agent)
    with ExitStack() as stack:
        source: Source = _source(setup, settings, RunSettings.of(share), agent, generators, device=device, stack=stack)
        if guests is not None:
            source = _gathered(source, guests, config, agent)
        require_for_ranks(config, source, ranks)
        with ranks.first_goes_first():
            lock = stack.enter_context(claimed(logdir)) if ranks.is_first else SilentLock()
            # Finding references can take minutes, so a command that does not fit the run in the logdir is refused
            # before. What is damaged is set aside by the first rank alone.
            state, folder, changes = _take_up(
                command, agent, source, logdir, device=device, program=argv[0], make_agent=make_agent
            )
        # Nothing is written before the whole config has been checked.
        step = None if state is None else state["step"]
        evaluator: Evaluator = Unjudged()
        logger: Logger = SilentLogger()
        if ranks.is_first:
            evaluator = setup.make_evaluator(None if make_pictures is None else make_pictures(agent))
            with writing_to(logdir):
                logger = Logger(logdir, resume_step=step, sinks=sinks, config=config.to_dict())
        stack.callback(logger.close)
        loop = source.loop(
            agent,
            settings=settings.loop,
            evaluator=evaluator,
            generators=generators,
            guard=guard,
            logger=logger,
            logdir=logdir,
            lock=lock,
            device=device,
            files={CONFIG_FILE: to_yaml(config)},
            at_end=None
            if at_end is None or not ranks.is_first
            else partial(at_end, agent, settings.evaluation, logdir, _log_of(setup)),
        )
        if state is not None:
            with fitting(folder, changes), writing_to(logdir):
                own = of_rank(state, ranks, generators)
                loop.load(own, elsewhere=folder.resolve() != logdir.resolve())
            # Each part has what it needs; all of it would otherwise stay in memory beside that for the whole run.
            del own
            changes = _told(changes, folder)
        past = [] if step is None else history(folder, changes, step=step)
        del state
        if ranks.is_first:
            with writing_to(logdir):
                logger.text("config", save_run_facts(logdir, config, argv, defaults=command.defaults, changes=past))
        for line in opening(settings, source, logdir=logdir, device=device, step=step):
            tell(line)
        loop.run()


def _source(
    setup: Setup,
    settings: RunSettings,
    share: RunSettings,
    agent: Trained,
    generators: dict[str, torch.Generator],
    *,
    device: torch.device,
    stack: ExitStack,
) -> Source:
    """What the run learns from; `stack` ends it with the run.

    Raises:
        UserError: the agent cannot learn from it, or memory does not hold it.
    """
    if setup.make_source is not None:
        return setup.make_source()
    if isinstance(agent, Practitioner):
        return Practised(agent)
    if setup.read_log is not None:
        assert isinstance(agent, Student), "other agents' programs refuse the key"
        agent.require_study()
        return Logged(setup.read_log())
    assert isinstance(agent, Agent), "whoever collects keeps it in replay"
    env = setup.make_env(generators)
    stack.callback(env.close)
    spaces, record = setup.task.stored(env), None
    if settings.loop.replay:
        record = read_record(settings, task=setup.task, spaces=spaces)
    else:
        require_sequences(settings, setup.task, agent.batch_length)
    recorded = 0 if record is None else env.num_envs * record.columns(env.num_envs)
    replay = make_replay(share, spaces, memory=agent.memory_spaces, device=device, recorded=recorded)
    if replay.device != device:
        # Rows are drawn where they are. The agent has the same dictionary.
        generators["replay"] = make_generator(settings.machine.seed, "replay", replay.device)
    if record is None:
        return Collected(setup.task, env, replay)
    require_columns(record, replay, agent.batch_length)
    record.fill(replay, reward_scale=settings.loop.reward_scale)
    return Recorded(setup.task, env, replay, record=record)


def _gathered(source: Source, guests: Invitation, config: Config, agent: Trained) -> Gathered:
    """The same task, whose environments others step."""
    spaces = {**portable(agent).memory_spaces}
    assert isinstance(source, Collected), "settings refuse what else there is"
    spaces = {**source.task.stored(source.env), **REWARD_AND_ENDS, **spaces}
    return Gathered(source.task, source.env, source.replay, invitation=guests, config=config, spaces=spaces)


def _log_of(setup: Setup) -> TripLog | None:
    return None if setup.read_log is None else setup.read_log()


def _take_up(
    command: CommandLine,
    agent: Trained,
    source: Source,
    logdir: Path,
    *,
    device: torch.device,
    program: str,
    make_agent: AgentClass,
) -> tuple[dict[str, Any] | None, Path, Changes]:
    """The checkpoint to go on from, if any, its folder, and what has changed since; agent and source have their parts.

    Raises:
        UserError, CheckpointError: the logdir's run, or the weights to begin with, cannot be used or do not fit.
    """
    changes: Changes = {}

    def take(state: dict[str, Any], path: Path) -> None:
        require(state, source.needed, path)
        require_class(state, make_agent, path)
        changes.update(changes_since(path.parent, state, command.config, defaults=command.defaults))
        with fitting(path, changes):
            agent.load_state_dict(state["agent"])
            source.take(state, path)

    state, folder = load_start(command, logdir, device, program=program, take=take)
    if command.entry["init"]:
        path = Path(command.entry["init"])
        weights = checkpoint.load(path, device)
        require(weights, WEIGHTS, path)
        require_class(weights, make_agent, path)
        with fitting(path):
            agent.load_weights(weights["agent"])
    return state, folder, changes


def _with_absolute_paths(command: CommandLine) -> CommandLine:
    """The same command after an environment has changed the working directory."""
    paths = {key: str(Path(str(command.entry[key])).absolute()) for key in PATHS if command.entry.get(key)}
    return command._replace(entry={**command.entry, **paths})


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
    if late := [key for key in changes if key.startswith(INITIAL_KEYS)]:
        tell(f"the run in {folder} has begun: {', '.join(late)} changes nothing any more")
    effective = {key: change for key, change in changes.items() if key not in late}
    if effective:
        tell(f"going on with the run in {folder}, changed: {listed(effective)}")
    return effective
