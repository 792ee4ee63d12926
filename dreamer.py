"""The Dreamer agent: acts in the world, learns a model of it, and improves inside the model. Run it with --help."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import launch
from config import Config, ConfigError, one_line_errors, parse_command_line, validate_ranges
from envs.drawing import draw_tour
from envs.routing import RULES, TSPInstance
from envs.tasks import Task
from guard import Guard
from imagination import Imagination
from models import ImagBehavior
from networks import Latent, PointerTables, RoutingView, TSPPointerActor
from optimizer import Optimizer
from replay import Replay
from tools import uniform
from world_model import RoutingContext, WorldModel

DESCRIPTION = """Train a Dreamer. For example:
  python dreamer.py --configs tsp_attn
  python dreamer.py --configs tsp_attn --actor.entropy 1e-3 --seed 1 --logdir logdir/entropy"""


RANGES = {
    **dict.fromkeys(("batch_size", "model_every", "model.units", "model.layers", "model.move_units"), (1, math.inf)),
    **dict.fromkeys(("actor.units", "actor.layers", "critic.units", "critic.layers"), (1, math.inf)),
    **dict.fromkeys(("model.free_nats", "reward_updates", "imag_penalty", "critic.slow_scale"), (0, math.inf)),
    **dict.fromkeys(("actor.entropy", "actor.entropy_final", "actor.pointer.latent"), (0, math.inf)),
    **dict.fromkeys(("actor.unimix", "model.rssm.unimix", "imag_gradient_mix", "critic.slow_rate"), (0, 1)),
    **{f"model.rssm.{name}": (1, math.inf) for name in ("deter", "stoch", "classes", "hidden", "blocks")},
    **{f"model.encoder.{name}": (1, math.inf) for name in ("width", "layers", "heads")},
    **{f"actor.pointer.{name}": (1, math.inf) for name in ("width", "layers", "heads", "hidden")},
    "actor.pointer.clip": (1e-3, math.inf),
    "actor.advantage_floor": (1e-8, math.inf),
    "batch_length": (2, math.inf),
    "critic.share": (0, 1),
}


def imagination_settings(config: Config) -> Imagination:
    """The keys that say how to imagine, in one object.

    Raises:
        ValueError: one cannot be read, or they do not go together.
    """
    return Imagination(
        mask=config.imag_mask,
        start=config.imag_start,
        reward=config.imag_reward,
        gradient=config.imag_gradient,
        gradient_mix=config.imag_gradient_mix,
        horizon=int(config.imag_horizon) if config.imag_horizon.isdigit() else config.imag_horizon,
        tours=config.imag_tours,
        first=config.imag_first,
        augment=config.imag_augment,
        penalty=config.imag_penalty,
        baseline=config.baseline,
        discount=config.discount,
        lambda_=config.return_lambda,
        target_clip=_range_or_name(config.target_clip),
    )


def _range_or_name(text: str) -> str | tuple[float, ...]:
    """`[-20, 0]` as two numbers; any other text as it stands."""
    if not text.startswith("["):
        return text
    try:
        return tuple(float(part) for part in text.strip("[]").split(","))
    except ValueError as error:
        raise ValueError(f"target_clip is {text!r}; a range is written as two numbers, such as [-20, 0]") from error


class Dreamer:
    """World model and behaviour behind the four verbs that the training loop knows."""

    def __init__(
        self, task: Task, config: Config, *, device: torch.device, generators: dict[str, torch.Generator], guard: Guard
    ) -> None:
        """Build model, behaviour and optimisers on `device`.

        Args:
            task: what is to be solved.
            config: the resolved config.
            device: where to learn and act.
            generators: one per role; `replay`, `model` and `imagination` are drawn from here.
            guard: told of everything that is not finite.

        Raises:
            ValueError: the config's parts do not fit the task or one another.
        """
        validate_ranges(config, RANGES)
        self.task, self.device, self.guard = task, device, guard
        self.generators = generators
        self.model = WorldModel(task, config.model).to(device)
        self.behavior = ImagBehavior(
            task,
            self.model,
            imagination=imagination_settings(config),
            actor=config.actor,
            critic=config.critic,
            schedule=config.schedule,
            guard=guard,
        ).to(device)
        self.model_optimizer = Optimizer(
            "model",
            {"model": self.model},
            guard=guard,
            lr=config.model.lr,
            clip=config.model.grad_clip,
            **config.schedule.to_dict(),
        )
        self.batch_size = config.batch_size
        self.model_every, self.reward_updates = config.model_every, config.reward_updates
        # Routing trains on whole episodes, so that each row of a batch has one static context.
        self.whole_episodes = task.rules is not None
        self.batch_length = config.batch_length
        if task.rules is not None:
            self.batch_length = task.rules.episode_steps(task.num_actions) + 1
        self.rows_per_update = self.batch_size * self.batch_length
        self.updates = 0

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        """What `act` carries from step to step, before the first step."""
        latent = self.model.rssm.initial((num_envs,))
        action = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        return {"deter": latent.deter, "stoch": latent.stoch, "action": action, "static": {}}

    @torch.no_grad()
    def act(
        self,
        obs: dict[str, Tensor],
        state: dict[str, Any],
        *,
        is_first: Bool[Tensor, " E"],
        any_first: bool,
        generator: torch.Generator | None,
    ) -> tuple[Int[Tensor, " E"], dict[str, Any]]:
        """Choose an action for every environment.

        Args:
            obs: observations, [E, ...].
            state: from `initial_state` or the last call.
            is_first: where an episode begins.
            any_first: whether one does anywhere; static context is encoded only then.
            generator: draws the actions; None takes the likeliest.
        """
        view, context, static = None, None, state["static"]
        if self.task.rules is not None:
            instance, routing_state = self.task.rules.restore(obs)
            # Acting may begin in mid-episode, after a prefill by another policy.
            if any_first or not static:
                static = _renew(static, self._encode_static(instance), is_first)
            view = RoutingView(
                first=routing_state.first[:, None],
                current=routing_state.current[:, None],
                action_mask=obs["action_mask"][:, None],
            )
            if "nodes" in static:
                context = RoutingContext(instance=instance, nodes=static["nodes"])
        latent, feat = Latent(state["deter"], state["stoch"]), None
        if self.behavior.actor.latent_size:
            latent = self._infer(obs, context, view, latent, state["action"], is_first, generator)
            feat = latent.feat()[:, None]
        tables = None
        if isinstance(self.behavior.actor, TSPPointerActor):
            tables = PointerTables(**{name: static.get(name) for name in PointerTables._fields})
        dist = self.behavior.actor(feat, tables, view)
        if generator is None:
            action = dist.mode()[:, 0]
        else:
            action = dist.sample(uniform(dist.probs.shape[:-1], generator))[:, 0]
        return action, {"deter": latent.deter, "stoch": latent.stoch, "action": action, "static": static}

    def _encode_static(self, instance: TSPInstance) -> dict[str, Tensor]:
        """What acting needs of each instance for a whole episode."""
        actor, encoded = self.behavior.actor, {}
        if isinstance(actor, TSPPointerActor):
            assert self.task.rules is not None
            tables = actor.encode(self.task.rules.node_features(instance))
            encoded = {name: table for name, table in tables._asdict().items() if table is not None}
        if actor.latent_size:
            encoded["nodes"] = self.model.context(instance).nodes
        return encoded

    def _infer(
        self,
        obs: dict[str, Tensor],
        context: RoutingContext | None,
        view: RoutingView | None,
        latent: Latent,
        prev_action: Int[Tensor, " E"],
        is_first: Bool[Tensor, " E"],
        generator: torch.Generator | None,
    ) -> Latent:
        """The latent after an observation."""
        embed = self.model.encode(obs, context, view).flatten(0, -2)
        action = self.model.embed_action(prev_action[:, None], context)[:, 0]
        noise = None
        if generator is not None:
            noise = uniform((embed.shape[0], self.model.rssm.stoch_size), generator)
        return self.model.rssm.observe_step(latent, action, embed, is_first, noise)[0]

    def update(self, replay: Replay, *, progress: float) -> dict[str, Tensor]:
        """Learn from one batch of replay: every `model_every` times the model, and always the behaviour.

        Args:
            replay: what has been lived through.
            progress: the share of the run that is over, for schedules.
        """
        self.guard.update = self.updates
        metrics: dict[str, Tensor] = {}
        batch = self._sample(replay)
        self.guard.watch_all("replayed", batch)
        if self.updates % self.model_every == 0:
            metrics |= self._update_model(batch, progress)
        for _ in range(self.reward_updates if self.task.rules is not None and "reward" in self.model.heads else 0):
            metrics |= self._update_reward(self._sample(replay), progress)
        metrics |= self.behavior.update(
            self.model,
            batch,
            progress=progress,
            reward_range=(replay.reward_min, replay.reward_max),
            generator=self.generators["imagination"],
        )
        self.updates += 1
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimisers and counters."""
        return {
            "model": self.model.state_dict(),
            "behavior": self.behavior.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers().items()},
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.load_weights(state)
        for name, optimizer in self._optimizers().items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.updates = state["updates"]

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take model and behaviour from `state_dict`, and nothing else."""
        self.model.load_state_dict(state["model"])
        self.behavior.load_state_dict(state["behavior"])

    def _optimizers(self) -> dict[str, Optimizer]:
        return {
            "model": self.model_optimizer,
            "actor": self.behavior.actor_optimizer,
            "critic": self.behavior.critic_optimizer,
        }

    def _sample(self, replay: Replay) -> dict[str, Tensor]:
        sample = replay.sample_episodes if self.whole_episodes else replay.sample_windows
        return sample(self.batch_size, self.batch_length, generator=self.generators["replay"])

    def _noise(self, batch: dict[str, Tensor]) -> Tensor:
        return uniform((*batch["reward"].shape, self.model.rssm.stoch_size), self.generators["model"])

    def _update_model(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        losses, metrics = self.model.loss(batch, self._noise(batch))
        self.guard.watch_all("model loss", losses)
        total = sum(self.model.loss_scales[name] * loss for name, loss in losses.items())
        _, update_metrics = self.model_optimizer.step(total, progress=progress)
        return metrics | update_metrics

    def _update_reward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Train the move head alone; it needs many more updates than the rest of the model, and they are cheap."""
        assert self.task.rules is not None
        instance, _ = self.task.rules.restore({key: value[:, 0] for key, value in batch.items()})
        feat = None
        if self.model.reward_latent:
            with torch.no_grad():
                feat = self.model.observe(batch, self._noise(batch))[0].feat()
        loss = self.model.move_loss(batch, instance, feat)
        self.model_optimizer.step(self.model.loss_scales["reward"] * loss, progress=progress)
        return {"move_error": loss.detach().sqrt()}


def _renew(kept: dict[str, Tensor], fresh: dict[str, Tensor], is_first: Bool[Tensor, " E"]) -> dict[str, Tensor]:
    """`fresh` for the environments whose episode begins, `kept` for the others; all of `fresh` if nothing is kept."""
    if not kept:
        return fresh
    return {
        name: torch.where(is_first.view(-1, *[1] * (value.ndim - 1)), value, kept[name])
        for name, value in fresh.items()
    }


def make_draw(agent: Dreamer) -> Callable[[Float[Tensor, "N 2"]], np.ndarray] | None:
    """A function that draws the greedy tour the agent imagines for an instance; None for tasks without tours."""
    rules = agent.task.rules
    if rules is None:
        return None

    @torch.no_grad()
    def draw(coords: Float[Tensor, "N 2"]) -> np.ndarray:
        instance = rules.instance_type(coords=coords[None].to(agent.device))
        trajectory, reward = agent.behavior.imagine_greedily(agent.model, instance)
        assert trajectory.state is not None
        tour = torch.cat((trajectory.state.current[0, 0, :1], trajectory.action[0, 0, :-1]))
        title = f"imagined: length {-float(reward.sum()):.3f} by the model"
        return draw_tour(coords.cpu().numpy(), tour.cpu().numpy(), title=title)

    return draw


def make_task(config: Config) -> Task:
    """The task that the config names.

    Raises:
        ConfigError: there is no such task.
    """
    if config.task not in RULES:
        raise ConfigError(f"task is {config.task!r}; choose one of {', '.join(RULES)}")
    return Task(rules=RULES[config.task], num_actions=config.nodes, vectors={})


def main(argv: list[str]) -> None:
    """Read the command line and train."""
    with one_line_errors("dreamer.py", *launch.USER_ERRORS):
        command = parse_command_line(
            argv,
            config_path=Path(__file__).with_name("configs.yaml"),
            description=DESCRIPTION,
            entry_keys=launch.ENTRY_KEYS,
        )
        launch.train(command, argv=["dreamer.py", *argv], make_task=make_task, make_agent=Dreamer, make_draw=make_draw)


if __name__ == "__main__":
    main(sys.argv[1:])
