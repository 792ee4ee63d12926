"""A run's agent and setup, loaded from its folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gymnasium.error import DependencyNotInstalled
from torch import nn

import checkpoint
from checkpoint import CheckpointError
from config import Config, ConfigError, filled, require_trust
from envs.crashes import EnvironmentCrashed
from envs.routing import RULES
from guard import Guard
from settings.run import RunSettings
from training.agent import AgentClass, Trained
from training.devices import make_generators
from training.resuming import WEIGHTS, fitting, require, require_class, saved_config
from training.setup import OneOrMany, Setup, make_setup, require_task
from training.trips import frame_of

# What loading a run may end with, beside a UserError, that is no defect.
USER_ERRORS = (CheckpointError, EnvironmentCrashed, DependencyNotInstalled)
# How many times the bytes of its file an agent may need, and bytes that it may always need: weights for acting are in
# half precision, and the size of the critic that they lack stands in the config only.
MOST_GROWTH, ALWAYS_ROOM = 16, 2**28
# Keys that name code for making gymnasium environments, and for nothing else.
ENVIRONMENT_KEYS = ("import", "task", "env.kwargs")


class LoadedRun(NamedTuple):
    """A finished or running run, taken from its folder.

    Attributes:
        config: the run's, with the changes that were asked for.
        setup: what the config describes.
        agent: as the checkpoint has it.
        step: that the run had come to.
        log: what the checkpoint tells of the log that the run has learnt from; None where there is none.
    """

    config: Config
    setup: Setup
    agent: Trained
    step: int
    log: dict[str, Any] | None = None


def load_run(
    run: Path,
    *,
    make_agent: AgentClass,
    device: torch.device,
    defaults: Config,
    make_setup: Callable[..., Setup] = make_setup,
    changes: dict[str, Any] | None = None,
    given: Config | None = None,
    trust: bool = False,
    to_play: bool = False,
    env: OneOrMany | None = None,
) -> LoadedRun:
    """The agent of a run as its checkpoint has it, in its setup.

    Args:
        run: the run's folder, for its latest checkpoint; one of its checkpoint files, with config.yaml beside it; or a
            file of weights alone, which holds its config.
        make_agent: as for `train`.
        device: where the agent will act.
        defaults: gives the keys that did not exist when the run was made.
        make_setup: as for `train`.
        changes: what the config is to have otherwise than the run's, by dotted key.
        given: the config of the user's own command line. Code that the run's config names is run where this one names
            the same.
        trust: run whatever code the run's config names.
        to_play: make as many gymnasium environments as the config says, and not one alone to learn what the task is.
        env: tells what a gymnasium task is, so that none is made, and no module imported that would register one.

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
    require_trust(config, run, given=given, trust=trust, unused=() if env is None else ENVIRONMENT_KEYS)
    RunSettings.of(config)
    alone = {"envs": 1, "env_processes": False} if config.task in RULES or not to_play else {}
    log = state.get("log")
    setup = make_setup(config.replace(**alone), device, frame=frame_of(log), env=env)
    require_task(setup.task, make_agent, config)
    _require_fit(state["agent"], run, make_agent=make_agent, task=setup.task, config=config)
    # Kernels are for updates, of which there will be none.
    acting = config.replace(compile="none") if config.compile == "kernels" else config
    agent = make_agent.of(
        setup.task, acting, device=device, generators=make_generators(config.seed, device), guard=Guard(device)
    )
    with fitting(run):
        agent.load_weights(state["agent"])
    return LoadedRun(config, setup, agent, state["step"], log)


def _require_fit(weights: Any, source: Path, *, make_agent: AgentClass, task: Any, config: Config) -> None:
    """Check that weights fit their config before the sizes in it take memory: on a device that has none.

    Raises:
        CheckpointError: they do not.
    """
    nowhere, generators = torch.device("meta"), make_generators(config.seed, torch.device("cpu"))
    # Sizes beyond what PyTorch can count are refused while the agent is made.
    with nowhere, warnings.catch_warnings(), fitting(source):
        # PyTorch warns of weights that are loaded into tensors without numbers.
        warnings.simplefilter("ignore")
        plain = config.replace(compile="none")
        agent = make_agent.of(task, plain, device=nowhere, generators=generators, guard=Guard(nowhere))
        agent.load_weights(weights)
        modules = [part for part in vars(agent).values() if isinstance(part, nn.Module)]
        needed = sum(each.numel() * each.element_size() for module in modules for each in module.parameters())
    if needed > MOST_GROWTH * checkpoint.claimed_bytes(weights) + ALWAYS_ROOM:
        raise CheckpointError(f"{source} does not fit this config, whose sizes need {needed / 1e9:.1f} GB")
