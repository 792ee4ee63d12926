"""How good plans are that were learnt from a log alone, by the true costs of the world that the log is from.

    python -m benchmarks.trip_plans logdir/trips --cost lanes
    python -m benchmarks.trip_plans logdir/trips --cost streets --streets helsinki --maps test --plan.pessimism 2

The run knows its log and no world; `--cost` says to this program alone which one it was. On maps that nobody has
driven, in percent: how much more plans cost than the best tours, how much more drivers pay who always go to the open
node that is cheapest to reach, and by how much plans beat them; and the spread of the ensemble, as a share of what
moves are expected to cost, on moves that such drivers make and on all others.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.flags import CONFIGS, number
from benchmarks.log_worlds import as_seen, draw_maps, known_log, named_world
from benchmarks.trips import nearest_tours
from config import ConfigError, one_line_errors, parse_command_line
from dreamer import Dreamer
from imagining.routing_model import RoutingModel
from planning.planner import Planner
from routing.instances import TEST_SEED, VALIDATION_SEED, reference_costs, tour_costs
from routing.rules import Instance
from settings.dreamer import ModelSettings
from settings.planning import PlanSettings
from system.terminal import show
from training import devices, launch, loading
from training.tours import percent_above

ENTRY_KEYS = {
    "instances": "maps to plan on (default 200)",
    "maps": "valid or test: which of the field's maps (default valid)",
}
SEEDS = {"valid": VALIDATION_SEED, "test": TEST_SEED}


class Judged(NamedTuple):
    """Of a run, all in percent: `plan` and `drivers` above the best tours, `saved` of what drivers pay, and spreads."""

    plan: float
    drivers: float
    saved: float
    seen: float
    unseen: float


def judge(
    planner: Planner, instance: Instance, matrix: Float64[np.ndarray, "I N N"], best: Float64[np.ndarray, " I"]
) -> Judged:
    """How plans do by true costs.

    Args:
        planner: of the run.
        instance: maps as its model sees them.
        matrix: what moves truly cost there.
        best: what the best tours cost.
    """
    plans = planner.plan(instance, planner.rules.reset(instance))
    # A plan ends at home, where the tour began.
    tours = np.stack([np.roll(plan, 1) for plan in plans])
    driven = nearest_tours(matrix)
    paid, drivers = tour_costs(matrix, tours).mean(), tour_costs(matrix, driven).mean()
    spread = _spread(planner.imagination.model, instance)
    seen = torch.zeros(spread.shape, dtype=torch.bool, device=spread.device)
    begin = torch.from_numpy(driven)
    seen[torch.arange(len(begin), device=begin.device)[:, None], begin, begin.roll(-1, 1)] = True
    others = ~seen & ~torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    return Judged(
        percent_above(float(paid), float(best.mean())),
        percent_above(float(drivers), float(best.mean())),
        100 * float(1 - paid / drivers),
        100 * float(spread[seen].mean()),
        100 * float(spread[others].mean()),
    )


def _spread(model: RoutingModel, instance: Instance) -> Tensor:
    """The ensemble's deviation of each move, for moves that cost 1 on average."""
    each = model.predict_moves_each(instance, None)
    return each.std(0, correction=0) / each.mean().abs()


def main(argv: list[str]) -> None:
    """Print a row for each run."""
    runs = _until_flags(argv)
    with one_line_errors(Path(__file__).stem, *launch.USER_ERRORS):
        command = parse_command_line(
            argv[len(runs) :], config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS
        )
        config, maps = command.config, str(command.entry["maps"] or "valid")
        if maps not in SEEDS:
            raise ConfigError(f"--maps is {maps!r}; choose {' or '.join(SEEDS)}")
        if not runs:
            raise ConfigError("no run is given; begin with the folders of runs that have learnt from trips")
        count = int(number(command.entry["instances"] or "200", "instances", least=1))
        if "cost" not in command.overrides:
            raise ConfigError("--cost is not given; say which world the log is of, whose true costs judge the plans")
        if config.task != "tsp":
            raise ConfigError("plans of a log are judged as tours (task: tsp)")
        world = named_world(config.cost, streets=config.streets)
        drawn, matrix = draw_maps(world, count, config.nodes, seed=SEEDS[maps])
        best = reference_costs(matrix)
        device = devices.prepare_torch(config)
        show("| run | plan, % above best | drivers | saved, % | spread on their moves, % | on others |")
        show("|---|---|---|---|---|---|")
        for run in runs:
            loaded = loading.load_run(Path(run), make_agent=Dreamer, device=device, defaults=command.defaults)
            agent, frame = known_log(loaded, Path(run))
            seen = as_seen(drawn, world, frame, Path(run))
            planner = agent.players["plan"]
            assert isinstance(planner, Planner)
            planner.settings = PlanSettings.of(config)
            planner.settings.require_spread(ModelSettings.of(loaded.config).move_heads)
            figures = judge(planner, seen, matrix, best)
            show(f"| {run} | {' | '.join(f'{round(figure, 2) + 0.0:.2f}' for figure in figures)} |")


def _until_flags(argv: list[str]) -> list[str]:
    """The arguments before the first flag."""
    ends = [index for index, argument in enumerate(argv) if argument.startswith("--")]
    return argv[: ends[0]] if ends else argv


if __name__ == "__main__":
    main(sys.argv[1:])
