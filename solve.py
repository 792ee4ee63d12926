"""Solve routing instances, from files or drawn at random, with a trained agent: lengths, gaps, tours and pictures.

For example:
  python solve.py logdir/tsp_attn-seed0 berlin52.tsp --out solved
  python solve.py logdir/tsp_attn-seed0 --random 1000 --nodes 20 --seed 777 --decode augment --reference lkh
  python solve.py logdir/cvrp_attn-seed0 X-n101-k25.vrp --decode sample --samples 100 --out solved
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from matplotlib.image import imsave
from tqdm import tqdm

import config
import launch
from config import ConfigError, UserError, one_line_errors
from decoding import Decoding, Imagined, as_instance, best_tours, imagined_tours
from dreamer import Dreamer
from envs.costs import EUCLIDEAN
from envs.drawing import draw_tour
from envs.files import InstanceError, RoutingInstance, read_instances
from envs.instances import reference_tour
from envs.metrics import EXACT, distance_matrix, plane, tour_length
from envs.pyvrp_reference import pyvrp_solution
from envs.routing import MIN_NODES, RULES, CVRPInstance
from envs.solutions import check_solution, known_length, solution_path, write_solution
from terminal import show, tell

CONFIGS = Path(__file__).with_name("configs.yaml")
# By problem, as in `envs.routing.RULES`: the solver that the field compares with.
REFERENCES = {"tsp": "lkh", "cvrp": "pyvrp"}


TRUST_HELP = "import and call what the run's config names; without it, code that a file names is never run"

# An instance with the file it came from, and the length that is known of it.
Case = tuple[Path, RoutingInstance, int | float | None]


class Solution(NamedTuple):
    """A checked solution of an instance, with lengths in the instance's own metric.

    Attributes:
        instance: what was solved.
        tour: as in `envs.solutions`.
        length: of the closed tour.
        seconds: what decoding took; instances that were solved together share it.
        reference: length to compare with; None where it is neither known nor asked for.
        imagined: the tour that the model imagines, and the length it expects; None where it was not asked for.
    """

    instance: RoutingInstance
    tour: Int64[np.ndarray, " L"]
    length: int | float
    seconds: float
    reference: int | float | None = None
    imagined: Imagined | None = None

    @property
    def gap(self) -> float | None:
        """How much longer than the reference, in percent; None without one, or where all its legs round to 0."""
        return 100 * (self.length / self.reference - 1) if self.reference else None

    @property
    def imagined_real_length(self) -> int | float | None:
        """What the imagined tour is long; None where there is none."""
        if self.imagined is None:
            return None
        return tour_length(self.instance.coords, self.imagined.tour, self.instance.metric)


def load_agent(run: Path, device: torch.device, *, trust: bool = False) -> Dreamer:
    """The trained agent of a run.

    Args:
        run: as in `launch.load_run`.
        device: where it will act.
        trust: as in `launch.load_run`.

    Raises:
        ConfigError: there is no such run, or it is of no problem that can be solved from files, or of costs that are no
            distances.
        CheckpointError: the checkpoint cannot be read, or belongs to another config.
    """
    defaults = config.load(CONFIGS, [], {})
    agent = launch.load_run(run, make_agent=Dreamer, device=device, defaults=defaults, trust=trust).agent
    assert isinstance(agent, Dreamer)
    if agent.task.rules is None:
        raise ConfigError(f"{run} was trained on a task that is no routing problem; give a run of a routing task")
    name = agent.task.rules.name
    if name not in REFERENCES:
        raise ConfigError(f"{run} was trained on {name}, and files hold {' and '.join(REFERENCES)}; give another run")
    costs = agent.task.rules.costs
    if costs.name != EUCLIDEAN.name:
        raise ConfigError(f"{run} was trained on costs of {costs.name}, and files ask for distances; give another run")
    return agent


def random_instances(agent: Dreamer, count: int, num_nodes: int, seed: int) -> list[RoutingInstance]:
    """Instances of the problem that an agent was trained on, as the field draws them."""
    rules = agent.task.rules
    assert rules is not None
    drawn = rules.field_instances(count, num_nodes, seed=seed)
    width = len(str(count - 1))
    instances = []
    for row, nodes in enumerate(drawn.coords.numpy()):
        each = RoutingInstance(f"random-{row:0{width}}", rules.name, nodes, EXACT)
        if isinstance(drawn, CVRPInstance):
            demand, capacity = drawn.demand[row].long().numpy(), int(drawn.capacity[row])
            each = each._replace(demand=demand, capacity=capacity)
        instances.append(each)
    return instances


def solve(
    agent: Dreamer, instances: Sequence[RoutingInstance], decoding: Decoding, *, imagine: bool = False
) -> list[Solution | ValueError]:
    """A checked solution of each instance, in order, or why it cannot be solved; a progress bar shows long work.

    Args:
        agent: trained on the instances' problem.
        instances: of any sizes; those of one size are solved together.
        decoding: how to look for tours.
        imagine: also have the model imagine each tour.

    Raises:
        IllegalSolution: a tour breaks the rules, which is a defect.
    """
    assert agent.task.rules is not None
    rules = agent.task.rules
    groups: dict[tuple[str, int, str], list[int]] = {}
    for index, instance in enumerate(instances):
        groups.setdefault((instance.problem, len(instance.coords), instance.metric), []).append(index)
    total = sum(decoding.decisions(rules, size) * len(members) for (_, size, _), members in groups.items())
    outcomes: dict[int, Solution | ValueError] = {}
    with tqdm(total=total, desc="solving", unit="decision", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        for (problem, _, _), members in groups.items():
            group = [instances[index] for index in members]
            begin = time.perf_counter()
            try:
                if problem != rules.name:
                    raise UserError(f"is a {problem} instance, and the run was trained on {rules.name}")
                tours = best_tours(agent.model, agent.behavior, group, decoding, progress=bar.update)
            except UserError as error:
                outcomes |= dict.fromkeys(members, error)
                continue
            seconds = (time.perf_counter() - begin) / len(group)
            pictured = imagined_tours(agent.model, agent.behavior, group) if imagine else [None] * len(group)
            for index, instance, tour, picture in zip(members, group, tours, pictured, strict=True):
                if picture is not None:
                    # The model knows rewards as they were stored.
                    picture = picture._replace(length=picture.length / agent.reward_scale)
                check_solution(instance, tour)
                length = tour_length(instance.coords, tour, instance.metric)
                outcomes[index] = Solution(instance, tour, length, seconds, imagined=picture)
    return [outcomes[index] for index in range(len(instances))]


def references(instances: Sequence[RoutingInstance], solver: str) -> list[int | float]:
    """The length of each instance's solution by another solver, `lkh` or `pyvrp`; all are of one problem."""
    sizes = {len(instance.coords) for instance in instances}
    problem = instances[0].problem
    plain = all(instance.metric == EXACT for instance in instances)
    if solver == REFERENCES[problem] and plain and len(sizes) == 1 and min(sizes) >= MIN_NODES:
        # Those of a random set are kept from one call to the next.
        coords = torch.from_numpy(np.stack([instance.coords for instance in instances]))
        return list(map(float, RULES[problem].reference_lengths(as_instance(instances, coords))))
    bar = tqdm(instances, desc=solver, delay=2, disable=None, leave=False)
    return [_reference(instance, solver) for instance in bar]


def _reference(instance: RoutingInstance, solver: str) -> int | float:
    if solver == "pyvrp":
        tour = pyvrp_solution(instance)
    else:
        tour = reference_tour(distance_matrix(instance.coords, instance.metric))
    check_solution(instance, tour)
    return tour_length(instance.coords, tour, instance.metric)


def write(solution: Solution, folder: Path) -> None:
    """Write the solution to `folder` as its problem's files do, and its picture."""
    instance = solution.instance
    write_solution(solution_path(folder, instance), instance, solution.tour)
    comparison = "" if solution.gap is None else f", {solution.gap:.2f} % above the reference"
    title = f"{instance.name}: length {_text(solution.length)}{comparison}"
    picture = draw_tour(plane(instance.coords, instance.metric), solution.tour, title=title)
    imsave(folder / f"{instance.name}.png", picture)


def totals(solutions: Sequence[Solution]) -> dict[str, float | None]:
    """Means over the instances, and the seconds that decoding took; None where there is nothing to average.

    The gap is the mean of the instances' own gaps, so that long tours do not count more than short ones.
    """

    def mean(values: list[int | float]) -> float | None:
        return float(np.mean(values)) if values else None

    return {
        "mean_length": mean([solution.length for solution in solutions]),
        "mean_reference": mean([solution.reference for solution in solutions if solution.reference is not None]),
        "mean_gap_percent": mean([solution.gap for solution in solutions if solution.gap is not None]),
        "seconds": sum(solution.seconds for solution in solutions),
    }


def as_json(solutions: Sequence[Solution]) -> str:
    """Totals and every solution as one JSON object; nodes are counted from 0."""
    rows = []
    for solution in solutions:
        row: dict[str, Any] = {
            "name": solution.instance.name,
            "n": len(solution.instance.coords),
            "length": solution.length,
            "reference": solution.reference,
            "gap_percent": solution.gap,
            "tour": solution.tour.tolist(),
        }
        if solution.imagined is not None:
            row["imagined_length"] = solution.imagined.length
            row["imagined_real_length"] = solution.imagined_real_length
            row["imagined_tour"] = solution.imagined.tour.tolist()
        rows.append(row)
    return json.dumps({**totals(solutions), "instances": rows}, allow_nan=False)


def table(solutions: Sequence[Solution]) -> str:
    """One line for each solution, and one with the totals."""
    with_imagined = any(solution.imagined is not None for solution in solutions)
    heads = ["instance", "n", "length", "reference", "gap, %", "seconds"]
    heads += ["imagined", "in truth"] if with_imagined else []
    rows = [heads]
    for solution in solutions:
        cells = [solution.instance.name, str(len(solution.instance.coords))]
        cells += [_text(solution.length), _text(solution.reference), _percent(solution.gap), f"{solution.seconds:.3f}"]
        if with_imagined:
            expected = None if solution.imagined is None else solution.imagined.length
            cells += [_text(expected), _text(solution.imagined_real_length)]
        rows.append(cells)
    if len(solutions) > 1:
        total = totals(solutions)
        means = [_text(total["mean_length"]), _text(total["mean_reference"]), _percent(total["mean_gap_percent"])]
        rows.append([f"mean of {len(solutions)}", "", *means, f"{total['seconds']:.3f} in all"])
    columns = [max(len(row[index]) for row in rows if index < len(row)) for index in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, columns, strict=False))
        )
        for row in rows
    )


def _text(length: int | float | None) -> str:
    if length is None:
        return "-"
    return f"{length:.0f}" if float(length).is_integer() else f"{length:.4f}"


def _percent(gap: float | None) -> str:
    return "-" if gap is None else f"{gap:.2f}"


def positive(text: str) -> int:
    """A count on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _seed(text: str) -> int:
    number = int(text)
    # What numpy's legacy generator takes.
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2**32 - 1}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="CHECKPOINT", help="weights, a run's folder, or a checkpoint file in one")
    add("files", type=Path, nargs="*", metavar="FILE", help="TSPLIB, CVRPLIB, .csv, .npy or .npz files")
    add("--random", type=positive, metavar="COUNT", help="solve random instances instead of files")
    add("--nodes", type=positive, help="of the random instances, depot included; those of training where not given")
    add("--seed", type=_seed, default=0, help="of the random instances and of --decode sample (default 0)")
    add("--decode", choices=Decoding.METHODS, default="greedy", help="how to look for tours (default greedy)")
    add("--samples", type=positive, default=128, metavar="K", help="tours that sample draws (default 128)")
    add("--imagine", action="store_true", help="show the tour that the model imagines, and the length it expects")
    add("--reference", choices=("lkh", "pyvrp", "none"), help="what to compare with; what is known where not given")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--out", type=Path, metavar="DIR", help="write tours (.tour, .sol) and pictures (.png) there")
    add("--device", default="auto", help="auto (the default) is CUDA where there is one")
    add("--trust", action="store_true", help=TRUST_HELP)
    return parser


def _read(paths: Sequence[Path], *, with_known: bool) -> tuple[list[Case], int]:
    """Every instance of every file with its known length, and the number of files that cannot be read."""
    found, failures = [], 0
    for path in paths:
        try:
            instances = read_instances(path)
        except InstanceError as error:
            tell(f"solve.py: {error}")
            failures += 1
            continue
        found += [(path, each, known_length(path, each) if with_known else None) for each in instances]
    return found, failures


def _check_output(folder: Path, found: Sequence[Case]) -> None:
    name, count = max(Counter(instance.name for _, instance, _ in found).items(), key=itemgetter(1), default=("", 0))
    if count > 1:
        raise ConfigError(f"several instances are called {name}, and so would be their tours; solve them apart")
    for path, instance, _ in found:
        if solution_path(folder, instance).resolve() == path.with_suffix(".sol").resolve():
            raise ConfigError(
                f"--out {folder}: {path.stem}.sol would stand where a best known solution does; give another"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made a folder ({error.strerror}); give another") from error


def main(argv: list[str]) -> None:
    """Read the command line and solve; an instance that cannot be solved does not keep the others from it."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.files) == bool(arguments.random):
        parser.error("give either files or --random COUNT")
    with one_line_errors("solve.py", *launch.USER_ERRORS):
        decoding = Decoding(method=arguments.decode, samples=arguments.samples, seed=arguments.seed)
        agent = load_agent(arguments.run, launch.choose_device(arguments.device), trust=arguments.trust)
        assert agent.task.rules is not None
        if arguments.reference == "lkh" and REFERENCES[agent.task.rules.name] != "lkh":
            raise ConfigError(f"LKH solves no {agent.task.rules.name} instances here; give --reference pyvrp")
        if arguments.random:
            num_nodes = arguments.nodes or agent.task.num_actions
            drawn = random_instances(agent, arguments.random, num_nodes, arguments.seed)
            found: list[Case] = [(Path(), each, None) for each in drawn]
            failures = 0
        else:
            found, failures = _read(arguments.files, with_known=arguments.reference is None)
        if arguments.out is not None:
            _check_output(arguments.out, found)
        solutions: list[Solution] = []
        outcomes = solve(agent, [instance for _, instance, _ in found], decoding, imagine=arguments.imagine)
        for (path, _, known), outcome in zip(found, outcomes, strict=True):
            if isinstance(outcome, ValueError):
                tell(f"solve.py: {path} {outcome}")
                failures += 1
            else:
                solutions.append(outcome._replace(reference=known))
        if arguments.reference in ("lkh", "pyvrp") and solutions:
            lengths = references([solution.instance for solution in solutions], arguments.reference)
            solutions = [one._replace(reference=length) for one, length in zip(solutions, lengths, strict=True)]
        if arguments.json:
            show(as_json(solutions))
        elif solutions:
            show(table(solutions))
        if arguments.out is not None:
            for solution in tqdm(solutions, desc="writing", delay=2, disable=None, leave=False):
                write(solution, arguments.out)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
