"""How far planners drive among simulated drivers, and what they run into, beside SUMO's own driver.

    python -m benchmarks.closed_loop
    python -m benchmarks.closed_loop idm logdir/drive-seed0 my_planners:careful --maps motorway --episodes 50

A planner is a name of `driving.baselines.PLANNERS`, the folder of a run of planner.py, that of one of dreamer.py as
`dreamer:FOLDER`, or a function as `module:function`, which takes an observation of Drive-v0 and gives the index of a
candidate or a trajectory. `careful:FOLDER` is a run of planner.py, and `careful:dreamer:FOLDER` one of dreamer.py, that
passes over trajectories that would touch somebody within 3 seconds, if all others drove on as now, and brakes where
each would. Episodes begin in the last fifth of the demand's time, and are
the same for all planners. SUMO's own driver stands in the first row: what it runs into is the simulator's.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import dreamer
import planner
from driving.baselines import PLANNERS, Observation, Planner
from driving.candidates import candidates
from driving.caution import careful
from driving.maps import MAPS
from envs.closed_loop import Outcome, play_all, summary
from system import safe_files
from system.errors import UserError
from system.terminal import Parser, one_line_errors, show
from training import launch

# Seeds of episodes that nothing is trained on: training counts its own from 0.
FIRST_SEED = 1_000_000
WINDOW = (0.8, 1.0)
HEAD = (
    "| planner | metres, % | own fault, % | other contact, % | off the road, % | discomfort | return | ms |"
    " 20 s, map's end |"
)
DREAMER, CAREFUL = "dreamer:", "careful:"
CAUTION = 3.0
# What candidates follow from.
LINE_KEYS = ("lines", "lines_valid", "ego")
OWN_DRIVER = "SUMO's own driver"


class DreamingDriver:
    """A run of dreamer.py, which takes the likeliest candidate and remembers its episode."""

    def __init__(self, run: str, *, caution: float = 0.0) -> None:
        """Load a run.

        Args:
            run: its folder.
            caution: seconds, as of `driving.caution.careful`; 0: nobody looks.

        Raises:
            UserError, CheckpointError: there is none.
        """
        self._agent = dreamer.load(run)
        self._state: dict[str, Any] | None = None
        self._caution = caution

    def begin(self) -> None:
        """Forget the episode before."""
        self._state = None

    def __call__(self, obs: Observation) -> int | np.ndarray:
        action, after = self._agent(obs, self._state)
        chosen: int | np.ndarray = int(action)
        if self._caution:
            allowed = careful(obs, candidates(*(obs[key][None] for key in LINE_KEYS))[0], caution=self._caution)
            if not allowed.actions[action]:
                action, after = self._agent({**obs, "action_mask": allowed.actions}, self._state)
            chosen = allowed.trajectories[action] if allowed.brakes else int(action)
        self._state = after
        return chosen


def planner_named(name: str) -> Planner:
    """A planner.

    Raises:
        UserError, CheckpointError: there is no such planner.
    """
    if name in PLANNERS:
        return PLANNERS[name]
    if Path(name).exists():
        return planner.load(name)
    if name.startswith(CAREFUL):
        run = name.removeprefix(CAREFUL)
        if run.startswith(DREAMER):
            return DreamingDriver(run.removeprefix(DREAMER), caution=CAUTION)
        return planner.load(run, caution=CAUTION)
    if name.startswith(DREAMER):
        return DreamingDriver(name.removeprefix(DREAMER))
    module, _, function = name.partition(":")
    if not function:
        known = ", ".join(PLANNERS)
        raise UserError(
            f"there is no planner '{name}'; there are {known}, folders of runs, careful:FOLDER, dreamer:FOLDER and"
            " module:function"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"planner {name} cannot be had: {error}") from error


def row(name: str, outcomes: list[Outcome], own_driver: list[Outcome]) -> str:
    """One row of the table."""
    found = summary(outcomes, own_driver)
    shares = (found.progress, found.own_fault, found.other_contact, found.off_road)
    ends = Counter(one.end for one in outcomes)
    rest = f"{found.discomfort:.3f} | {found.total:.2f} | {found.milliseconds:.1f} | {ends['time']}, {ends['map']}"
    return f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in shares)} | {rest} |"


def main(argv: list[str]) -> None:
    """Print the table, row by row as they are done."""
    parser = Parser("benchmarks.closed_loop", description=__doc__)
    parser.add_argument("planners", nargs="*", default=["constant_velocity", "idm", "idm_by_candidate"])
    parser.add_argument("--episodes", type=int, default=200, help="of each planner (default 200)")
    parser.add_argument("--maps", nargs="+", default=["ingolstadt", "braunschweig"], help=f"some of {', '.join(MAPS)}")
    parser.add_argument("--seed", type=int, default=0, help="other episodes for each (default 0)")
    parser.add_argument("--out", type=Path, help="a file for every episode's figures, .json")
    with one_line_errors("benchmarks.closed_loop", *launch.USER_ERRORS):
        arguments = parser.parse_args(argv)
        if arguments.episodes < 1:
            raise UserError(f"--episodes is {arguments.episodes}; 1 at least")
        unknown = [name for name in arguments.maps if name not in MAPS]
        if unknown:
            raise UserError(f"there is no map '{unknown[0]}'; there are {', '.join(MAPS)}")
        planners = {name: planner_named(name) for name in arguments.planners}
        first = FIRST_SEED * (1 + arguments.seed)
        seeds = range(first, first + arguments.episodes)
        own_driver = play_all(None, seeds, maps=arguments.maps, window=WINDOW)
        metres = sum(one.metres for one in own_driver) / len(own_driver)
        where = ", ".join(arguments.maps)
        show(f"{arguments.episodes} episodes on {where}; SUMO's own driver makes {metres:.1f} m in one")
        show(HEAD)
        show("|---|---|---|---|---|---|---|---|---|")
        show(row(OWN_DRIVER, own_driver, own_driver))
        played = {OWN_DRIVER: own_driver}
        for name, decide in planners.items():
            played[name] = play_all(decide, seeds, maps=arguments.maps, window=WINDOW)
            show(row(name, played[name], own_driver))
        if arguments.out is not None:
            figures = {name: [one._asdict() for one in outcomes] for name, outcomes in played.items()}
            safe_files.write_text(arguments.out, json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
