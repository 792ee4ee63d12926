"""Model-free training on groups of samples: GRPO, PPO and REINFORCE, of language models and of routing. See --help."""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from config import CommandLine, Config, UserError, one_line_errors, parse_command_line
from envs.tasks import RoutingTask
from groups.losses import advantages, surrogate
from groups.sampler import Sampler, Samples
from groups.tours import TourSampler
from guard import Guard
from language.task import TextTask
from parts.precision import use_half_precision
from settings.groups import SamplingSettings
from settings.imitation import PLANNER_KEYS
from settings.run import EvaluationSettings
from tools import ReturnScale
from training import evaluating, launch
from training.trips import TripLog
from updates.learner import Computed, Learner
from updates.optimizer import Optimizer

DESCRIPTION = """Train a policy on groups of samples, or evaluate one; section grpo lies below all. For example:
  python grpo.py --configs grpo_words
  python grpo.py --configs grpo_tsp
  python grpo.py --configs ppo_tsp tsp_lanes
  python grpo.py --evaluate logdir/grpo_words-seed0"""
SECTION = "grpo"
# The folder of a logdir in which a language model lies in its own format.
MODEL = "model"
# Keys of the config that other programs read.
_DREAMERS = (
    *("trips", "places", "updates", "replay", "curriculum", "context", "act", "log_regret", "plan", "plan_instances"),
    *("teacher", "env", "envs", "env_processes", "env_timeout", "env_restarts", "eval_env", "valid_episodes"),
    "eval_episodes",
    *("prefill", "prefill_policy", "train_ratio", "replay_capacity", "replay_device", "replay_context"),
    *("replay_online", "reward_scale", "batch_size", "batch_length", "model_every", "reward_updates", "discount"),
    *("compile", "explore", "model", "critic", "baseline", "return_lambda", "target_clip"),
    *("guard.zero_keys", "guard.drop_keys"),
    *("actor.type", "actor.units", "actor.layers", "actor.advantage_scale", "actor.pointer.latent"),
    *("imag_policy", "imag_teacher", "imag_start", "imag_generated", "imag_horizon", "imag_tours", "imag_mask"),
    *("imag_nodes", "imag_contacts", "imag_imitation"),
    *("imag_reward", "imag_gradient", "imag_gradient_mix", "imag_penalty", "imag_augment"),
)
FOREIGN_KEYS = {
    **dict.fromkeys(_DREAMERS, "dreamer.py"),
    "sac": "sac.py",
    **dict.fromkeys(PLANNER_KEYS, "planner.py"),
}


class GRPO:
    """A policy that learns from what it decides about the same prompt or instance several times."""

    tasks: ClassVar[tuple[type, ...]] = (RoutingTask, TextTask)

    def __init__(
        self,
        task: RoutingTask | TextTask,
        settings: SamplingSettings,
        *,
        device: torch.device,
        generators: dict[str, torch.Generator],
        guard: Guard,
    ) -> None:
        """Build the policy on `device`.

        Args:
            task: what is to be decided about.
            settings: the sections that it reads.
            device: where to learn and decide.
            generators: one per role; `environment` and `acting` are drawn from here.
            guard: told of everything that is not finite.

        Raises:
            UserError: the settings do not fit the task.
        """
        self.device, self.guard, self.generators = device, guard, generators
        self.settings, self.groups = settings, settings.groups
        self.sampler = make_sampler(task, settings, device=device)
        self.players = self.sampler.players
        self.spread = ReturnScale("percentile", floor=settings.policy.advantage_floor).to(device)
        self.reference = None
        if self.groups.kl:
            self.reference = copy.deepcopy(self.sampler.policy).requires_grad_(False)
        # Whether an update on the latest samples was applied (1) or none was (0).
        self._applied = torch.zeros((), device=device)
        self.learner = Learner(
            partial(self._make_optimizers, settings),
            modules={"policy": self.sampler.policy, "spread": self.spread},
            watched={"policy": self.sampler.policy},
            follow=self._follow,
            generators=generators,
            guard=guard,
        )

    @classmethod
    def of(
        cls,
        task: RoutingTask | TextTask,
        config: Config,
        *,
        device: torch.device,
        generators: dict[str, torch.Generator],
        guard: Guard,
    ) -> GRPO:
        """The agent that a whole config describes."""
        return cls(task, SamplingSettings.of(config), device=device, generators=generators, guard=guard)

    @property
    def sees(self) -> list[str]:
        """What samples are of."""
        groups = self.groups
        return [f"{self.sampler.seen}; an update draws {groups.samples} samples of each of {groups.prompts}"]

    @property
    def faults(self) -> tuple[str, ...]:
        """Why some prompts are left out, a line each."""
        return self.sampler.faults

    def _make_optimizers(self, settings: SamplingSettings) -> dict[str, Optimizer]:
        return {
            "policy": Optimizer(
                "policy",
                {"policy": self.sampler.policy},
                guard=self.guard,
                lr=settings.policy.lr,
                clip=settings.policy.grad_clip,
                **asdict(settings.schedule),
                **asdict(settings.optimizer),
            )
        }

    def _follow(self, applied: dict[str, Tensor]) -> None:
        """Take back what samples have told of returns, unless one update on them at least was applied."""
        self._applied = torch.maximum(self._applied, applied["policy"])
        self.spread.revert_unless(self._applied)

    def practise(self, *, progress: float) -> tuple[dict[str, Tensor], Float[Tensor, ""]]:
        """Draw groups of samples, and learn from them `groups.epochs` times.

        Args:
            progress: the share of the run that is over, for schedules.
        """
        self.guard.update = self.learner.updates
        samples = self.sampler.draw(
            self.groups.prompts,
            self.groups.samples,
            generator=self.generators["acting"],
            environment=self.generators["environment"],
        )
        named = samples.named()
        self.guard.watch_all("sampled", named)
        advantage, metrics = self._advantage(samples)
        self._applied = torch.zeros((), device=self.device)
        before = samples.log_prob
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.sampler.score(self.reference, samples.decisions).log_prob

        def compute() -> Computed:
            scored = self.sampler.score(self.sampler.policy, samples.decisions)
            loss, metrics = surrogate(
                scored,
                before=scored.log_prob.detach() if before is None else before,
                reference=reference,
                advantage=advantage,
                counted=samples.counted,
                clip=self.groups.clip,
                length=self.groups.length,
                longest=self.sampler.longest,
                entropy=self._entropy(progress),
                kl=self.groups.kl,
            )
            return Computed([(loss, ("policy",))], {**metrics, "policy_loss": loss.detach()}, scored.log_prob.detach())

        for epoch in range(self.groups.epochs):
            updated, log_prob = self.learner.update(compute, batch=named, progress=progress)
            if epoch == 0 and samples.log_prob is not None:
                # The policy has not moved since it drew them: what differs comes of how it is computed.
                metrics["sampling_error_max"] = ((log_prob - samples.log_prob).abs() * samples.counted).amax()
            # Unless samples tell, the policy that they are from is that of the first epoch.
            before = log_prob if before is None else before
            metrics = metrics | updated
        return metrics | self.sampler.metrics(samples), self.sampler.steps(samples)

    def _advantage(self, samples: Samples) -> tuple[Float[Tensor, "B K"], dict[str, Tensor]]:
        """How much better than its group each sample is; metrics."""
        reward, choice = samples.reward, self.groups
        scale: Tensor | None = torch.ones((), device=reward.device)
        if choice.scale == "percentile":
            self.spread.update(reward)
            scale = self.spread.scale()
        advantage = advantages(reward, baseline=choice.baseline, scale=None if choice.scale == "deviation" else scale)
        equal = (reward == reward[:, :1]).all(-1)
        return advantage, {
            "train_return": reward.mean(),
            "group_deviation": reward.std(-1).mean(),
            # Whose samples all earned the same teach nothing.
            "group_equal_rate": equal.float().mean(),
        }

    def _entropy(self, progress: float) -> float:
        policy = self.settings.policy
        return policy.entropy + (policy.entropy_final - policy.entropy) * progress

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and counters; of the last good state where this one is not finite."""
        self.learner.mend()
        state = {
            "policy": self.sampler.weights(),
            "spread": self.spread.state_dict(),
            **self.sampler.facts(),
            **self.learner.state_dict(),
        }
        if self.reference is not None:
            state["reference"] = self.sampler.weights(self.reference)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            UserError: the run had no reference, or learnt from something else.
        """
        if self.reference is not None and "reference" not in state:
            raise UserError(
                f"groups.kl is {self.groups.kl:g}, and the run began without a policy to stay close to: go on with"
                " groups.kl 0, or begin a run with --init"
            )
        self.sampler.require_same(state)
        self.sampler.load_weights(state["policy"])
        self.spread.load_state_dict(state["spread"])
        if self.reference is not None:
            self.sampler.load_weights(state["reference"], self.reference)
        self.learner.load_state_dict(state)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take the policy from `state_dict`; it is also what the new policy is to stay close to.

        Raises:
            UserError: it is of another vocabulary.
        """
        self.sampler.require_fit(state)
        self.sampler.load_weights(state["policy"])
        if self.reference is not None:
            self.sampler.load_weights(state["policy"], self.reference)
        self.learner.keep()


def make_sampler(task: RoutingTask | TextTask, settings: SamplingSettings, *, device: torch.device) -> Sampler:
    """Who decides about a task; the one place that chooses between kinds."""
    halves = settings.precision == "bfloat16"
    if isinstance(task, TextTask):
        # Language models bring a library of their own, which takes seconds to import.
        from groups.texts import TextSampler

        return TextSampler(task, settings.language, half_precision=halves, device=device)
    sampler = TourSampler(
        task, settings.pointer, first=settings.groups.first, unimix=settings.policy.unimix, device=device
    )
    if halves:
        use_half_precision(sampler.policy)
    return sampler


def save_model(agent: GRPO, evaluation: EvaluationSettings, logdir: Path, log: TripLog | None) -> None:
    """Write a language model in its own format, too, when its training is over."""
    agent.sampler.save_pretrained(logdir / MODEL)


def read_command(argv: list[str]) -> CommandLine:
    """What a command line of this program asks for.

    Raises:
        ConfigError: as `parse_command_line`.
    """
    return parse_command_line(
        argv,
        config_path=Path(__file__).with_name("configs.yaml"),
        description=DESCRIPTION,
        entry_keys=launch.ENTRY_KEYS,
        base=[SECTION],
        foreign_keys=FOREIGN_KEYS,
    )


def main(argv: list[str]) -> None:
    """Read the command line; train, or evaluate a logdir."""
    with one_line_errors("grpo.py", *launch.USER_ERRORS):
        command = read_command(argv)
        if command.entry["evaluate"]:
            evaluating.evaluate_run(command, make_agent=GRPO)
        else:
            launch.train(command, argv=["grpo.py", *argv], make_agent=GRPO, at_end=save_model)


if __name__ == "__main__":
    main(sys.argv[1:])
