"""The Dreamer agent: acts in the world, learns a model of it, and improves inside the model. Run it with --help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

import trainer
from config import Config, ConfigError, parse_command_line, one_line_errors
from envs.routing import RULES
from envs.tasks import Task
from guard import Guard
from imagination import Imagination
from models import ImagBehavior, WorldModel
from networks import Latent, PointerTables, RoutingView, TSPPointerActor
from optimizer import Optimizer
from replay import Replay

DESCRIPTION = """Train a Dreamer. For example:
  python dreamer.py --configs tsp_attn
  python dreamer.py --configs tsp_attn --actor.entropy 1e-3 --seed 1 --logdir logdir/entropy"""


def imagination_settings(config: Config) -> Imagination:
    """The keys that say how to imagine, in one object.

    Raises:
        ValueError: they do not go together.
    """
    clip = config.target_clip
    return Imagination(
        mask=config.imag_mask,
        start=config.imag_start,
        reward=config.imag_reward,
        gradient=config.imag_gradient,
        gradient_mix=config.imag_gradient_mix,
        horizon=config.imag_horizon,
        tours=config.imag_tours,
        first=config.imag_first,
        augment=config.imag_augment,
        penalty=config.imag_penalty,
        baseline=config.baseline,
        discount=config.discount,
        lambda_=config.return_lambda,
        target_clip=clip if isinstance(clip, str) else tuple(clip),
    )


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

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        """What `act` carries from step to step, before the first step."""
        latent = self.model.rssm.initial((num_envs,))
        action = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        return {"deter": latent.deter, "stoch": latent.stoch, "action": action}

    @torch.no_grad()
    def act(
        self,
        obs: dict[str, Tensor],
        state: dict[str, Tensor],
        *,
        is_first: Bool[Tensor, " E"],
        any_first: bool,
        generator: torch.Generator | None,
    ) -> tuple[Int[Tensor, " E"], dict[str, Tensor]]:
        """Choose an action for every environment.

        Args:
            obs: observations, [E, ...].
            state: from `initial_state` or the last call.
            is_first: where an episode begins.
            any_first: whether one does anywhere; static context is encoded only then.
            generator: draws the actions; None takes the likeliest.
        """
        view, tables, context, new_state = None, None, None, {}
        # Acting may begin in mid-episode, after a prefill by another policy.
        any_first = any_first or state.keys() == self.initial_state(0).keys()
        pointer = isinstance(self.behavior.actor, TSPPointerActor)
        if self.task.rules is not None:
            instance, routing_state = self.task.rules.restore(obs)
            view = RoutingView(
                first=routing_state.first[:, None],
                current=routing_state.current[:, None],
                action_mask=obs["action_mask"][:, None],
            )
            if pointer:
                names = [name for name in PointerTables._fields if name != "latent" or self.behavior.actor.latent_size]
                if any_first:
                    fresh = self.behavior.actor.encode(self.task.rules.node_features(instance))
                    for name in names:
                        new_state[name] = _choose(is_first, getattr(fresh, name), state.get(name))
                else:
                    new_state = {name: state[name] for name in names}
                tables = PointerTables(**{name: new_state.get(name) for name in PointerTables._fields})
        feat = None
        if self.behavior.actor.latent_size:
            if self.task.rules is not None:
                if any_first:
                    context = self.model.context(instance)
                    new_state["nodes"] = _choose(is_first, context.nodes, state.get("nodes"))
                else:
                    new_state["nodes"] = state["nodes"]
                context = self._context(instance, new_state["nodes"])
            embed = self.model.encode(obs, context, view)
            embed = embed[:, 0] if view is not None else embed
            action = self.model.embed_action(state["action"][:, None], context)[:, 0]
            noise = None
            if generator is not None:
                shape = (embed.shape[0], self.model.rssm.stoch_size)
                noise = torch.rand(shape, generator=generator, device=self.device)
            latent, _ = self.model.rssm.observe_step(
                Latent(state["deter"], state["stoch"]), action, embed, is_first, noise
            )
            feat = latent.feat()[:, None]
        else:
            latent = Latent(state["deter"], state["stoch"])
        dist = self.behavior.actor(feat, tables, view)
        if generator is None:
            chosen = dist.mode()[:, 0]
        else:
            chosen = dist.sample(torch.rand(dist.probs.shape[:-1], generator=generator, device=self.device))[:, 0]
        return chosen, {**new_state, "deter": latent.deter, "stoch": latent.stoch, "action": chosen}

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
        shape = (*batch["reward"].shape, self.model.rssm.stoch_size)
        return torch.rand(shape, generator=self.generators["model"], device=self.device)

    def _update_model(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        losses, metrics = self.model.loss(batch, self._noise(batch))
        self.guard.watch_all("model loss", losses)
        total = sum(self.model.loss_scales[name] * loss for name, loss in losses.items())
        _, update_metrics = self.model_optimizer.step(total, progress=progress)
        return metrics | update_metrics

    def _update_reward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Train the move head alone; it needs many more updates than the rest of the model, and they are cheap."""
        instance, _ = self.task.rules.restore({key: value[:, 0] for key, value in batch.items()})
        feat = None
        if self.model.reward_latent:
            with torch.no_grad():
                feat = self.model.observe(batch, self._noise(batch))[0].feat()
        loss = self.model.move_loss(batch, instance, feat)
        self.model_optimizer.step(self.model.loss_scales["reward"] * loss, progress=progress)
        return {"move_error": loss.detach().sqrt()}

    def _context(self, instance: Any, nodes: Tensor) -> Any:
        from models import RoutingContext

        return RoutingContext(instance=instance, nodes=nodes)


def _choose(condition: Bool[Tensor, " E"], fresh: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return fresh
    return torch.where(condition.view(-1, *[1] * (fresh.ndim - 1)), fresh, kept)


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
    with one_line_errors("dreamer.py", *trainer.USER_ERRORS):
        command = parse_command_line(
            argv, config_path=Path(__file__).with_name("configs.yaml"), description=DESCRIPTION,
            entry_keys=trainer.ENTRY_KEYS,
        )
        trainer.train(
            command, argv=["dreamer.py", *argv], make_task=make_task, make_agent=Dreamer
        )


if __name__ == "__main__":
    main(sys.argv[1:])
