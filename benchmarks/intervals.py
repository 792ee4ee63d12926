"""How often the bounds hold that `solve.py` gives for what tours cost, and how wide they are.

    python -m benchmarks.intervals logdir/tsp_few_steps-tsp_lanes-tsp_plan-seed0
    python -m benchmarks.intervals logdir/tsp_trips-seed0 --cost lanes

Tours of the field's test instances are chosen before any move, by plans and, where the run trained one, by its policy.
What they truly cost, under what is hidden of each instance, lies within the bounds in nine cases of ten if these are
honest. They were found out on validation instances alone.

Of a run that knows a log of trips alone, `--cost` says to this program which world the log is of. Its bounds are those
of trips as they were driven, so that new tours of drivers are judged, too, as `benchmarks.trips` makes them: in random
order, and always to the open node that is nearest by cost. Test instances are none of the log's maps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

import config
from benchmarks.flags import CONFIGS
from benchmarks.log_worlds import Maps, as_seen, draw_maps, known_log, named_world
from benchmarks.trips import nearest_tours, random_tours
from config import ConfigError, one_line_errors
from dreamer import Dreamer
from routing.cases import field_cases
from routing.cost_world import Costs
from routing.frame import Frame
from routing.instances import MIN_REFERENCE_NODES, TEST_SEED, tour_costs
from routing.rules import each_part
from routing.tsp import TSPInstance
from solving.calibrating import chosen_tours, outcomes
from solving.command_line import TRUST_HELP, positive
from solving.intervals import Calibration, least_tours
from system.terminal import Parser, show
from training import devices, launch, loading
from training.loading import LoadedRun

# Orders in which drivers visit nodes are drawn by another seed than the maps, whose positions would shape them.
ORDER_SEED = 4323


class Coverage(NamedTuple):
    """How bounds did on test instances.

    Attributes:
        inside: share of tours whose cost lay within them.
        width: their mean width as a share of the expected cost.
        bias: what tours cost, by what the model expected, before anything was calibrated.
    """

    inside: float
    width: float
    bias: float


def coverage(agent: Dreamer, method: str, *, instances: int, nodes: int) -> Coverage:
    """Of tours of test instances that are looked for by a method of which the agent has a calibration."""
    forecaster = agent.forecaster
    assert forecaster is not None, "there is a calibration"
    cases = field_cases(forecaster.model.rules, instances, nodes, seed=TEST_SEED)
    expected, paid = outcomes(agent.behavior, forecaster, cases, method)
    return _coverage(agent.calibration[method], expected, paid)


def log_coverage(agent: Dreamer, frame: Frame, world: Costs, maps: Maps, *, seen: TSPInstance) -> dict[str, Coverage]:
    """Of tours by drivers, and of those that are chosen in each way of which the agent has a calibration.

    Args:
        agent: knows a log alone.
        frame: of the log.
        world: that it is of.
        maps: to make tours of; I of N nodes.
        seen: the same as the agent sees them.
    """
    forecaster = agent.forecaster
    assert forecaster is not None, "there is a calibration"
    instance: TSPInstance = each_part(seen, lambda part: part.to(forecaster.device))
    # A log counts costs in what the world measures, and the model in the frame's unit of that.
    costs = maps.costs * (world.unit / frame.unit)
    tours = {
        "random drivers": random_tours(*costs.shape[:2], seed=ORDER_SEED),
        "nearest drivers": nearest_tours(costs),
    }
    for method in agent.calibration:
        tours[method] = chosen_tours(agent.behavior, forecaster, instance, method)
    # All ways have the calibration of the same trips.
    calibration = next(iter(agent.calibration.values()))
    return {
        name: _coverage(calibration, forecaster.tours(instance, each), tour_costs(costs, each))
        for name, each in tours.items()
    }


def _coverage(
    calibration: Calibration, expected: Float64[np.ndarray, "K I"], paid: Float64[np.ndarray, " I"]
) -> Coverage:
    """Of tours, by what each member of the ensemble expected and what was paid."""
    forecasts = calibration.forecast(expected)
    cost, low, high = np.array([(each.cost, each.low, each.high) for each in forecasts]).T
    inside = (low <= paid) & (paid <= high)
    return Coverage(inside.mean(), ((high - low) / cost).mean(), paid.sum() / expected.mean(0).sum())


def main(argv: list[str]) -> None:
    """Read the command line and print a table."""
    parser = Parser("intervals", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="LOGDIR", help="folders of runs, or checkpoints")
    parser.add_argument("--instances", type=positive, default=1000, help="of the test set (default 1000)")
    parser.add_argument("--nodes", type=positive, help="of an instance; those of training where not given")
    parser.add_argument("--cost", help="the world that the log is of, for runs that know a log alone")
    parser.add_argument("--streets", default="", help="of that world, as dreamer.py takes them")
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    arguments = parser.parse_args(argv)
    with one_line_errors("intervals", *launch.USER_ERRORS):
        defaults = config.load_defaults(CONFIGS)
        device = devices.prepare_torch(defaults)
        if arguments.streets and arguments.cost is None:
            raise ConfigError("--streets is of a world that --cost names; give both")
        world = None if arguments.cost is None else named_world(arguments.cost, streets=arguments.streets)
        show("| run | tours by | costs within the bounds, % | mean width, % | cost beyond what was expected, % |")
        show("|---|---|---|---|---|")
        for name in arguments.runs:
            path, trust = Path(name), arguments.trust
            run = loading.load_run(path, make_agent=Dreamer, device=device, defaults=defaults, trust=trust)
            nodes = arguments.nodes or run.config.nodes
            if nodes < MIN_REFERENCE_NODES:
                raise ConfigError(f"--nodes is {nodes}; a tour takes {MIN_REFERENCE_NODES} at least")
            for method, found in judge(run, path, world, instances=arguments.instances, nodes=nodes).items():
                shares = (found.inside, found.width, found.bias - 1)
                show(f"| {name} | {method} | {' | '.join(f'{round(100 * share, 2) + 0.0:.2f}' for share in shares)} |")


def judge(run: LoadedRun, path: Path, world: Costs | None, *, instances: int, nodes: int) -> dict[str, Coverage]:
    """How a run's bounds do, by who chose the tours.

    Args:
        run: as it was loaded.
        path: of it.
        world: that its log is of; None where it knows itself what tours cost.
        instances: how many of the test set.
        nodes: of each.

    Raises:
        UserError: the run knows no bounds, or nobody can judge them.
    """
    agent = run.agent
    assert isinstance(agent, Dreamer)
    if world is not None:
        agent, frame = known_log(run, path)
    if not agent.calibration:
        raise ConfigError(
            f"{path} does not know how wrong it is about costs: that is known of a run with learnt costs, at its end,"
            f" by {least_tours()} validation instances of a known world or held-out trips of a log, or more"
        )
    if world is not None:
        maps = draw_maps(world, instances, nodes, seed=TEST_SEED)
        return log_coverage(agent, frame, world, maps, seen=as_seen(maps.drawn, world, frame, path))
    if any(each.driven for each in agent.calibration.values()):
        raise ConfigError(
            f"{path} knows a log alone, and nobody knows what its tours truly cost; if it is of a world with a name,"
            " add that: --cost"
        )
    return {method: coverage(agent, method, instances=instances, nodes=nodes) for method in agent.calibration}


if __name__ == "__main__":
    main(sys.argv[1:])
