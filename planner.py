"""A trajectory planner that learns from logs of traffic by imitation. See --help."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import imitation.setup
from config import CommandLine, Config, ConfigError, load_defaults, one_line_errors, parse_command_line
from guard import Guard
from imitation.batches import as_driven, as_features
from imitation.decoder import PlanningDecoder, Plans
from imitation.driver import TrainedPlanner
from imitation.losses import LOSSES, Driven, imitation_losses
from imitation.network import PlanningNetwork
from imitation.scene_encoder import SceneEncoder
from imitation.task import PlanningTask
from scenarios.dataset import Draws
from settings.imitation import ImitationSettings
from system.terminal import show, tell
from training import launch
from training.agent import POLICY
from training.devices import choose_device, prepare_torch
from training.loading import load_run
from training.logdirs import default_logdir
from updates.learner import Computed, Learner
from updates.optimizer import Optimizer

DESCRIPTION = """Learn to drive by imitation of logs, in four steps; section planner lies below all. For example:
  python planner.py --configs drive --mode cache
  python planner.py --configs drive --mode train
  python planner.py --configs drive --mode test"""
CONFIGS = Path(__file__).with_name("configs.yaml")
SECTION = "planner"
MODES = ("cache", "train", "validate", "test")
ENTRY_KEYS = {
    "mode": "cache: compute samples of scenarios; train: learn from them, and compute what is missing; validate, test:"
    " judge the run of the same command (train)",
    "resume": launch.ENTRY_KEYS["resume"],
    "init": launch.ENTRY_KEYS["init"],
}
# Keys that other programs read.
_OTHERS = (
    *("import", "context", "nodes", "curriculum", "cost", "cost_shown", "streets", "trips", "places", "replay_device"),
    *("precision", "compile", "env", "steps", "replay", "envs", "env_processes", "env_timeout", "env_restarts"),
    *("prefill", "prefill_policy", "act", "log_regret", "valid_instances", "eval_instances", "valid_episodes"),
    *("eval_episodes", "eval_env", "eval_by", "plan_instances", "replay_capacity", "reward_scale", "replay_context"),
    *("replay_online", "train_ratio", "batch_length", "model_every", "reward_updates", "guard.zero_keys"),
    *("guard.drop_keys", "imag_policy", "imag_teacher", "imag_start", "imag_generated", "imag_first", "imag_horizon"),
    *("layout", "imag_nodes", "imag_contacts", "imag_imitation"),
    *("imag_tours", "imag_mask", "imag_reward", "imag_gradient", "imag_gradient_mix", "imag_penalty", "imag_augment"),
    *("baseline", "discount", "return_lambda", "target_clip", "plan", "teacher", "model", "actor", "critic", "explore"),
)
FOREIGN_KEYS = {
    **dict.fromkeys(_OTHERS, "dreamer.py"),
    **{"sac": "sac.py", "groups": "grpo.py", "language": "grpo.py"},
}
# What judging a run takes from the command line; all else is the run's own.
JUDGING_KEYS = ("cache", "logs", "scenario_filter", "split", "planner.valid_rows", "logdir")
MACHINE_KEYS = ("device", "threads", "deterministic")


class Imitator:
    """A network that plans as experts have driven."""

    tasks: ClassVar[tuple[type, ...]] = (PlanningTask,)

    def __init__(
        self,
        task: PlanningTask,
        settings: ImitationSettings,
        *,
        device: torch.device,
        generators: dict[str, torch.Generator],
        guard: Guard,
    ) -> None:
        """Build the network on `device`.

        Args:
            task: what is to be planned.
            settings: the sections that it reads.
            device: where to learn and plan.
            generators: one per role; none is drawn from here, as batches are known by their numbers.
            guard: told of everything that is not finite.
        """
        self.device, self.guard = device, guard
        self.batch_size, self.scales = settings.batch_size, asdict(settings.scales)
        assert set(self.scales) == set(LOSSES)
        with device:
            self.network = make_network(task, settings)
        self.players: Mapping[str, Any] = {POLICY: self}
        self.learner = Learner(
            partial(self._make_optimizers, settings),
            modules={"planner": self.network},
            watched={"planner": self.network},
            follow=lambda applied: None,
            generators=generators,
            guard=guard,
        )

    @classmethod
    def of(
        cls,
        task: PlanningTask,
        config: Config,
        *,
        device: torch.device,
        generators: dict[str, torch.Generator],
        guard: Guard,
    ) -> Imitator:
        """The agent that a whole config describes."""
        return cls(task, ImitationSettings.of(config), device=device, generators=generators, guard=guard)

    def _make_optimizers(self, settings: ImitationSettings) -> dict[str, Optimizer]:
        return {
            "planner": Optimizer(
                "planner",
                {"planner": self.network},
                guard=self.guard,
                lr=settings.lr,
                clip=settings.grad_clip,
                weight_decay=settings.weight_decay,
                **asdict(settings.schedule),
                **asdict(settings.optimizer),
            )
        }

    def imitate(self, draws: Draws, *, progress: float) -> dict[str, Tensor]:
        """One update, on the next batch.

        Args:
            draws: gives batches by their numbers.
            progress: the share of the run that is over, for schedules.
        """
        samples = draws.batch(self.learner.updates, self.batch_size)
        return self.learn(as_features(samples, self.device), as_driven(samples, self.device), progress=progress)

    def learn(self, features: Mapping[str, Tensor], driven: Driven, *, progress: float) -> dict[str, Tensor]:
        """One update on some rows.

        Args:
            features: of the rows, by name.
            driven: what experts did there.
            progress: the share of the run that is over, for schedules.
        """
        self.guard.update = self.learner.updates
        batch = {**features, **driven._asdict()}
        self.guard.watch_all("replayed", batch)

        def compute() -> Computed:
            losses, metrics = imitation_losses(self.network(features), driven)
            total = torch.stack([scale * losses[name] for name, scale in self.scales.items()]).sum()
            return Computed([(total, ("planner",))], {**metrics, "planner_loss": total.detach()})

        metrics, _ = self.learner.update(compute, batch=batch, progress=progress)
        return metrics

    @torch.no_grad()
    def plan(self, features: Mapping[str, Tensor]) -> Plans:
        """Plans for B rows, of their features by name."""
        return self.network(features)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and counters; of the last good state where this one is not finite."""
        self.learner.mend()
        return {"planner": self.network.state_dict(), **self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.network.load_state_dict(state["planner"])
        self.learner.load_state_dict(state)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take the network from `state_dict`."""
        self.network.load_state_dict(state["planner"])
        self.learner.keep()


def load(run: str | Path, *, device: str = "cpu", caution: float = 0.0) -> TrainedPlanner:
    """A trained planner for programs of one's own: `trajectory = planner(obs)`, of an observation of `Drive-v0`.

    Args:
        run: the run's folder, or one of its checkpoint files.
        device: where to plan.
        caution: seconds for which a trajectory must touch nobody, if all others drive on as now; where each would, it
            brakes. 0: nobody looks.

    Raises:
        UserError, CheckpointError: there is no run that can be loaded.
    """
    where = choose_device(device)
    made = load_run(
        Path(run),
        make_agent=Imitator,
        make_setup=imitation.setup.make_setup,
        device=where,
        defaults=load_defaults(CONFIGS),
    )
    return TrainedPlanner(made.agent.players[POLICY].plan, device=where, caution=caution)


def make_network(task: PlanningTask, settings: ImitationSettings) -> PlanningNetwork:
    """The network of some sizes."""
    sizes = settings.network
    shared = {"width": sizes.width, "layers": sizes.layers, "heads": sizes.heads, "hidden": sizes.hidden}
    return PlanningNetwork(
        scene=SceneEncoder(point_layers=sizes.point_layers, **shared),
        decoder=PlanningDecoder(modes=task.modes, points=task.points, **shared),
    )


def judge(command: CommandLine, mode: str) -> None:
    """Print how near a run's plans are to what was driven in logs that validate, or that test.

    Raises:
        UserError, CheckpointError: there is no run that can be judged.
    """
    config = command.config
    logdir = Path(str(config.logdir or default_logdir("planner.py", command)))
    device, given = prepare_torch(config), config.flat()
    changes = {key: given[key] for key in command.overrides if is_among(key, JUDGING_KEYS)}
    run = load_run(
        logdir,
        make_agent=Imitator,
        make_setup=imitation.setup.make_setup,
        device=device,
        defaults=command.defaults,
        changes=changes,
        given=config,
    )
    own, obeyed = run.config.flat(), (*JUDGING_KEYS, *MACHINE_KEYS)
    if ignored := [f"--{key}" for key in command.overrides if not is_among(key, obeyed) and given[key] != own[key]]:
        tell(f"the run has a config of its own: {' '.join(ignored)} changes nothing")
    evaluator = run.setup.make_evaluator(None)
    report = evaluator.test(run.agent) if mode == "test" else evaluator.validate(run.agent)
    assert report is not None
    show(f"{logdir} at update {run.step:,}: {report.summary}")


def is_among(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a key is one of these, or in a section that is."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def main(argv: list[str]) -> None:
    """Read the command line; fill the cache, train, or judge a run."""
    with one_line_errors("planner.py", *launch.USER_ERRORS):
        command = parse_command_line(
            argv,
            config_path=CONFIGS,
            description=DESCRIPTION,
            entry_keys=ENTRY_KEYS,
            base=[SECTION],
            foreign_keys=FOREIGN_KEYS,
        )
        mode = command.entry["mode"] or "train"
        if mode not in MODES:
            raise ConfigError(f"--mode is {mode!r}; choose one of {', '.join(MODES)}")
        if mode == "train":
            launch.train(
                command,
                argv=["planner.py", *argv],
                make_agent=Imitator,
                make_setup=imitation.setup.make_setup,
            )
            return
        if given := [f"--{key}" for key in ("resume", "init") if command.entry[key]]:
            raise ConfigError(f"{' '.join(given)} goes with --mode train")
        if mode == "cache":
            for line in imitation.setup.fill(command.config, imitation.setup.EVERYTHING).report.lines():
                show(line)
        else:
            judge(command, mode)


if __name__ == "__main__":
    main(sys.argv[1:])
