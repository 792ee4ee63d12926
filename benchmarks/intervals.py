"""How often the bounds hold that `solve.py` gives for what tours cost, and how wide they are.

    python -m benchmarks.intervals logdir/tsp_few_steps-tsp_lanes-tsp_plan-seed0

Tours of the field's test instances are chosen before any move, by plans and, where the run trained one, by its policy.
What they truly cost, under what is hidden of each instance, lies within the bounds in nine cases of ten if these are
honest. They were found out on validation instances alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
from benchmarks.flags import CONFIGS
from config import ConfigError, one_line_errors
from dreamer import Dreamer
from routing.cases import field_cases
from routing.instances import MIN_REFERENCE_NODES, TEST_SEED
from solving.calibrating import outcomes
from solving.command_line import TRUST_HELP, positive
from solving.intervals import least_tours
from system.terminal import Parser, show
from training import devices, launch, loading


class Coverage(NamedTuple):
    """How bounds did on test instances.

    Attributes:
        inside: share of tours whose cost lay within them.
        width: their mean width as a share of the expected cost.
        bias: what tours cost by what the model expected, before anything was calibrated.
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
    forecasts = agent.calibration[method].forecast(expected)
    cost, low, high = np.array([(each.cost, each.low, each.high) for each in forecasts]).T
    inside = (low <= paid) & (paid <= high)
    return Coverage(inside.mean(), ((high - low) / cost).mean(), paid.sum() / expected.mean(0).sum())


def main(argv: list[str]) -> None:
    """Read the command line and print a table."""
    parser = Parser("intervals", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="LOGDIR", help="folders of runs, or checkpoints")
    parser.add_argument("--instances", type=positive, default=1000, help="of the test set (default 1000)")
    parser.add_argument("--nodes", type=positive, help="of an instance; those of training where not given")
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    arguments = parser.parse_args(argv)
    with one_line_errors("intervals", *launch.USER_ERRORS):
        defaults = config.load_defaults(CONFIGS)
        device = devices.prepare_torch(defaults)
        show("| run | tours by | costs within the bounds, % | mean width, % | cost beyond what was expected, % |")
        show("|---|---|---|---|---|")
        for name in arguments.runs:
            path, trust = Path(name), arguments.trust
            run = loading.load_run(path, make_agent=Dreamer, device=device, defaults=defaults, trust=trust)
            agent = run.agent
            assert isinstance(agent, Dreamer)
            if not agent.calibration:
                raise ConfigError(
                    f"{name} does not know how wrong it is about costs: that is known of a run with learnt costs in a"
                    f" known world, at its end, by {least_tours()} validation instances or more"
                )
            if any(each.driven for each in agent.calibration.values()):
                raise ConfigError(f"{name} knows a log alone, and nobody knows what its tours truly cost")
            nodes = arguments.nodes or run.config.nodes
            if nodes < MIN_REFERENCE_NODES:
                raise ConfigError(f"--nodes is {nodes}; a tour takes {MIN_REFERENCE_NODES} at least")
            for method in agent.calibration:
                found = coverage(agent, method, instances=arguments.instances, nodes=nodes)
                shares = (found.inside, found.width, found.bias - 1)
                show(f"| {name} | {method} | {' | '.join(f'{100 * share:.2f}' for share in shares)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
