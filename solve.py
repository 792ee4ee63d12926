"""Solve TSPLIB files with the agent of a run: tour lengths in the file's own metric, tours, and pictures of them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.image import imsave

import config
import evaluation
import launch
from config import ConfigError, one_line_errors
from dreamer import Dreamer
from envs.drawing import draw_tour
from envs.instances import lkh_tour, read_tsplib, scale_to_unit_square, tsplib_distances, tsplib_tour_length
from envs.routing import TSPInstance, TSPRules
from networks import TSPPointerActor

CONFIGS = Path(__file__).with_name("configs.yaml")
ROW = "{:<16} {:>6} {:>10} {:>10} {:>8} {:>8}"


class Solution(NamedTuple):
    """A tour of a file's nodes, with lengths in the file's own metric.

    Attributes:
        coords: the file's positions.
        tour: nodes in visiting order, from 0.
        length: of the closed tour.
        reference: length of LKH's tour; None where it was not asked for.
        seconds: what decoding took.
    """

    coords: Float[np.ndarray, "N 2"]
    tour: Int[np.ndarray, " N"]
    length: int
    reference: int | None
    seconds: float

    @property
    def gap(self) -> float | None:
        """How much longer than the reference, in percent; None without one, or where all its legs round to 0."""
        return 100 * (self.length / self.reference - 1) if self.reference else None


def load_agent(run: Path, device: torch.device) -> Dreamer:
    """The trained agent of a run.

    Args:
        run: the run's folder, for its latest.pt, or one of its checkpoint files, with config.yaml beside it.
        device: where it will act.

    Raises:
        ConfigError: there is no such run, or it is of no routing task.
        CheckpointError: the checkpoint cannot be read, or belongs to another config.
    """
    defaults = config.load(CONFIGS, [], {})
    agent = launch.load_run(run, make_agent=Dreamer, device=device, defaults=defaults).agent
    assert isinstance(agent, Dreamer)
    if agent.task.rules is None:
        raise ConfigError(f"{run} was trained on a task that is no routing problem; give a run of a routing task")
    return agent


def greedy_tour(agent: Dreamer, coords: Float[np.ndarray, "N 2"]) -> Int[np.ndarray, " N"]:
    """The tour that the agent takes by its likeliest actions, each checked against the rules.

    Raises:
        ValueError: the agent is made for another number of nodes, or all nodes lie at one point.
    """
    actor, trained_nodes = agent.behavior.actor, agent.task.num_actions
    if agent.task.rules is not TSPRules:
        raise ValueError("is a travelling-salesman instance, and the run was trained on another problem")
    if not isinstance(actor, TSPPointerActor) and len(coords) != trained_nodes:
        raise ValueError(
            f"has {len(coords)} nodes, and the run's actor takes {trained_nodes};"
            " one trained with actor.type: tsp_pointer takes any number"
        )
    scaled = torch.from_numpy(scale_to_unit_square(coords)).float()[None]
    # The length in the unit square has nothing to be compared with: only the tour is of interest.
    instance = evaluation.Evaluation(TSPInstance(coords=scaled), references=np.ones(1))
    tour = evaluation.evaluate(agent, agent.task, instance, device=agent.device).tours[0].cpu().numpy()
    assert np.array_equal(np.sort(tour), np.arange(len(coords))), "the rules let every node be visited exactly once"
    return tour


def solve(agent: Dreamer, path: Path, *, with_reference: bool) -> Solution:
    """Solve one TSPLIB file.

    Raises:
        ValueError: the file cannot be used, or does not fit the agent; the message names it.
    """
    coords = read_tsplib(path).coords
    begin = time.perf_counter()
    try:
        tour = greedy_tour(agent, coords)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    seconds = time.perf_counter() - begin
    reference = tsplib_tour_length(coords, lkh_tour(tsplib_distances(coords))) if with_reference else None
    return Solution(coords, tour, tsplib_tour_length(coords, tour), reference, seconds)


def write(solution: Solution, name: str, folder: Path) -> None:
    """Write name.tour to `folder`, in TSPLIB's format with nodes counted from 1, and its picture name.png."""
    lines = [f"NAME : {name}.tour", f"COMMENT : length {solution.length}", "TYPE : TOUR"]
    lines += [f"DIMENSION : {len(solution.tour)}", "TOUR_SECTION", *map(str, solution.tour + 1), "-1", "EOF"]
    (folder / f"{name}.tour").write_text("\n".join(lines) + "\n", encoding="utf-8")
    comparison = "" if solution.gap is None else f", {solution.gap:.2f} % above LKH"
    title = f"{name}: length {solution.length}{comparison}"
    imsave(folder / f"{name}.png", draw_tour(solution.coords, solution.tour, title=title))


def row(solution: Solution, name: str) -> str:
    """A line of the table."""
    gap = "-" if solution.gap is None else f"{solution.gap:.2f}"
    reference = "-" if solution.reference is None else solution.reference
    return ROW.format(name, len(solution.tour), solution.length, reference, gap, f"{solution.seconds:.2f}")


def main(argv: list[str]) -> None:
    """Read the command line and solve; a file that cannot be solved does not keep the others from it."""
    parser = argparse.ArgumentParser(prog="solve.py", description=__doc__)
    parser.add_argument("run", type=Path, metavar="LOGDIR", help="a run's folder, or a checkpoint file in one")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.tsp", help="TSPLIB files with EUC_2D coordinates")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tours and pictures go")
    parser.add_argument("--device", default="auto", help="auto (the default) is CUDA where there is one")
    parser.add_argument("--reference", choices=("lkh", "none"), default="lkh", help="what lengths are compared with")
    arguments = parser.parse_args(argv)
    failed = False
    with one_line_errors("solve.py", *launch.USER_ERRORS, OSError):
        names = [path.stem for path in arguments.files]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"several files are called {min(twice)}, and so would be their tours; solve them apart")
        agent = load_agent(arguments.run, launch.choose_device(arguments.device))
        arguments.out.mkdir(parents=True, exist_ok=True)
        print(ROW.format("name", "nodes", "length", "LKH", "gap, %", "seconds"))
        for path, name in zip(arguments.files, names, strict=True):
            try:
                solution = solve(agent, path, with_reference=arguments.reference == "lkh")
            except ValueError as error:
                print(f"solve.py: {error}", file=sys.stderr)
                failed = True
                continue
            write(solution, name, arguments.out)
            print(row(solution, name), flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
