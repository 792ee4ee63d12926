"""Solve routing instances, from files or drawn at random, with a trained agent: lengths, gaps, tours and pictures.

For example:
  python solve.py logdir/tsp_attn-seed0 berlin52.tsp --out solved
  python solve.py logdir/tsp_attn-seed0 --random 1000 --nodes 20 --seed 777 --decode augment --reference lkh
  python solve.py logdir/cvrp_attn-seed0 X-n101-k25.vrp --decode sample --samples 100 --out solved
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
from config import ConfigError, UserError, one_line_errors
from dreamer import Dreamer
from envs.routing import MIN_NODES, RULES, CVRPInstance
from envs.tasks import RoutingTask
from routing.costs import EUCLIDEAN
from routing.cvrp import FIELD_INSTANCES, CVRPRules
from routing.drawing import draw_tour
from routing.files import InstanceError, RoutingInstance, read_instances
from routing.instances import reference_tour
from routing.metrics import EXACT, distance_matrix, plane, tour_length
from routing.pyvrp_reference import pyvrp_solution
from routing.rules import Rules
from routing.solutions import check_solution, known_length, route_counts, solution_path, write_solution
from solving import answers
from solving.answers import Solution
from solving.decoding import (
    WORKING_NUMBERS,
    Decoding,
    as_instance,
    best_tours,
    imagined_tours,
    nearest_neighbour_lengths,
    refuse_other_sizes,
    require_room,
)
from system.memory import NotEnoughMemory, is_exhausted, require_memory
from system.safe_files import replacing
from system.terminal import Parser, show, tell
from training import devices, loading

CONFIGS = Path(__file__).with_name("configs.yaml")
# The solver that the field compares with, by problem as in `envs.routing.RULES`.
REFERENCES = {"tsp": "lkh", "cvrp": "pyvrp"}
# Bytes, by measurement and rounded up: of a random instance and its solution, of each of its nodes, and of each leg
# while a solver looks for a reference.
INSTANCE_BYTES, NODE_BYTES, LEG_BYTES = 3000, 80, 150

TRUST_HELP = "import and call what the run's config names; without it, code that a file names is never run"

# An instance with the file it came from, and the length that is known of it.
Case = tuple[Path, RoutingInstance, int | float | None]


def load_agent(run: Path, device: torch.device, *, trust: bool = False) -> Dreamer:
    """The trained agent of a run.

    Args:
        run: as in `loading.load_run`.
        device: where it will act.
        trust: as in `loading.load_run`.

    Raises:
        ConfigError: there is no such run, or it is of no problem that can be solved from files, or of costs that are no
            distances.
        CheckpointError: the checkpoint cannot be read, or belongs to another config.
    """
    defaults = config.load_defaults(CONFIGS)
    agent = loading.load_run(run, make_agent=Dreamer, device=device, defaults=defaults, trust=trust).agent
    assert isinstance(agent, Dreamer)
    if not isinstance(agent.task, RoutingTask):
        raise ConfigError(f"{run} was trained on a task that is no routing problem; give a run of a routing task")
    name = agent.task.rules.name
    if name not in REFERENCES:
        raise ConfigError(f"{run} was trained on {name}, and files hold {' and '.join(REFERENCES)}; give another run")
    costs = agent.task.rules.costs
    if costs.name != EUCLIDEAN.name:
        raise ConfigError(f"{run} was trained on costs of {costs.name}, and files ask for distances; give another run")
    return agent


def rules_of(agent: Dreamer) -> type[Rules]:
    """The rules of the problem that an agent was trained on."""
    assert isinstance(agent.task, RoutingTask), "load_agent refuses others"
    return agent.task.rules


def random_instances(agent: Dreamer, count: int, num_nodes: int, seed: int) -> list[RoutingInstance]:
    """Instances of the problem that an agent was trained on, as the field draws them.

    Raises:
        UserError: the agent takes another size, or memory is too small for so many, or for one of that size.
    """
    rules = rules_of(agent)
    try:
        refuse_other_sizes(agent.behavior, num_nodes)
        require_room(agent.behavior, num_nodes)
    except UserError as error:
        raise UserError(f"every random instance {error}") from error
    # The field's vehicle-routing instances are drawn all together.
    drawn_at_once = max(count, FIELD_INSTANCES) if issubclass(rules, CVRPRules) else count
    needed = 4 * WORKING_NUMBERS + INSTANCE_BYTES * count + NODE_BYTES * num_nodes * drawn_at_once
    work = f"{count:,} random instances of {num_nodes:,} nodes take"
    require_memory(needed, device=torch.device("cpu"), work=work, remedy="ask for fewer, or for smaller ones")
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
) -> list[Solution | UserError]:
    """A checked solution of each instance, in order, or why it cannot be solved; a progress bar shows long work.

    Args:
        agent: trained on the instances' problem.
        instances: of any sizes; those of one size are solved together.
        decoding: how to look for tours.
        imagine: also have the model imagine each tour.

    Raises:
        IllegalSolution: a tour breaks the rules, which is a defect.
    """
    rules = rules_of(agent)
    groups: dict[tuple[str, int, str], list[int]] = {}
    for index, instance in enumerate(instances):
        groups.setdefault((instance.problem, len(instance.coords), instance.metric), []).append(index)
    total = sum(decoding.decisions(rules, size) * len(members) for (_, size, _), members in groups.items())
    outcomes: dict[int, Solution | UserError] = {}
    with tqdm(total=total, desc="solving", unit="decision", unit_scale=True, delay=1, disable=None, leave=False) as bar:
        for (problem, _, _), members in groups.items():
            group = [instances[index] for index in members]
            try:
                if problem != rules.name:
                    raise UserError(f"is a {problem} instance, and the run was trained on {rules.name}")
                found = _solve_group(agent, group, decoding, imagine=imagine, progress=bar.update)
            except UserError as error:
                outcomes |= dict.fromkeys(members, error)
            except (MemoryError, RuntimeError) as error:
                if not is_exhausted(error):
                    raise
                short = NotEnoughMemory("ran out of memory; solve it alone, or where there is more")
                outcomes |= dict.fromkeys(members, short)
            else:
                outcomes |= dict(zip(members, found, strict=True))
    return [outcomes[index] for index in range(len(instances))]


def _solve_group(
    agent: Dreamer,
    group: Sequence[RoutingInstance],
    decoding: Decoding,
    *,
    imagine: bool,
    progress: Callable[[int], object],
) -> list[Solution | UserError]:
    """The same for instances of one size and metric."""
    begin = time.perf_counter()
    tours = best_tours(agent.behavior, group, decoding, progress=progress)
    seconds = (time.perf_counter() - begin) / len(group)
    pictured = imagined_tours(agent.behavior, group) if imagine else [None] * len(group)
    nearest = nearest_neighbour_lengths(rules_of(agent), group).tolist()
    found: list[Solution | UserError] = []
    for instance, tour, picture, simple in zip(group, tours, pictured, nearest, strict=True):
        if picture is not None:
            # The model knows rewards as they were stored.
            picture = picture._replace(length=picture.length / agent.reward_scale)
        check_solution(instance, tour)
        length = tour_length(instance.coords, tour, instance.metric)
        solution = Solution(instance, tour, length, seconds, imagined=picture, nearest=simple)
        found.append(_too_many_routes(solution) or solution)
    return found


def _too_many_routes(solution: Solution) -> UserError | None:
    instance = solution.instance
    if instance.vehicles is None:
        return None
    (routes,) = route_counts(solution.tour[None]).tolist()
    if routes <= instance.vehicles:
        return None
    return UserError(
        f"may use {instance.vehicles} vehicles, and the best plan found has {routes} routes; look longer, with --decode"
        " sample --samples 1000, or raise VEHICLES"
    )


def references(instances: Sequence[RoutingInstance], solver: str) -> list[int | float]:
    """The length of each instance's solution by another solver, `lkh` or `pyvrp`; all are of one problem.

    Raises:
        UserError: a solver finds none, or needs more memory than there is.
    """
    sizes = {len(instance.coords) for instance in instances}
    problem = instances[0].problem
    plain = all(instance.metric == EXACT for instance in instances)
    legs = max(sizes) ** 2
    work = f"{solver} for {max(sizes):,} nodes needs"
    require_memory(LEG_BYTES * legs, device=torch.device("cpu"), work=work, remedy="give --reference none")
    if solver == REFERENCES[problem] and plain and len(sizes) == 1 and min(sizes) >= MIN_NODES:
        # Those of a random set are kept from one call to the next.
        coords = torch.from_numpy(np.stack([instance.coords for instance in instances]))
        return list(map(float, RULES[problem].reference_lengths(as_instance(instances, coords))))
    bar = tqdm(instances, desc=solver, delay=1, disable=None, leave=False)
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
    title = f"{instance.name}: length {answers.length_text(solution.length, instance.metric)}{comparison}"
    picture = draw_tour(plane(instance.coords, instance.metric), solution.tour, title=title)
    # Most calls write no picture, and matplotlib takes longer to import than a tour to find.
    from matplotlib.image import imsave

    with replacing(folder / f"{instance.name}.png") as temporary:
        imsave(temporary, picture)


def positive(text: str) -> int:
    """A count on the command line, also written as 1e6."""
    try:
        number = int(text) if text.isdecimal() else float(text)
    except ValueError:
        number = 0
    if number < 1 or number != number // 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 up")
    return int(number)


def _seed(text: str) -> int:
    number = int(text)
    # numpy's legacy generator takes no other seeds.
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2**32 - 1}")
    return number


def _parser() -> Parser:
    parser = Parser("solve.py", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="CHECKPOINT", help="weights, a run's folder, or a checkpoint file in one")
    add("files", type=Path, nargs="*", metavar="FILE", help="TSPLIB, CVRPLIB, .csv, .tsv, .json, .npy or .npz files")
    add("--random", type=positive, metavar="COUNT", help="solve random instances instead of files")
    add("--nodes", type=positive, help="of the random instances, depot included; those of training where not given")
    add("--seed", type=_seed, help="of the random instances and of --decode sample (default 0)")
    add("--decode", choices=Decoding.METHODS, default="greedy", help="how to look for tours (default greedy)")
    add("--samples", type=positive, metavar="K", help="tours that sample draws (default 128)")
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
    # The folder is made when there is something to write, so that an earlier failure leaves nothing behind.
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        cause = "may not be written to" if existing.is_dir() else "is no folder"
        raise ConfigError(f"--out {folder} cannot be made a folder ({existing} {cause}); give another")


def _cases(arguments: argparse.Namespace, agent: Dreamer) -> tuple[list[Case], int]:
    """What is to be solved, and how many files cannot be read."""
    if arguments.random:
        num_nodes = arguments.nodes or agent.task.num_actions
        drawn = random_instances(agent, arguments.random, num_nodes, arguments.seed)
        return [(Path(each.name), each, None) for each in drawn], 0
    return _read(arguments.files, with_known=arguments.reference is None)


def _with_references(solutions: list[Solution], solver: str) -> list[Solution]:
    """Solutions with references; one that there is no reference of is told of, and keeps its length."""
    try:
        lengths = references([each.instance for each in solutions], solver)
    except (UserError, MemoryError) as error:
        if len(solutions) > 1:
            return [found for each in solutions for found in _with_references([each], solver)]
        tell(f"solve.py: {solutions[0].instance.name} has no reference: {str(error) or 'out of memory'}")
        return solutions
    return [one._replace(reference=length) for one, length in zip(solutions, lengths, strict=True)]


def _print(solutions: Sequence[Solution], decoding: Decoding, *, as_json: bool, trained_on: int) -> None:
    if as_json:
        show(answers.as_json(solutions))
    elif solutions:
        show(answers.table(solutions))
        if tours := answers.tours(solutions):
            show(f"\n{tours}")
    for line in answers.warnings(solutions, decoding, trained_on=trained_on):
        tell(f"solve.py: {line}")


def _write_all(solutions: Sequence[Solution], folder: Path) -> str:
    """Write every solution and say where.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for solution in tqdm(solutions, desc="writing", delay=1, disable=None, leave=False):
            write(solution, folder)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written to ({error.strerror or error}); give another") from error
    suffix = solution_path(folder, solutions[0].instance).suffix
    if len(solutions) == 1:
        return f"written: {solution_path(folder, solutions[0].instance)} and its picture (.png)"
    return f"written to {folder}: {len(solutions)} solutions ({suffix}) and their pictures (.png)"


def _require_effect(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse options that would change nothing, and fill in the others."""
    draws = arguments.decode == "sample"
    if arguments.samples is not None and not draws:
        parser.error(f"--samples is of --decode sample, and --decode is {arguments.decode}")
    if arguments.nodes is not None and not arguments.random:
        parser.error("--nodes is of --random instances; files have nodes of their own")
    if arguments.seed is not None and not (draws or arguments.random):
        parser.error("--seed is of --random and of --decode sample; nothing is drawn here")
    arguments.samples = arguments.samples or Decoding.samples
    arguments.seed = arguments.seed or 0


def main(argv: list[str]) -> None:
    """Read the command line and solve; an instance that cannot be solved does not keep the others from it."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.files) == bool(arguments.random):
        parser.error("give either files or --random COUNT")
    _require_effect(parser, arguments)
    with one_line_errors("solve.py", *loading.USER_ERRORS):
        decoding = Decoding(method=arguments.decode, samples=arguments.samples, seed=arguments.seed)
        agent = load_agent(arguments.run, devices.choose_device(arguments.device), trust=arguments.trust)
        if arguments.reference == "lkh" and REFERENCES[rules_of(agent).name] != "lkh":
            raise ConfigError(f"LKH solves no {rules_of(agent).name} instances here; give --reference pyvrp")
        found, failures = _cases(arguments, agent)
        if arguments.out is not None:
            _check_output(arguments.out, found)
        solutions: list[Solution] = []
        told: set[str] = set()
        outcomes = solve(agent, [instance for _, instance, _ in found], decoding, imagine=arguments.imagine)
        for (path, _, known), outcome in zip(found, outcomes, strict=True):
            if isinstance(outcome, Solution):
                solutions.append(outcome._replace(reference=known))
                continue
            failures += 1
            # All instances of a batch fail for the same reason.
            if (line := f"solve.py: {path} {outcome}") not in told:
                told.add(line)
                tell(line)
        if arguments.reference in ("lkh", "pyvrp") and solutions:
            solutions = _with_references(solutions, arguments.reference)
        _print(solutions, decoding, as_json=arguments.json, trained_on=agent.task.num_actions)
        if arguments.out is not None and solutions:
            # Beside a JSON object nothing else goes to stdout.
            (tell if arguments.json else show)(_write_all(solutions, arguments.out))
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
