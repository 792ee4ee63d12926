"""A trained agent for programs of others: an observation comes in as the environment shows it, an action goes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool

from config import Config, UserError
from envs.translation import Translation
from parts.acting import Sight
from training.agent import POLICY, AgentClass, Player
from training.devices import choose_device
from training.loading import load_run
from training.setup import OneOrMany

# What acting without training takes otherwise than a run's config says.
CHANGES = {"compile": "none"}


class TrainedAgent:
    """Plays with what it has learnt.

    An agent has a memory: `action, state = agent(obs, state)` takes the state that the last call gave, and None where
    an episode begins.
    """

    def __init__(
        self, player: Player, translation: Translation, *, device: torch.device, generator: torch.Generator | None
    ) -> None:
        """Take a player, and what stands between it and the environment.

        Args:
            player: acts.
            translation: reads observations and writes actions.
            device: where the player lives.
            generator: draws the actions; None takes the likeliest.
        """
        self._player, self._translation = player, translation
        self._device, self._generator = device, generator

    def __call__(
        self, obs: Any, state: dict[str, Any] | None = None, *, is_first: Bool[Any, " E"] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """An action, and what to remember.

        Args:
            obs: one observation as the environment gives it, or a batch of E as gymnasium's vector environments do.
            state: from the last call; None where the episode begins, in a batch all of them.
            is_first: of a batch with a state, where an episode begins with this observation.

        Raises:
            UserError: the observation is not of the task, or not of as many environments as the state.
        """
        shown = self._translation.read(obs)
        first = torch.full((shown.rows,), state is None, device=torch.device("cpu"))
        if is_first is not None:
            first = first | torch.as_tensor(is_first, device=first.device).bool().reshape(-1)
        if state is None:
            state = {**self._player.initial_state(shown.rows), "count": shown.rows}
        if len(first) != shown.rows or state["count"] != shown.rows:
            raise UserError(
                f"there are {shown.rows} observations, and state or is_first is of another number: begin with"
                " agent(obs), and go on with the state that it returns"
            )
        sight = Sight(
            {name: value.to(self._device) for name, value in shown.obs.items()},
            first.to(self._device),
            bool(first.any()),
        )
        action, state = self._player.act(sight, state, generator=self._generator)
        return self._translation.write(action.cpu().numpy(), alone=shown.alone), {**state, "count": shown.rows}


def load_trained(
    run: str | Path,
    *,
    make_agent: AgentClass,
    defaults: Config,
    env: OneOrMany | None = None,
    sample: bool = False,
    seed: int = 0,
    device: str = "auto",
    trust: bool = False,
) -> TrainedAgent:
    """The trained agent of a run, for programs of others.

    Args:
        run: a run's folder, a checkpoint in one, or a file of weights alone.
        make_agent: whose run it is.
        defaults: give the keys that did not exist when the run was made.
        env: an environment of the task, or a vector environment, whose spaces are read; without it, one is made and
            closed again. Routing needs none.
        sample: draw actions as in training; otherwise the likeliest is taken, as evaluations do.
        seed: of the draws.
        device: where it thinks; auto is CUDA where there is one.
        trust: run what code the run's config names.

    Raises:
        UserError, CheckpointError: there is no such run, it is of another agent or for another environment, or its
            config names code.
    """
    where = choose_device(device)
    loaded = load_run(
        Path(run), make_agent=make_agent, device=where, defaults=defaults, changes=CHANGES, trust=trust, env=env
    )
    loaded.setup.close()
    translation = loaded.setup.translation
    assert translation is not None, "whoever plays has an environment"
    generator = torch.Generator(where).manual_seed(seed) if sample else None
    return TrainedAgent(loaded.agent.players[POLICY], translation, device=where, generator=generator)
