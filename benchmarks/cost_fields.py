"""Pictures of what a run has learnt of its costs, beside the true ones.

    python -m benchmarks.cost_fields logdir/tsp_lanes-seed0 --out pictures

Where costs are fixed: what a short move costs per distance, by where it begins, in four directions (`field.png`); in
streets, seconds from the place in their middle to every other (`seconds.png`). Where episodes hide something: cost per
distance by direction, true and as believed after so many moves of a test episode (`belief.png`), and the tours that
the agent would take by its belief before and after that episode (`tours.png`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

import config
from benchmarks.flags import CONFIGS
from config import UserError, one_line_errors
from dreamer import Dreamer
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from imagining.routing_imagination import RoutingImagination
from imagining.routing_model import RoutingModel
from parts.acting import Sight
from routing.costs import GeometricCosts
from routing.drawing import ATTRIBUTION, STREET_COLOR, draw_tour_pair
from routing.instances import TEST_SEED, field_test_coords
from routing.rules import Instance
from routing.street_costs import StreetCosts
from system.terminal import Parser
from training import launch, loading

GRID, STEP = 40, 0.1
DIRECTIONS = {"right": 0.0, "up": 0.5, "left": 1.0, "down": 1.5}
# Moves of an episode after which its belief is shown.
MOVES = (0, 1, 2, 4, 8)


def short_moves(origin: Float[Tensor, "*B 2"], half_turns: Float[Tensor, "*B"]) -> Float[Tensor, "*B 2"]:
    """Where moves of length `STEP` end."""
    angle = torch.pi * half_turns
    return origin + STEP * torch.stack((torch.cos(angle), torch.sin(angle)), -1)


def routing_model(agent: Dreamer) -> RoutingModel:
    """The agent's world model, which is one of routing."""
    assert isinstance(agent.model, RoutingModel)
    return agent.model


def fields(agent: Dreamer, costs: GeometricCosts) -> Float[Tensor, "2 D X Y"]:
    """Cost per distance of short moves, true and learnt, by direction and origin."""
    axis = torch.linspace(0, 1, GRID, device=agent.device)
    origin = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).expand(len(DIRECTIONS), -1, -1, -1)
    turns = torch.tensor([*DIRECTIONS.values()], device=agent.device)[:, None, None].expand(origin.shape[:-1])
    target = short_moves(origin, turns)
    learnt = -routing_model(agent).predict_move(origin, target, None) / agent.reward_scale
    return torch.stack((costs.at(origin, target), learnt)) / STEP


def draw_fields(values: Float[np.ndarray, "2 D X Y"], path: Path) -> None:
    """True ones above, learnt ones below, in one scale of colours."""
    figure = Figure(figsize=(3 * values.shape[1], 6), layout="constrained")
    low, high = float(values[0].min()), float(values[0].max())
    for row, kind in enumerate(("true", "learnt")):
        for column, direction in enumerate(DIRECTIONS):
            axes = figure.add_subplot(2, values.shape[1], row * values.shape[1] + column + 1)
            image = axes.imshow(values[row, column].T, origin="lower", extent=(0, 1, 0, 1), vmin=low, vmax=high)
            axes.set_title(f"{kind}, {direction}")
    figure.colorbar(image, ax=figure.axes, label="cost per distance")
    figure.savefig(path, dpi=100)


@torch.no_grad()
def seconds_from_the_middle(agent: Dreamer, costs: StreetCosts) -> Float[Tensor, "2 P"]:
    """Driving seconds, true and learnt, from the place nearest to the middle of all places to each of them."""
    coords = costs.coords.to(agent.device)
    middle = (coords - coords.mean(0)).norm(dim=-1).argmin()
    everywhere = torch.arange(len(coords), device=agent.device)
    ends = torch.stack((middle.expand(len(coords)), everywhere), -1)
    learnt = -routing_model(agent).predict_move(coords[middle].expand_as(coords), coords, None, ends)
    learnt = learnt.masked_fill(everywhere == middle, 0.0) / agent.reward_scale
    return costs.unit * torch.stack((costs.tables[0].to(agent.device)[middle], learnt))


def draw_seconds(seconds: Float[np.ndarray, "2 P"], costs: StreetCosts, path: Path) -> None:
    """True ones, learnt ones, and what the learnt ones are off by, each at its place on the streets."""
    points, _ = costs.network.unit_square()
    arcs = points[np.stack((costs.network.tails, costs.network.heads))]
    places = costs.coords.numpy()
    true, learnt = seconds
    largest = float(np.abs(learnt - true).max())
    shown: tuple[tuple[str, np.ndarray, dict[str, Any]], ...] = (
        ("true", true, {"vmin": 0.0, "vmax": float(true.max())}),
        ("learnt", learnt, {"vmin": 0.0, "vmax": float(true.max())}),
        ("learnt less true", learnt - true, {"vmin": -largest, "vmax": largest, "cmap": "coolwarm"}),
    )
    figure = Figure(figsize=(11, 6), layout="constrained")
    for column, (title, values, colors) in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), column)
        axes.plot(*arcs.transpose(2, 0, 1), color=STREET_COLOR, linewidth=0.8, zorder=0)
        image = axes.scatter(places[:, 0], places[:, 1], c=values, s=10, zorder=1, **colors)
        axes.set_title(title)
        axes.set_aspect("equal")
        axes.set_axis_off()
        figure.colorbar(image, ax=axes, orientation="horizontal", label="seconds")
    axes.text(0.99, 0.01, ATTRIBUTION, transform=axes.transAxes, ha="right", fontsize=6)
    figure.savefig(path, dpi=100)


@torch.no_grad()
def beliefs(agent: Dreamer, instance: Instance, factors: Float[Tensor, "1 F"]) -> list[Tensor]:
    """What the agent believed before each decision of its greedy episode, [1, F] each."""
    assert isinstance(agent.task, RoutingTask)
    rules = agent.task.rules
    num_nodes = instance.coords.shape[1]
    env = RoutingVectorEnv(
        rules, num_envs=1, num_nodes=num_nodes, device=agent.device, instances=instance, factors=factors
    )
    obs, info = env.reset()
    state, believed = agent.initial_state(1), []
    for _ in range(rules.episode_steps(num_nodes)):
        action, state = agent.act(Sight.of(obs, info), state, generator=None)
        believed.append(state["belief"])
        obs, _, _, _, info = env.step(action)
    return believed


@torch.no_grad()
def draw_belief(
    agent: Dreamer,
    costs: GeometricCosts,
    believed: list[Tensor],
    factors: Float[Tensor, "1 F"],
    path: Path,
) -> None:
    """Cost per distance by direction from the middle of the square."""
    turns = torch.linspace(0, 2, 181, device=agent.device)
    origin = torch.full((len(turns), 2), 0.5, device=agent.device)
    target = short_moves(origin, turns)
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    angle = torch.pi * turns.cpu().numpy()
    axes.plot(angle, costs.at(origin, target, factors.expand(len(turns), -1)).cpu() / STEP, "k--", label="true")
    for moves in MOVES:
        if moves < len(believed):
            learnt = -routing_model(agent).predict_move(origin, target, believed[moves]) / (STEP * agent.reward_scale)
            axes.plot(angle, learnt.cpu(), label=f"after {moves} move{'' if moves == 1 else 's'}")
    axes.set_title("cost per distance")
    axes.legend(loc="lower left", bbox_to_anchor=(0.9, 0.9))
    figure.savefig(path, dpi=100)


@torch.no_grad()
def planned_tour(agent: Dreamer, instance: Instance, belief: Float[Tensor, "1 F"]) -> Tensor:
    """The tour that the agent would take of the whole instance if it believed this throughout, [N]."""
    assert isinstance(agent.imagination, RoutingImagination)
    greedy = agent.imagination.imagine_greedily(
        agent.behavior.actor, instance, needs_latent=agent.behavior.needs_latent, belief=belief
    )
    return greedy.tours[0]


def draw(agent: Dreamer, out: Path) -> list[Path]:
    """All pictures that fit the agent's cost world.

    Raises:
        UserError: there is nothing to be drawn of this run.
    """
    if not isinstance(agent.task, RoutingTask):
        raise UserError("this run is no routing: there are no costs of moves to be drawn")
    costs = agent.task.rules.costs
    if isinstance(costs, StreetCosts) and not costs.hidden:
        out.mkdir(parents=True, exist_ok=True)
        draw_seconds(seconds_from_the_middle(agent, costs).cpu().numpy(), costs, out / "seconds.png")
        return [out / "seconds.png"]
    if not isinstance(costs, GeometricCosts):
        raise UserError(f"costs of {costs.name} depend on a hidden hour: there is no one field to be drawn")
    if costs.drift:
        raise UserError(f"costs of {costs.name} change within an episode: there is no one field to be drawn")
    out.mkdir(parents=True, exist_ok=True)
    if not costs.hidden:
        if agent.model.reward_latent:
            raise UserError("this run's costs depend on the latent (model.reward_latent: true); draw one without")
        with torch.no_grad():
            draw_fields(fields(agent, costs).cpu().numpy(), out / "field.png")
        return [out / "field.png"]
    if not agent.model.belief_size:
        raise UserError("this run keeps no belief (model.belief: false), so that there is none to be drawn")
    coords = torch.from_numpy(field_test_coords(agent.task.num_actions, 1)).to(agent.device, torch.float32)
    instance = agent.task.rules.instance_type(coords=coords)
    fixed = costs.fixed_factors(1, seed=TEST_SEED)
    assert fixed is not None
    factors = fixed.to(agent.device, torch.float32)
    believed = beliefs(agent, instance, factors)
    draw_belief(agent, costs, believed, factors, out / "belief.png")
    matrix = costs.matrix(instance, factors)[0]
    tours = [planned_tour(agent, instance, belief) for belief in (believed[0], believed[-1])]
    before, after = (f"costs {float(matrix[tour, tour.roll(-1)].sum()):.3f}" for tour in tours)
    picture = draw_tour_pair(
        coords[0].cpu().numpy(),
        tours[0].cpu().numpy(),
        tours[1].cpu().numpy(),
        left_title=f"before any move: {before}",
        right_title=f"by the belief after the episode: {after}",
    )
    imsave(out / "tours.png", picture)
    return [out / "belief.png", out / "tours.png"]


def main(argv: list[str]) -> None:
    """Read the command line, load the run and draw."""
    parser = Parser("cost_fields", description=__doc__)
    parser.add_argument("run", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--out", default="pictures", help="the folder to write into (default: pictures)")
    parser.add_argument("--trust", action="store_true", help="import and call what the run's config names")
    arguments = parser.parse_args(argv)
    with one_line_errors("cost_fields", *launch.USER_ERRORS):
        defaults = config.load_defaults(CONFIGS)
        device = torch.device("cpu")
        path, trust = Path(arguments.run), arguments.trust
        run = loading.load_run(path, make_agent=Dreamer, device=device, defaults=defaults, trust=trust)
        assert isinstance(run.agent, Dreamer)
        for path in draw(run.agent, Path(arguments.out)):
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
