"""The SAC baseline: soft actor-critic without a model, on the Dreamer's loop and networks. Run it with --help."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from config import CommandLine, Config, ConfigError, load_defaults, one_line_errors, parse_command_line
from envs.tasks import ObservationTask, RoutingTask, Task
from guard import Guard
from parts.acting import Sight
from parts.observations import select
from parts.precision import halves_kept, use_half_precision
from settings.imitation import PLANNER_KEYS
from settings.sac import SACSettings
from soft.losses import ContinuousSoft, RoutingSoft, Soft, VectorSoft
from training import evaluating, launch
from training.agent import POLICY, Player
from training.replay import Replay
from updates.learner import Computed, Learner
from updates.optimizer import Optimizer

if TYPE_CHECKING:
    from training.playing import TrainedAgent

CONFIGS = Path(__file__).with_name("configs.yaml")
DESCRIPTION = """Train SAC, or evaluate it. Section sac lies under the sections that are named. It observes all that
dreamer.py does, images and dicts too, and plays one discrete action or continuous ones, not several choices at once.
For example:
  python sac.py --configs sac_pendulum
  python sac.py --configs tsp_sac
  python sac.py --task gym_HalfCheetah-v5
  python sac.py --task minatar_breakout
  python sac.py --evaluate logdir/sac_pendulum-seed0"""
SECTION = "sac"
# Keys of the config that only the Dreamer reads.
_DREAMERS = (
    *("trips", "places"),
    *("explore", "model", "critic", "baseline", "return_lambda", "target_clip", "model_every", "reward_updates"),
    *("replay_context", "replay_online", "batch_length", "compile"),
    *("actor.type", "actor.units", "actor.layers", "actor.unimix", "actor.entropy"),
    *("actor.entropy_final", "actor.advantage_scale", "actor.advantage_floor", "actor.lr"),
    *("actor.grad_clip", "actor.pointer.latent", "imag_start", "imag_generated", "imag_first", "imag_horizon"),
    *("imag_nodes", "imag_contacts", "imag_imitation"),
    *("imag_tours", "imag_mask", "imag_reward", "imag_gradient", "imag_gradient_mix", "imag_penalty", "imag_augment"),
)
FOREIGN_KEYS = {
    **dict.fromkeys(_DREAMERS, "dreamer.py"),
    **{"groups": "grpo.py", "language": "grpo.py"},
    **dict.fromkeys(PLANNER_KEYS, "planner.py"),
    # The one key of that section which is read here, too.
    "model.encode_keys": "",
}


class SAC:
    """Policy, twin Q functions and temperature behind the four verbs that the training loop knows."""

    tasks: ClassVar[tuple[type, ...]] = (Task,)

    def __init__(
        self,
        task: Task,
        settings: SACSettings,
        *,
        device: torch.device,
        generators: dict[str, torch.Generator],
        guard: Guard,
    ) -> None:
        """Build networks on `device`.

        Args:
            task: what is to be solved.
            settings: the sections that it reads.
            device: where to learn and act.
            generators: one per role; `replay` and `model` are drawn from here.
            guard: told of everything that is not finite.

        Raises:
            UserError: the settings do not fit the task.
        """
        task = task.reading(partial(select, pattern=settings.encode_keys))
        self.task, self.device, self.guard, self.generators = task, device, guard, generators
        self.soft = self._make_soft(settings)
        if settings.precision == "bfloat16":
            use_half_precision(self.soft)
        self.learner = Learner(
            partial(make_optimizers, self.soft, settings=settings, guard=guard),
            modules={"soft": self.soft},
            watched={**self.soft.judging(), "policy": self.soft.policy},
            follow=self.soft.follow,
            generators=generators,
            guard=guard,
        )
        self.batch_size = settings.batch_size
        # A transition is two rows.
        self.batch_length, self.whole_episodes = task.sequence(2)
        self.rows_per_update = self.batch_size * (self.batch_length if self.whole_episodes else 1)
        self.memory_spaces: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.players: dict[str, Player] = {POLICY: self}

    @classmethod
    def of(
        cls, task: Task, config: Config, *, device: torch.device, generators: dict[str, torch.Generator], guard: Guard
    ) -> SAC:
        """The agent that a whole config describes."""
        return cls(task, SACSettings.of(config), device=device, generators=generators, guard=guard)

    def _make_soft(self, settings: SACSettings) -> Soft:
        kind = self.task.actions.kind
        if kind == "continuous":
            assert isinstance(self.task, ObservationTask)
            return ContinuousSoft(self.task, settings.sac, discount=settings.discount, device=self.device)
        if kind == "discrete":
            if isinstance(self.task, ObservationTask):
                return VectorSoft(self.task, settings.sac, discount=settings.discount, device=self.device)
            assert isinstance(self.task, RoutingTask)
            return RoutingSoft(
                self.task.rules,
                settings.sac,
                pointer=settings.pointer,
                discount=settings.discount,
                device=self.device,
            )
        raise ConfigError(
            f"{settings.task} has {kind} actions; SAC plays one discrete action or continuous ones:"
            f" python dreamer.py --task {settings.task} plays it"
        )

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        """What `act` carries from step to step, before the first step."""
        return {"static": {}}

    @torch.no_grad()
    @halves_kept()
    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, "E *A"], dict[str, Any]]:
        """Choose an action for every environment.

        Args:
            sight: what the environments show, all finite. Nodes are encoded only where an episode begins.
            state: from `initial_state` or the last call.
            generator: draws the actions; None takes the likeliest.
        """
        action, static = self.soft.act(sight, state["static"], generator=generator)
        return action, {"static": static}

    @property
    def acting_modules(self) -> Mapping[str, nn.Module]:
        """What acting takes: not the Q functions."""
        return {"policy": self.soft.policy, "read": self.soft.read}

    def memory(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Replay keeps nothing of the acting state."""
        return {}

    def update(self, replay: Replay, *, progress: float) -> dict[str, Tensor]:
        """Learn from one batch of replay.

        Args:
            replay: what has been lived through.
            progress: the share of the run that is over, for schedules.
        """
        self.guard.update = self.learner.updates
        batch = replay.sample(
            self.batch_size, self.batch_length, whole_episodes=self.whole_episodes, generator=self.generators["replay"]
        )
        self.guard.watch_all("replayed", batch)

        @halves_kept()
        def compute() -> Computed:
            losses, metrics = self.soft.losses(batch, self.generators["model"])
            metrics = metrics | {f"{name}_loss": loss.detach() for name, loss in losses.items()}
            return Computed([(loss, (name,)) for name, loss in losses.items()], metrics)

        metrics, _ = self.learner.update(compute, batch=batch, progress=progress)
        for name in ("q", "policy"):
            metrics[f"train/{name}_grad_norm"] = metrics.pop(f"{name}_grad_norm")
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimisers and counters; of the last good state where this one is not finite."""
        self.learner.mend()
        return {"soft": self.soft.state_dict(), **self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.soft.load_state_dict(state["soft"])
        self.learner.load_state_dict(state)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take policy and Q functions from `state_dict`; the temperature begins as the config says."""
        begun = {f"temperature.{name}": value for name, value in self.soft.temperature.state_dict().items()}
        self.soft.load_state_dict({**state["soft"], **begun})
        self.learner.keep()


def make_optimizers(soft: Soft, *, settings: SACSettings, guard: Guard) -> dict[str, Optimizer]:
    """An optimiser for each of `q`, `policy` and `alpha`."""
    shared = {**asdict(settings.schedule), **asdict(settings.optimizer)}
    groups = {"q": soft.judging(), "policy": {"policy": soft.policy}, "alpha": {"alpha": soft.temperature}}
    clips = {"q": settings.sac.max_grad_norm, "policy": settings.sac.max_grad_norm, "alpha": math.inf}
    return {
        name: Optimizer(name, modules, guard=guard, lr=settings.sac.lr, clip=clips[name], **shared)
        for name, modules in groups.items()
    }


def load(run: str | Path, **options: Any) -> TrainedAgent:
    """A trained SAC for programs of one's own, as `dreamer.load` gives a Dreamer.

    Raises:
        UserError, CheckpointError: as there.
    """
    # Whoever imports this module for its agent needs no environments.
    from training.playing import load_trained

    return load_trained(run, make_agent=SAC, defaults=load_defaults(CONFIGS), **options)


def read_command(argv: list[str]) -> CommandLine:
    """What a command line of this program asks for.

    Raises:
        ConfigError: as `parse_command_line`.
    """
    return parse_command_line(
        argv,
        config_path=CONFIGS,
        description=DESCRIPTION,
        entry_keys=launch.ENTRY_KEYS,
        base=[SECTION],
        foreign_keys=FOREIGN_KEYS,
    )


def main(argv: list[str]) -> None:
    """Read the command line; train, or evaluate a logdir."""
    with one_line_errors("sac.py", *launch.USER_ERRORS):
        command = read_command(argv)
        if command.entry["evaluate"]:
            evaluating.evaluate_run(command, make_agent=SAC)
        else:
            launch.train(command, argv=["sac.py", *argv], make_agent=SAC)


if __name__ == "__main__":
    main(sys.argv[1:])
