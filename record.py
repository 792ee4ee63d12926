"""Records episodes of any environment that agents here can play, random ones or a run's. Run it with --help."""

from __future__ import annotations

import statistics
import sys
from contextlib import closing
from pathlib import Path

import torch

import checkpoint
from config import CommandLine, ConfigError, UserError, one_line_errors, parse_command_line
from dreamer import Dreamer
from envs.tasks import Task
from sac import SAC
from settings.run import RunSettings
from system.terminal import show, tell
from training import loading
from training.agent import AgentClass, Player
from training.devices import make_generators, prepare_torch
from training.episodes import LONGEST_EPISODE
from training.evaluating import MACHINE_KEYS, trusts
from training.recording import RandomPlayer, make_empty, record
from training.setup import Setup, make_setup, require_players, telling_of_crashes

DESCRIPTION = """Record episodes, one .npz file each, to learn from with --replay. For example:
  python record.py --task gym_CartPole-v1 --episodes 100 --out episodes/cartpole
  python record.py --policy logdir/cartpole-seed0 --out episodes/cartpole-learnt
Of the config, only what makes the environment is read, and envs."""
ENTRY_KEYS = {
    "out": "the folder that the episodes are written into; made where there is none",
    "episodes": "how many (100)",
    "policy": "who plays: random (the default), or the folder or checkpoint of a run of dreamer.py or sac.py",
    "trust": "true: import and call what the config of that run names (false)",
}
RANDOM = "random"
AGENTS: dict[str, AgentClass] = {"Dreamer": Dreamer, "SAC": SAC}
# What is taken from the command line where a run plays; all else is the run's own.
PLAYING_KEYS = ("seed", "envs", "env_processes", "env_timeout", "env_restarts", "import", "act")


def maker_of(run: Path) -> AgentClass:
    """The class of the agent that a run has trained; that of most runs where it does not say."""
    cpu = torch.device("cpu")
    if run.is_dir():
        state = checkpoint.load_latest(run, cpu, to_go_on=False)
    else:
        state = checkpoint.load(run, cpu) if run.exists() else None
    name = (state or {}).get("agent_class", "Dreamer")
    if name not in AGENTS:
        raise ConfigError(f"{run} holds a {name}; record.py lets {' or '.join(AGENTS)} play")
    return AGENTS[name]


def run_and_setup(command: CommandLine, run: Path, device: torch.device) -> tuple[Player, Setup, RunSettings]:
    """The player that a run has trained, in environments as its config describes them.

    Raises:
        UserError, CheckpointError: there is no run that can play.
    """
    given = command.config.flat()
    loaded = loading.load_run(
        run,
        make_agent=maker_of(run),
        device=device,
        defaults=command.defaults,
        changes={key: given[key] for key in command.overrides if key in PLAYING_KEYS},
        given=command.config,
        trust=trusts(command),
    )
    others = [f"--{key}" for key in command.overrides if key not in (*PLAYING_KEYS, *MACHINE_KEYS)]
    if others or command.sections:
        ignored = " ".join([*others, *(["--configs"] if command.sections else [])])
        tell(f"the run has a config of its own: {ignored} changes nothing")
    # It was made to learn what the task is; a simulator may allow only one environment.
    loaded.setup.close()
    settings = RunSettings.of(loaded.config)
    require_players(settings, loaded.agent)
    return loaded.agent.players[settings.loop.act], make_setup(loaded.config, device), settings


def record_episodes(command: CommandLine) -> None:
    """Let somebody play, and write the episodes.

    Raises:
        UserError, CheckpointError: that cannot be done as it was asked for.
    """
    count, policy = _count(command.entry["episodes"] or "100"), command.entry["policy"] or RANDOM
    if not command.entry["out"]:
        raise ConfigError("give the folder for the episodes: --out FOLDER")
    # An environment may change the working directory.
    folder = Path(command.entry["out"]).absolute()
    device = prepare_torch(command.config)
    with telling_of_crashes():
        if policy == RANDOM:
            settings = RunSettings.of(command.config)
            setup = make_setup(command.config, device)
            player: Player = RandomPlayer(setup.task.actions) if isinstance(setup.task, Task) else _no_player()
        else:
            player, setup, settings = run_and_setup(command, Path(policy).absolute(), device)
    if settings.task.trips:
        raise ConfigError("trips are a record already; leave --trips out")
    generators = make_generators(settings.machine.seed, device)
    with telling_of_crashes(), closing(setup):
        env = setup.make_env(generators)
        make_empty(folder)
        returns = record(
            player,
            env,
            episodes=count,
            folder=folder,
            generator=generators["acting"],
            longest=LONGEST_EPISODE,
            written=lambda there: tell(f"{there} of {count} episodes") if there % max(1, count // 10) == 0 else None,
        )
    show(
        f"{folder}: {count} episodes, mean return {statistics.fmean(returns):.4g}, from {min(returns):.4g} to"
        f" {max(returns):.4g}"
    )


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ConfigError(f"--episodes is {text!r}; it takes a whole number from 1")
    return int(text)


def _no_player() -> Player:
    raise UserError("prompts have no episodes to record; choose a task with an environment")


def main(argv: list[str]) -> None:
    """Read the command line; play and write."""
    with one_line_errors("record.py", *loading.USER_ERRORS):
        record_episodes(
            parse_command_line(
                argv,
                config_path=Path(__file__).with_name("configs.yaml"),
                description=DESCRIPTION,
                entry_keys=ENTRY_KEYS,
            )
        )


if __name__ == "__main__":
    main(sys.argv[1:])
