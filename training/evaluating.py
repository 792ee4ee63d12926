"""A saved run plays its final evaluation again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from config import CODE_KEYS, CommandLine, Config, ConfigError
from envs.tasks import ObservationTask
from settings.families import require_read
from settings.run import RunSettings
from system.terminal import show, tell
from training.agent import POLICY, AgentClass
from training.devices import prepare_torch
from training.film import film
from training.loading import load_run
from training.setup import (
    TRAINING_ENV,
    evaluator_elsewhere,
    make_one,
    make_setup,
    reading_of_observations,
    require_players,
    telling_of_crashes,
)

# What --evaluate takes from the command line; all else is the run's own.
EVALUATION_KEYS = (
    *("eval_episodes", "eval_instances", "eval_by", "import"),
    *("plan.pessimism", "plan.optimism", "plan.thompson", "plan.processes"),
    *("language.model", "language.prompts"),
    *("envs", "env_processes", "env_timeout", "env_restarts"),
)
MACHINE_KEYS = ("device", "threads", "deterministic")
# Where tours are played, if not on the run's own map.
STREETS = "streets"


def evaluate_run(command: CommandLine, *, make_agent: AgentClass) -> None:
    """Let a run's agent play the final evaluation again, and print how it did.

    Raises:
        UserError, CheckpointError: there is no run that can be evaluated.
    """
    path, video = Path(str(command.entry["evaluate"])), command.entry["video"]
    # An environment may change the working directory.
    folder = None if video is None else Path(video).absolute()
    RunSettings.of(command.config).evaluation.require_episodes()
    device = prepare_torch(command.config)
    given = command.config.flat()
    changes = {key: given[key] for key in command.overrides if key in EVALUATION_KEYS}
    with telling_of_crashes():
        run = load_run(
            path,
            make_agent=make_agent,
            device=device,
            defaults=command.defaults,
            # The environments that show what the task is are also those that the episodes are played in.
            changes={**changes, "eval_env": TRAINING_ENV, "env.reward_clip": 0.0},
            given=command.config,
            trust=trusts(command),
            to_play=True,
        )
    settings = RunSettings.of(run.config)
    settings.evaluation.require_episodes()
    require_players(settings, run.agent)
    if video and not isinstance(run.setup.task, ObservationTask):
        raise ConfigError("--video films gymnasium tasks; python solve.py draws tours")
    require_read(settings.task.task, {key: command.given[key] for key in changes})
    others = [f"--{key}" for key in ("init", "resume") if command.entry[key]]
    obeyed = (STREETS, *EVALUATION_KEYS, *MACHINE_KEYS, *_repeated(run.config, command.config))
    others += [f"--{key}" for key in command.overrides if key not in obeyed]
    if others or command.sections:
        ignored = " ".join([*others, *(["--configs"] if command.sections else [])])
        tell(f"the run has a config of its own: {ignored} changes nothing")
    setup, filmed = run.setup, None
    if folder is not None:
        # The film comes first, so that a fault in it shows before a hundred episodes are played. No other environment
        # exists meanwhile, since a simulator may allow only one.
        setup.close()
        make_env = make_one(settings.task, settings.wrappers, render_mode="rgb_array")
        most_envs = settings.environments.envs
        reading = reading_of_observations(settings.observations)
        filmed = film(run.agent.players[POLICY], make_env, folder=folder, device=device, most_envs=most_envs, **reading)
        setup = make_setup(run.config, device)
    with telling_of_crashes(), closing(setup):
        if STREETS in command.overrides:
            evaluator = evaluator_elsewhere(setup, run.config.replace(**{STREETS: given[STREETS]}), device)
        else:
            evaluator = setup.make_evaluator(None)
        report = evaluator.test(run.agent)
    assert report is not None, "there are episodes to be played"
    for line in report.notices:
        tell(line)
    show(f"{path} at step {run.step}: {report.summary}")
    if filmed is not None:
        show(f"film: {filmed}")


def trusts(command: CommandLine) -> bool:
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
    values, ours = config.flat(), given.flat()
    return [key for key in CODE_KEYS if values[key] == ours[key]]
