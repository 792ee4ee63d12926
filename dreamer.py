"""The Dreamer agent: acts in the world, learns a model of it, and improves inside the model. Run it with --help."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from config import CommandLine, Config, UserError, load_defaults, one_line_errors, parse_command_line
from envs.tasks import Task
from guard import Guard
from imagining.imagination import Look
from models import make_behavior, make_imagination, make_optimizers, make_planners, make_teacher
from networks import Latent
from parts.acting import Sight
from parts.moves import Moves
from parts.precision import halves_kept, use_half_precision
from planning.planner import Planner
from planning.teacher import Lesson, imitation
from settings.dreamer import DreamerSettings
from settings.imitation import PLANNER_KEYS
from settings.learning import Compilation
from settings.run import EvaluationSettings
from solving.forecasts import Forecaster
from solving.intervals import Calibration
from system.ranks import here
from system.terminal import tell
from tools import Bounds, uniform
from training.agent import POLICY, MoveLog, Player
from training.replay import Replay
from training.trips import TripLog
from updates.compiling import Part, compile_parts, compiled_parts
from updates.learner import Computed, Learner, LossGroups
from updates.optimizer import Optimizer

if TYPE_CHECKING:
    from training.playing import TrainedAgent

CONFIGS = Path(__file__).with_name("configs.yaml")
DESCRIPTION = """Train a Dreamer, or evaluate one. For example:
  python dreamer.py --configs tsp_attn
  python dreamer.py --task gym_CartPole-v1
  python dreamer.py --evaluate logdir/cartpole-seed0
  python dreamer.py --configs tsp_attn --actor.entropy 1e-3 --seed 1 --logdir logdir/entropy"""
FOREIGN_KEYS = {
    **{"sac": "sac.py", "groups": "grpo.py", "language": "grpo.py"},
    **dict.fromkeys(PLANNER_KEYS, "planner.py"),
}


class Dreamer:
    """World model and behaviour behind the four verbs that the training loop knows."""

    tasks: ClassVar[tuple[type, ...]] = (Task,)

    def __init__(
        self,
        task: Task,
        settings: DreamerSettings,
        *,
        device: torch.device,
        generators: dict[str, torch.Generator],
        guard: Guard,
    ) -> None:
        """Build model and behaviour on `device`.

        Args:
            task: what is to be solved.
            settings: the sections that it reads.
            device: where to learn and act.
            generators: one per role; `replay`, `model` and `imagination` are drawn from here.
            guard: told of everything that is not finite.

        Raises:
            UserError: the settings do not fit the task.
        """
        self.task, self.device, self.guard = task, device, guard
        # Rewards were multiplied with this before the model saw them.
        self.reward_scale = settings.reward_scale
        self.generators = generators
        self.imagination = make_imagination(task, settings.imagination, model=settings.model)
        self.model = self.imagination.model.to(device)
        self.behavior = make_behavior(task, self.imagination, settings=settings).to(device)
        if settings.precision == "bfloat16":
            use_half_precision(self.model)
            use_half_precision(self.behavior)
        groups = {"model": self.model, **self.behavior.groups}
        self.learner = Learner(
            partial(self._make_optimizers, groups, settings=settings),
            modules={"model": self.model, "behavior": self.behavior},
            watched=groups,
            follow=self.behavior.follow,
            generators=generators,
            guard=guard,
        )
        self.compiled: Compilation = "none"
        self._compile = partial(compile_parts, mode=settings.compile, device=device, tell=tell)
        if settings.compile != "none" and self._compile(self.parts()):
            self.compiled, self.imagination.stops_early = settings.compile, False
        self.batch_size, self.online = settings.batch_size, settings.replay_online
        self.model_every = settings.model_every
        self.practises = settings.imagination.policy > 0 or settings.imagination.imitation > 0
        if not self.practises and not self.model.separate_reward:
            raise UserError("imag_policy is 0; a task without rules needs it or imag_imitation above 0: none else acts")
        self.reward_updates = settings.reward_updates if self.model.separate_reward else 0
        self.batch_length, self.whole_episodes = task.sequence(settings.batch_length)
        self.rows_per_update = self.batch_size * self.batch_length
        self.memory_spaces = self.model.memory_spaces if settings.replay_context else {}
        planners = make_planners(self.imagination, settings.plan, reward_scale=settings.reward_scale)
        self.players: dict[str, Player] = {POLICY: self, **planners}
        self.teacher = None
        if settings.teacher.scale:
            self.teacher = make_teacher(planners, settings.teacher, actor=self.behavior.actor)
        # How wrong the model is about what tours cost, as `solving.calibrating` found out; until the next update.
        self.calibration: dict[str, Calibration] = {}

    @property
    def forecaster(self) -> Forecaster | None:
        """What tells how much tours will cost; None where the model does not know that apart from latents."""
        planner = self.players.get("plan")
        if planner is None:
            return None
        assert isinstance(planner, Planner), "nobody else plans"
        return Forecaster(planner.imagination, planner.settings, reward_scale=self.reward_scale)

    @property
    def trains_policy(self) -> bool:
        """Whether an update trains the actor."""
        return self.practises or self.teacher is not None

    @classmethod
    def of(
        cls, task: Task, config: Config, *, device: torch.device, generators: dict[str, torch.Generator], guard: Guard
    ) -> Dreamer:
        """The agent that a whole config describes."""
        return cls(task, DreamerSettings.of(config), device=device, generators=generators, guard=guard)

    def _make_optimizers(self, groups: Mapping[str, nn.Module], *, settings: DreamerSettings) -> dict[str, Optimizer]:
        optimizers = make_optimizers(groups, settings=settings, guard=self.guard)
        if self.compiled != "none":
            self._compile([part for optimizer in optimizers.values() for part in optimizer.parts()], tell=_unsaid)
        return optimizers

    def parts(self) -> list[Part]:
        """What pays to be compiled: each step of the two loops, decisions, and all that comes after a loop."""
        model, behavior = self.model, self.behavior
        parts = [
            Part(model.rssm, "observe_step"),
            Part(model.rssm, "imagine_step"),
            Part(behavior.actor, "draw"),
            Part(behavior, "replay_value_loss"),
        ]
        if model.traceable:
            parts.append(Part(model, "losses_of"))
        # What a gradient through the dynamics must not reach is frozen meanwhile, which no graph can hold.
        if not behavior.differentiable:
            parts.append(Part(behavior, "losses_of"))
        return parts

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        """What `act` carries from step to step, before the first step."""
        latent = self.model.rssm.initial((num_envs,))
        spec = self.task.actions
        action = torch.zeros((num_envs, *spec.shape), dtype=spec.dtype, device=self.device)
        return {**latent._asdict(), "action": action, **self.imagination.first_notes(num_envs)}

    @torch.no_grad()
    @halves_kept()
    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, "E *A"], dict[str, Any]]:
        """Choose an action for every environment.

        Args:
            sight: what the environments show. Static context is encoded only where an episode begins.
            state: from `initial_state` or the last call.
            generator: draws the actions; None takes the likeliest.
        """
        with compiled_parts(self.compiled, learning=False):
            action, state = self._act(sight, state, generator)
        # A recorded graph gives its results in the same memory each time.
        if self.compiled == "graphs":
            action, state = action.clone(), {**state, "deter": state["deter"].clone(), "stoch": state["stoch"].clone()}
            state["action"] = action
        return action, state

    def _act(
        self, sight: Sight, state: dict[str, Any], generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, "E *A"], dict[str, Any]]:
        actor, latent, feat = self.behavior.actor, Latent(state["deter"], state["stoch"]), None
        look = self.imagination.look(sight, state, actor)
        if actor.latent_size:
            latent = self._infer(sight, look, latent, state["action"], generator)
            # One failed update must not leave its NaN in here until the episode ends.
            latent = latent._replace(deter=latent.deter.nan_to_num(0.0, 0.0, 0.0))
            feat = latent.feat()[:, None]
        noise = None
        if generator is not None:
            noise = uniform((sight.is_first.shape[0], 1, *self.task.actions.shape), generator)
        action = actor.draw(feat, look.tables, look.view, noise)[0][:, 0]
        return action, {**latent._asdict(), "action": action, **look.notes}

    def _infer(
        self,
        sight: Sight,
        look: Look,
        latent: Latent,
        prev_action: Shaped[Tensor, "E *A"],
        generator: torch.Generator | None,
    ) -> Latent:
        """The latent after an observation."""
        embed = self.model.encode(sight.obs, look.context, look.view).flatten(0, -2)
        action = self.model.embed_action(prev_action[:, None], look.context)[:, 0]
        noise = None
        if generator is not None:
            noise = uniform((embed.shape[0], self.model.rssm.stoch_size), generator)
        return self.model.rssm.observe_step(latent, action, embed, sight.is_first, noise)[0]

    def memory(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """What replay keeps of the state that `act` returned, under the keys of `memory_spaces`."""
        if not self.memory_spaces:
            return {}
        return self.model.memory(Latent(state["deter"], state["stoch"]))

    def update(self, replay: Replay, *, progress: float) -> dict[str, Tensor]:
        """Learn from one batch of replay: every `model_every` times the model, and always the behaviour.

        Args:
            replay: what has been lived through.
            progress: the share of the run that is over, for schedules.
        """
        self.guard.update = self.learner.updates
        self.calibration = {}
        metrics: dict[str, Tensor] = {}
        batch = self._sample(replay)
        for _ in range(self.reward_updates):
            metrics |= self._update_reward(self._sample(replay), progress)
        with_model = self.learner.updates % self.model_every == 0

        # Plans are made once, also where the losses are computed again to find out what was not finite.
        lesson = None if self.teacher is None else self.teacher.lesson(batch, self.generators["imagination"])

        rewards = Bounds(*here().widest(*replay.rewards))

        def compute() -> Computed:
            return self._losses(batch, lesson, with_model=with_model, progress=progress, rewards=rewards)

        with compiled_parts(self.compiled, learning=True):
            update_metrics, observed = self.learner.update(compute, batch=batch, progress=progress)
        if self.memory_spaces and with_model:
            replay.rewrite(batch, self.model.memory(observed.latents))
        return metrics | update_metrics

    @halves_kept()
    def _losses(
        self,
        batch: dict[str, Tensor],
        lesson: Lesson | None,
        *,
        with_model: bool,
        progress: float,
        rewards: Bounds,
    ) -> Computed:
        """All losses of one update, each with the groups it trains; metrics; the latents that the model saw."""
        losses: LossGroups = []
        metrics: dict[str, Tensor] = {}
        observed = None
        if with_model:
            model_losses, metrics, observed = self.model.loss(batch, self._noise(batch, "model"))
            self.guard.watch_all("model loss", model_losses)
            total = self.model.total(model_losses)
            metrics = metrics | {"model_loss": total.detach()}
            losses.append((total, ("model",)))
        elif self.behavior.starts_from_latents:
            with torch.no_grad():
                observed = self.model.observe(batch, self._noise(batch, "imagination"))
        practice, practice_metrics = self._practice(
            batch, observed, lesson, progress=progress, rewards=rewards, replayed=with_model
        )
        losses += practice
        metrics |= practice_metrics
        if not losses:
            loss, reward_metrics = self.model.reward_loss(batch, self.generators["model"])
            metrics |= reward_metrics
            losses.append((loss, ("model",)))
        return Computed(losses, metrics, observed)

    def _practice(
        self,
        batch: dict[str, Tensor],
        observed: Any,
        lesson: Lesson | None,
        *,
        progress: float,
        rewards: Bounds,
        replayed: bool,
    ) -> tuple[LossGroups, dict[str, Tensor]]:
        """The losses of actor and critic on what is imagined, and of imitating a lesson; metrics."""
        losses: LossGroups = []
        metrics: dict[str, Tensor] = {}
        if self.practises:
            behavior_losses, metrics = self.behavior.losses(
                batch,
                observed,
                progress=progress,
                rewards=rewards,
                generator=self.generators["imagination"],
                replayed=replayed,
            )
            for name, loss in behavior_losses.items():
                losses.append((loss, ("critic", "model") if name == "replay_value" else (name,)))
        if lesson is not None:
            assert self.teacher is not None
            loss, teacher_metrics = imitation(self.behavior.actor, lesson)
            metrics = metrics | teacher_metrics
            losses.append((self.teacher.scale(progress) * loss, ("actor",)))
        return losses, metrics

    def require_study(self) -> None:
        """Check that a log of moves is all that is needed to learn from.

        Raises:
            UserError: something reads latents, or what episodes alone can tell.
        """
        self.imagination.require_study(practises=self.practises, needs_latent=self.behavior.needs_latent)

    def study(self, log: MoveLog, *, progress: float) -> dict[str, Tensor]:
        """Learn what moves cost, from as many logged ones as `batch_size` tours have; practise on dreamt maps.

        Args:
            log: moves that somebody has made.
            progress: the share of the run that is over, for schedules.
        """
        self.guard.update = self.learner.updates
        self.calibration = {}
        moves = log.sample(self.batch_size * self.task.num_actions, generator=self.generators["replay"])
        seen = {name: part for name, part in moves._asdict().items() if part is not None}
        self.guard.watch_all("logged", seen)
        dreamt: dict[str, Tensor] = {}
        if self.practises or self.teacher is not None:
            dreamt = self.imagination.dreamt(self.batch_size, self.generators["imagination"])
        lesson = None if self.teacher is None else self.teacher.lesson(dreamt, self.generators["imagination"])

        @halves_kept()
        def compute() -> Computed:
            loss, metrics = self.model.study(moves)
            practice, practice_metrics = self._practice(
                dreamt, None, lesson, progress=progress, rewards=Bounds(*here().widest(*log.rewards)), replayed=False
            )
            return Computed([(loss, ("model",)), *practice], metrics | practice_metrics)

        with compiled_parts(self.compiled, learning=True):
            return self.learner.update(compute, batch=seen | dreamt, progress=progress)[0]

    def expected(self, moves: Moves) -> Float[Tensor, "K M"]:
        """What each member of the move head's ensemble expects moves to earn."""
        return self.model.predict_logged(moves)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimisers and counters; of the last good state where this one is not finite."""
        self.learner.mend()
        return {
            "model": self.model.state_dict(),
            "behavior": self.behavior.state_dict(),
            **self.learner.state_dict(),
            **({} if self.teacher is None else {"teacher": self.teacher.state_dict()}),
            **self._known_errors(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.load_weights(state)
        self.learner.load_state_dict(state)
        if self.teacher is not None and "teacher" in state:
            self.teacher.load_state_dict(state["teacher"])

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take model, behaviour and calibration from `state_dict` or `acting_weights`, and nothing else."""
        self.model.load_state_dict(state["model"])
        behavior = state["behavior"]
        if not any(name.startswith("critic.") for name in behavior):
            # Weights for acting come without a critic; it stays as it is.
            own = self.behavior.state_dict().items()
            behavior = {**{name: value for name, value in own if not name.startswith("actor.")}, **behavior}
        self.behavior.load_state_dict(behavior)
        self.calibration = {way: Calibration.read(values) for way, values in state.get("calibration", {}).items()}
        self.learner.keep()

    @property
    def acting_modules(self) -> Mapping[str, nn.Module]:
        """What acting takes: not the critic."""
        return {"model": self.model, "actor": self.behavior.actor}

    def acting_weights(self) -> dict[str, Any]:
        """The weights of world model and actor, in half precision, and the calibration: what answering needs.

        `load_weights` takes them as it takes `state_dict`.
        """
        self.learner.mend()
        parts = {"model": (self.model, ""), "behavior": (self.behavior.actor, "actor.")}
        weights: dict[str, Any] = self._known_errors()
        for part, (module, prefix) in parts.items():
            # Buffers are no weights, and bins of a two-hot exceed what half precision can hold.
            trained = dict(module.named_parameters())
            weights[part] = {
                prefix + name: value.half() if name in trained else value for name, value in module.state_dict().items()
            }
        return weights

    def _known_errors(self) -> dict[str, Any]:
        """The calibration as checkpoints have it; nothing where there is none."""
        errors = {way: each._asdict() for way, each in self.calibration.items()}
        return {"calibration": errors} if errors else {}

    def _sample(self, replay: Replay) -> dict[str, Tensor]:
        batch = replay.sample(
            self.batch_size,
            self.batch_length,
            whole_episodes=self.whole_episodes,
            online=self.online,
            generator=self.generators["replay"],
        )
        self.guard.watch_all("replayed", batch)
        return batch

    def _noise(self, batch: dict[str, Tensor], role: str) -> Tensor:
        return uniform((*batch["reward"].shape, self.model.rssm.stoch_size), self.generators[role])

    def _update_reward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Train the reward head alone; it needs many more updates than the rest of the model, and they are cheap."""

        @halves_kept()
        def compute() -> Computed:
            loss, metrics = self.model.reward_loss(batch, self.generators["model"])
            return Computed([(loss, ("model",))], metrics)

        return self.learner.update_alone("model", compute, batch=batch, progress=progress)


def _unsaid(line: str) -> None:
    """For what has been said before."""


def calibrate_at_end(agent: Dreamer, evaluation: EvaluationSettings, logdir: Path, log: TripLog | None) -> None:
    """Let an agent know how wrong it is about what tours cost, where positions do not tell that and somebody knows.

    Args:
        agent: whose training is over.
        evaluation: on how many validation instances.
        logdir: of the run; the checkpoint there will hold it.
        log: that it has learnt from; where nobody knows the true costs, its held-out trips tell.
    """
    # Whoever imports this module for its agent needs none of them.
    from solving.calibrating import calibrate
    from solving.decoding import Decoding
    from solving.driven_trips import calibrate_by_trips

    forecaster = agent.forecaster
    if forecaster is None or forecaster.knows_costs:
        return
    methods = (Decoding.PLAN, *(("greedy", "sample") if agent.trains_policy else ()))
    if forecaster.model.rules.costs.known:
        agent.calibration = calibrate(
            agent.behavior,
            forecaster,
            nodes=agent.task.num_actions,
            instances=evaluation.valid_instances,
            methods=methods,
        )
    elif log is not None:
        moves = log.held_out
        expected, paid = (-each.double().cpu().numpy() for each in (agent.expected(moves), moves.reward))
        found = calibrate_by_trips(expected, paid, log.held_out_trip)
        agent.calibration = {} if found is None else dict.fromkeys(methods, found)


def load(run: str | Path, **options: Any) -> TrainedAgent:
    """A trained agent for programs of one's own: `action, state = agent(obs, state)`.

    `options` are those of `training.playing.load_trained`: env, sample, seed, device, trust.

    Raises:
        UserError, CheckpointError: as there.
    """
    # Whoever imports this module for its agent needs no environments.
    from training.playing import load_trained

    return load_trained(run, make_agent=Dreamer, defaults=load_defaults(CONFIGS), **options)


def read_command(argv: list[str]) -> CommandLine:
    """What a command line of this program asks for.

    Raises:
        ConfigError: as `parse_command_line`.
    """
    # As in `main`.
    from training import launch

    return parse_command_line(
        argv,
        config_path=CONFIGS,
        description=DESCRIPTION,
        entry_keys=launch.ENTRY_KEYS,
        foreign_keys=FOREIGN_KEYS,
    )


def main(argv: list[str]) -> None:
    """Read the command line; train, or evaluate a logdir."""
    # Whoever imports this module for its agent needs neither a training loop nor its log.
    from training import evaluating, launch

    with one_line_errors("dreamer.py", *launch.USER_ERRORS):
        command = read_command(argv)
        if command.entry["evaluate"]:
            evaluating.evaluate_run(command, make_agent=Dreamer)
        else:
            launch.train(
                command,
                argv=["dreamer.py", *argv],
                make_agent=Dreamer,
                make_pictures=lambda agent: agent.imagination.pictures(
                    agent.behavior.actor,
                    needs_latent=agent.behavior.needs_latent,
                    reward_scale=agent.reward_scale,
                    device=agent.device,
                ),
                at_end=calibrate_at_end,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
