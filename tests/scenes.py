"""What several test files share: tasks, what replay gives of them, a world model with a behaviour, and whole runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import checkpoint
import config
import dreamer
from config import Config
from envs.examples import SwitchesRules, SwitchesState
from envs.routing import TSPInstance, TSPRules, TSPState, tour_length
from envs.tasks import ActionSpec, ObservationKey, ObservationTask, RoutingTask, Task
from envs.vector import RoutingVectorEnv
from guard import Guard
from imagining.behavior import ImagBehavior
from imagining.imagination import Imagination, Noise, Start, Trajectory, imagine
from imagining.observation_imagination import ObservationImagination
from imagining.observation_model import ObservationModel
from imagining.routing_imagination import RoutingImagination
from imagining.routing_model import RoutingModel
from imagining.world_model import Observed, WorldModel
from models import make_behavior, make_imagination, make_optimizers
from networks import TSPPointerActor
from parts.moves import MoveHead
from routing.cost_world import Costs
from routing.costs import find_costs
from routing.places import PlaceCosts
from routing.rules import Rules
from settings.dreamer import DreamerSettings, ModelSettings
from settings.imagination import ImaginationSettings
from tools import Bounds, uniform
from training.replay import Replay
from updates.optimizer import update_together

CPU = torch.device("cpu")
CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")
NODES = 6
SWITCHES = 4
# The reward of each action of the scripted task, in the row after it.
WORTH = torch.tensor([-1.0, 0.5, 2.0])
# Rows of a scripted episode, its final observation included.
EPISODE_ROWS = 5
# The smallest and the largest reward in replay.
RANGE = Bounds(torch.tensor(-0.9), torch.tensor(-0.1))


def vector(size: int) -> ObservationKey:
    return ObservationKey("vector", (size,), torch.float32)


ROUTING = RoutingTask.of(TSPRules, NODES)
SCRIPTED = ObservationTask(
    actions=ActionSpec("discrete", (len(WORTH),)),
    observations={"clock": vector(1), "ending": vector(2)},
)
SWITCHING = ObservationTask(
    actions=ActionSpec("discrete", (SWITCHES,), masked=True),
    observations={"values": vector(SWITCHES), "pressed": vector(SWITCHES)},
    mask_rules=SwitchesRules(),
)

# Settings of a routing scene with lambda-returns from every replayed row.
CRITIC: dict[str, Any] = {"baseline": "critic", "imag_start": "replay", "imag_first": "stored"}


def debug_config(*sections: str, **changes: Any) -> Config:
    """The section `debug` above others; a double underscore reaches into a section, as a dot does."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return config.load(CONFIG_PATH, [*sections, "debug"], {}).replace(**dotted)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_zero_outputs(module: nn.Module) -> None:
    """Undo outputs that start at zero, behind which no gradient passes before the first update."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def assert_gradient_reaches(named_parameters: Iterable[tuple[str, nn.Parameter]], loss: Tensor) -> None:
    """Every parameter gets a finite gradient that is more than rounding noise."""
    parameters = dict(named_parameters)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient is not None, f"{name} is no part of the loss"
        assert gradient.isfinite().all(), f"{name} has a gradient that is not finite"
        assert gradient.abs().max() > 1e-5, f"{name} has no gradient"


# What replay gives


def place_costs(*, tables: int = 1) -> PlaceCosts:
    """A world of 15 places whose costs are drawn at random; with several tables it hides a factor."""
    draws = generator(7)
    coords = torch.rand(15, 2, generator=draws)
    costs = torch.rand(tables, 15, 15, generator=draws) * (1 - torch.eye(15))
    return PlaceCosts("places", coords=coords, tables=costs, hidden=int(tables > 1))


def routing(cost: str | Costs, *, shown: str = "paid") -> RoutingTask:
    """`ROUTING` in another cost world."""
    costs = find_costs(cost, shown=shown) if isinstance(cost, str) else cost
    return replace(ROUTING, rules=TSPRules.under(costs))


def episodes(count: int, coords: Tensor | None = None, *, rules: type[Rules] = TSPRules) -> dict[str, Tensor]:
    """Whole random tours, laid out as replay gives them."""
    draws = generator(5)
    coords = torch.rand(count, NODES, 2, generator=draws) if coords is None else coords.expand(count, -1, -1)
    factors = rules.costs.draw(count, generator=draws, device=CPU)
    env = RoutingVectorEnv(rules, num_envs=count, num_nodes=NODES, device=CPU, instances=coords, factors=factors)
    obs, _ = env.reset()
    reward, ended = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    prev_action, rows = torch.zeros(count, dtype=torch.int64), []
    for step in range(NODES + 1):
        action = torch.multinomial(obs["action_mask"].float(), 1, generator=draws)[:, 0]
        flags = {"is_first": torch.full_like(ended, step == 0), "is_last": ended, "is_terminal": ended}
        rows.append({**obs, **flags, "action": action, "prev_action": prev_action, "reward": reward})
        if step < NODES:
            obs, reward, ended, _, _ = env.step(action)
            prev_action = action
    return {key: torch.stack([row[key] for row in rows], 1) for key in rows[0]}


def switches_episodes(count: int) -> dict[str, Tensor]:
    """Whole episodes that press all switches in random orders, laid out as replay gives them."""
    order = torch.rand(count, SWITCHES, generator=generator(5)).argsort(-1)
    begin = torch.zeros(count, 1, SWITCHES, dtype=torch.bool)
    pressed = torch.cat((begin, torch.eye(SWITCHES, dtype=torch.bool)[order].cumsum(1).bool()), 1)
    nothing = torch.zeros(count, 1, dtype=torch.int64)
    step = torch.arange(SWITCHES + 1).expand(count, -1)
    return {
        "values": torch.randn(count, 1, SWITCHES).expand(-1, SWITCHES + 1, -1),
        "pressed": pressed.float(),
        "action_mask": SwitchesRules().action_mask(SwitchesState(pressed)),
        "action": torch.cat((order, nothing), 1),
        "prev_action": torch.cat((nothing, order), 1),
        "reward": torch.randn(count, SWITCHES + 1),
        "is_first": step == 0,
        "is_last": step == SWITCHES,
        "is_terminal": step == SWITCHES,
    }


def random_rows(task: ObservationTask, *, count: int = 4, rows: int = 7) -> dict[str, Tensor]:
    """Noise in the shape of sequences of a task that sees vectors; no episode begins or ends in them."""
    shape, flags = (count, rows), torch.zeros(count, rows, dtype=torch.bool)

    def actions() -> Tensor:
        if task.actions.kind == "continuous":
            return torch.randn(*shape, *task.actions.shape)
        choices = torch.stack([torch.randint(size, shape) for size in task.actions.sizes], -1)
        return choices if task.actions.kind == "multi_discrete" else choices[..., 0]

    return {
        **{name: torch.randn(*shape, *key.shape) for name, key in task.observations.items()},
        "action": actions(),
        "prev_action": actions(),
        "reward": torch.randn(shape),
        **dict.fromkeys(("is_first", "is_last", "is_terminal"), flags),
    }


def scripted_replay() -> Replay:
    """Random actions in a task whose reward names the action that caused it; the observation tells nothing of it.

    Episodes end alternately by termination and by truncation, and the last observation says by which.
    """
    num_envs, draws = 8, generator()
    replay = Replay(SCRIPTED.spaces, num_envs=num_envs, capacity=num_envs * 200, device=CPU)
    action = torch.zeros(num_envs, dtype=torch.int64)
    for column in range(200):
        episode, row = divmod(column, EPISODE_ROWS)
        is_first, is_last = row == 0, row == EPISODE_ROWS - 1
        is_terminal = is_last and episode % 2 == 0
        ending = [float(is_terminal), float(is_last and not is_terminal)]
        reward = torch.zeros(num_envs) if is_first else WORTH[action]
        action = torch.randint(len(WORTH), (num_envs,), generator=draws)
        replay.add(
            {
                "clock": torch.full((num_envs, 1), row / EPISODE_ROWS),
                "ending": torch.tensor([ending]).repeat(num_envs, 1),
                "action": action,
                "reward": reward,
                "is_first": torch.full((num_envs,), is_first),
                "is_last": torch.full((num_envs,), is_last),
                "is_terminal": torch.full((num_envs,), is_terminal),
            }
        )
    return replay


def routing_replay(
    *, reward_is_target: bool = False, num_envs: int = 8, columns: int = 84, rules: type[Rules] = TSPRules
) -> Replay:
    """Random legal tours; with `reward_is_target` a move earns the x coordinate of the node that it goes to."""
    draws = generator()
    env = RoutingVectorEnv(rules, num_envs=num_envs, num_nodes=NODES, device=CPU, generator=draws)
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
    replay = Replay({**spaces, "action": ((), torch.int64)}, num_envs=num_envs, capacity=num_envs * columns, device=CPU)
    reward, ended = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool)
    for _ in range(columns):
        action = torch.multinomial(obs["action_mask"].float(), 1, generator=draws)[:, 0]
        flags = {"is_first": info["is_first"], "is_last": ended, "is_terminal": ended}
        replay.add({**obs, **flags, "action": action, "reward": reward})
        earned = obs["coords"][torch.arange(num_envs), action, 0] * ~ended
        obs, reward, ended, _, info = env.step(action)
        if reward_is_target:
            reward = earned
    return replay


# A world model and a behaviour


def imagination_in(model: WorldModel, settings: Config) -> Imagination:
    """The way to imagine in a world model that is there already."""
    choices = ImaginationSettings.of(settings)
    if isinstance(model, RoutingModel):
        return RoutingImagination(model, choices)
    assert isinstance(model, ObservationModel)
    return ObservationImagination(model, choices)


class Scene:
    """A world model and a behaviour in it, made from the section `debug` with some keys changed."""

    def __init__(self, task: Task = ROUTING, **changes: Any) -> None:
        torch.manual_seed(0)
        settings = debug_config(*([] if isinstance(task, RoutingTask) else ["gym"]), **changes)
        sections = DreamerSettings.of(settings)
        self.imagination = make_imagination(task, sections.imagination, model=sections.model)
        self.guard = Guard("cpu")
        self.behavior: ImagBehavior = make_behavior(task, self.imagination, settings=sections)
        groups = {"model": self.model, "actor": self.behavior.actor, "critic": self.behavior.critic}
        self.optimizers = make_optimizers(groups, settings=sections, guard=self.guard)

    @property
    def model(self) -> Any:
        """The world model; of either kind, as a test knows which one it asked for."""
        return self.imagination.model

    def start(self, batch: dict[str, Tensor], seed: int = 0) -> Start:
        return self.start_by(batch, generator(seed))

    def start_by(self, batch: dict[str, Tensor], draws: torch.Generator) -> Start:
        return self.imagination.start(
            batch, self._seen(batch, draws), needs_latent=self.behavior.needs_latent, generator=draws
        )

    def _seen(self, batch: dict[str, Tensor], draws: torch.Generator) -> Observed | None:
        """What imagination starts from, as an agent has it in updates that do not train the world model."""
        if not self.behavior.starts_from_latents:
            return None
        with torch.no_grad():
            return self.model.observe(batch, uniform((*batch["reward"].shape, self.model.rssm.stoch_size), draws))

    def imagine(
        self, start: Start, *, horizon: int | None = None, seed: int = 1, differentiable: bool = False
    ) -> Trajectory:
        draws, shape = generator(seed), start.weight.shape
        horizon = self.imagination.horizon_from(start) if horizon is None else horizon
        noise = Noise(
            latent=torch.rand(horizon, *shape, self.model.rssm.stoch_size, generator=draws),
            action=torch.rand(horizon, *shape, *self.model.task.actions.shape, generator=draws),
        )
        return imagine(
            self.imagination,
            self.behavior.actor,
            start=start,
            tables=self.behavior.actor.tables(self.imagination.node_set(start.context)),
            noise=noise,
            horizon=horizon,
            differentiable=differentiable,
        )

    def imagine_from(self, batch: dict[str, Tensor], **choices: Any) -> tuple[Start, Trajectory]:
        start = self.start(batch)
        return start, self.imagine(start, **choices)

    def observe(self, batch: dict[str, Tensor], seed: int = 2) -> Observed:
        noise = uniform((*batch["reward"].shape, self.model.rssm.stoch_size), generator(seed))
        return self.model.observe(batch, noise)

    def bounds(self, trajectory: Trajectory, start: Start, rewards: Bounds = RANGE) -> Bounds | None:
        """The range that targets are clipped to."""
        possible = self.imagination.possible_returns(trajectory, start, rewards)
        return self.behavior.returns.bounds(possible, device=CPU)

    def losses(
        self, batch: dict[str, Tensor], observed: Observed | None = None, *, seed: int = 0, progress: float = 0.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of actor and critic; with `observed`, also of the critic on replayed rewards."""
        draws = generator(seed)
        seen = self._seen(batch, draws) if observed is None else observed
        return self.behavior.losses(
            batch, seen, progress=progress, rewards=RANGE, generator=draws, replayed=observed is not None
        )

    def update(self, batch: dict[str, Tensor], seed: int = 0, *, progress: float = 0.0) -> dict[str, Tensor]:
        """One update of actor and critic alone."""
        behavior = self.behavior
        losses, metrics = self.losses(batch, seed=seed, progress=progress)
        pairs = [(losses["actor"], [self.optimizers["actor"]]), (losses["critic"], [self.optimizers["critic"]])]
        applied, update_metrics = update_together(pairs, progress=progress)
        behavior.follow(applied)
        return metrics | update_metrics


def pointer_of(scene: Scene) -> TSPPointerActor:
    assert isinstance(scene.behavior.actor, TSPPointerActor)
    return scene.behavior.actor


def costly_legs(scene: Scene) -> Scene:
    """Let a move cost its length by the head, which starts at zero."""
    return with_head(scene, times_length=-1.0)


def with_head(scene: Scene, *, times_length: float = 0.0, constant: float = 0.0) -> Scene:
    """Let the head's answer be one number times the length, plus another."""
    head = scene.model.heads["reward"]
    assert isinstance(head, MoveHead)
    nn.init.zeros_(head.output.weight)
    with torch.no_grad():
        head.output.bias.copy_(torch.tensor([times_length, constant]))
    return scene


def constant_critic(scene: Scene) -> float:
    """Make the critic answer one of its bins, whatever it is asked."""
    critic = scene.behavior.critic
    nn.init.zeros_(critic.mlp.output.weight)
    nn.init.constant_(critic.mlp.output.bias, -1e4)
    with torch.no_grad():
        critic.mlp.output.bias[17] = 0.0
    return float(critic.bins[17])


def state_of(trajectory: Trajectory) -> TSPState:
    assert trajectory.moments.state is not None
    return trajectory.moments.state


def instance_of(start: Start) -> TSPInstance:
    assert start.context is not None
    return start.context.instance


def tours_of(trajectory: Trajectory) -> Tensor:
    """Nodes in visiting order, [B, Q, N], beginning with the first one."""
    return torch.cat((state_of(trajectory).first[:, :, :1], trajectory.action[:, :, :-1]), -1)


def lengths(coords: Tensor, tours: Tensor) -> Tensor:
    each = coords[:, None].expand(*tours.shape, 2).flatten(0, 1)
    return tour_length(each, tours.flatten(0, 1)).view(tours.shape[:2])


# Whole runs


# Clocks, and what of saving a run that goes on has no longer at hand.
TIMES = ("seconds", "fps", "checkpoint_seconds", "checkpoint_megabytes")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what no two runs share."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def saved_memory(logdir: Path) -> dict[str, Tensor]:
    """What replay kept beside the rows at a run's last checkpoint, [E, L, ...] from the oldest column on."""
    state = checkpoint.load(logdir / checkpoint.LATEST, CPU)
    parts = [checkpoint.load(logdir / "replay" / each["name"], CPU) for each in state["replay"]["memory_chunks"]]
    return {name: torch.cat([part[name] for part in parts], 1) for name in (parts[0] if parts else {})}


def stored_rows(
    logdir: Path, spaces: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, num_envs: int = 4
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A run's last checkpoint, and the rows that its replay held there."""
    state = checkpoint.load(logdir / checkpoint.LATEST, CPU)
    memory = {name: (tuple(value.shape[2:]), value.dtype) for name, value in saved_memory(logdir).items()}
    replay = Replay(spaces, num_envs=num_envs, capacity=1000, device=CPU, memory=memory)
    replay.load_chunks(logdir / "replay", state["replay"])
    assert replay.total < replay.length
    return state, {key: value[:, : replay.total] for key, value in {**replay.rows, **replay.memory}.items()}


def decisions_in(state: dict[str, Any], rows: dict[str, Tensor]) -> int:
    """Every decision has led to a row that is not the first of its episode, stored or still to be."""
    return int((~rows["is_first"]).sum()) + int((~state["row"]["is_first"]).sum())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a user's mistake is answered with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dreamer.main(list(arguments))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dreamer.py: ")
    return line


def make_world_model(task: Task, *, discount: float = 1.0, **changes: Any) -> Any:
    """A world model of the kind that the task needs, from the section `debug` with some keys changed."""
    settings = ModelSettings.of(debug_config(**{f"model.{key}": value for key, value in changes.items()}))
    if isinstance(task, ObservationTask):
        return ObservationModel(task, settings, discount=discount)
    assert isinstance(task, RoutingTask)
    return RoutingModel(task, settings)


def random_states(generators: dict[str, torch.Generator]) -> list[Any]:
    return [
        *(generator.get_state().tolist() for generator in generators.values()),
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
    ]
