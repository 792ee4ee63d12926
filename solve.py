"""Solve routing instances, from files or drawn at random, with a trained agent: lengths, gaps, tours and pictures.

A file may also hold a matrix of costs. A solver answers it by --decode plan, with or without (none) an agent.

For example:
  python solve.py logdir/tsp_attn-seed0 berlin52.tsp --out solved
  python solve.py logdir/tsp_attn-seed0 --random 1000 --nodes 20 --seed 777 --decode augment --reference lkh
  python solve.py logdir/cvrp_attn-seed0 X-n101-k25.vrp --decode sample --samples 100 --out solved
  python solve.py none examples/minutes.csv ftv33.atsp --out solved
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

import config
from config import ConfigError, UserError, one_line_errors
from dreamer import Dreamer
from envs.routing import CVRPInstance
from envs.tasks import RoutingTask
from routing.costs import EUCLIDEAN
from routing.cvrp import FIELD_INSTANCES, CVRPRules
from routing.drawing import draw_tour
from routing.files import InstanceError, RoutingInstance, read_instances
from routing.layout import shown_at
from routing.metrics import EXACT, GIVEN
from routing.rules import Rules
from routing.solutions import check_solution, known_length, route_counts, solution_path, write_solution
from solving import answers
from solving.answers import Solution
from solving.decoding import (
    WORKING_NUMBERS,
    Decoding,
    best_tours,
    imagined_tours,
    nearest_neighbour_lengths,
    refuse_other_sizes,
    require_room,
)
from solving.given_costs import SOLVERS, long_work, solve_given
from solving.references import with_references
from system.memory import NotEnoughMemory, is_exhausted, require_memory
from system.safe_files import replacing
from system.terminal import Parser, show, tell
from training import devices, loading

CONFIGS = Path(__file__).with_name("configs.yaml")
# In place of a run: no model, and a solver for everything.
NO_RUN = Path("none")
PLAN = Decoding.PLAN
# The group of instances that a solver answers by their own costs.
BY_SOLVER = ""
# Bytes, by measurement and rounded up: of a random instance and its solution, and of each of its nodes.
INSTANCE_BYTES, NODE_BYTES = 3000, 80

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
    if name not in SOLVERS:
        raise ConfigError(f"{run} was trained on {name}, and files hold {' and '.join(SOLVERS)}; give another run")
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
    agent: Dreamer | None, instances: Sequence[RoutingInstance], decoding: Decoding, *, imagine: bool = False
) -> list[Solution | UserError]:
    """A checked solution of each instance, in order, or why it cannot be solved; a progress bar shows long work.

    Args:
        agent: trained on the instances' problem; None where a solver finds every solution by the instances' own costs.
        instances: of any sizes; those of one size are solved together.
        decoding: how to look for tours.
        imagine: also have the model imagine each tour.

    Raises:
        IllegalSolution: a tour breaks the rules, which is a defect.
    """
    groups: dict[tuple[str, int, str], list[int]] = {}
    for index, instance in enumerate(instances):
        # Solvers take instances of any sizes beside each other.
        alone = agent is None or (instance.metric == GIVEN and decoding.method == PLAN)
        key = (BY_SOLVER, 0, "") if alone else (instance.problem, len(instance.coords), instance.metric)
        groups.setdefault(key, []).append(index)
    total = sum(_decisions(agent, instance, decoding) for instance in instances)
    outcomes: dict[int, Solution | UserError] = {}
    unit = "node" if agent is None else "decision"
    with tqdm(total=total, desc="solving", unit=unit, unit_scale=True, delay=1, disable=None, leave=False) as bar:
        for (problem, _, _), members in groups.items():
            group = [instances[index] for index in members]
            try:
                if problem == BY_SOLVER:
                    for line in long_work(group):
                        tell(f"solve.py: {line}")
                    found = solve_given(group, progress=bar.update)
                else:
                    assert agent is not None, "without an agent, a solver solves everything"
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


def _decisions(agent: Dreamer | None, instance: RoutingInstance, decoding: Decoding) -> int:
    """What an instance counts as in the progress bar."""
    count = len(instance.coords)
    return count if agent is None else decoding.decisions(rules_of(agent), count)


def _solve_group(
    agent: Dreamer,
    group: Sequence[RoutingInstance],
    decoding: Decoding,
    *,
    imagine: bool,
    progress: Callable[[int], object],
) -> list[Solution | UserError]:
    """The same by an agent, for instances of one problem, size and metric."""
    rules, first = rules_of(agent), group[0]
    if first.metric == GIVEN:
        raise UserError(f"is a matrix of costs, which no network reads; --decode {PLAN} has a solver answer")
    if first.problem != rules.name:
        raise UserError(f"is a {first.problem} instance, and the run was trained on {rules.name}")
    if decoding.method == PLAN:
        raise UserError(f"is no matrix of costs; leave --decode {PLAN} out, or give {NO_RUN} in place of a run")
    begin = time.perf_counter()
    tours = best_tours(agent.behavior, group, decoding, progress=progress)
    seconds = (time.perf_counter() - begin) / len(group)
    pictured = imagined_tours(agent.behavior, group) if imagine else [None] * len(group)
    nearest = nearest_neighbour_lengths(rules, group).tolist()
    found: list[Solution | UserError] = []
    for instance, tour, picture, simple in zip(group, tours, pictured, nearest, strict=True):
        if picture is not None:
            # The model knows rewards as they were stored.
            picture = picture._replace(length=picture.length / agent.reward_scale)
        check_solution(instance, tour)
        length = instance.tour_length(tour)
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


def write(solution: Solution, folder: Path) -> None:
    """Write the solution to `folder` as its problem's files do, and its picture."""
    instance = solution.instance
    write_solution(solution_path(folder, instance), instance, solution.tour)
    comparison = "" if solution.gap is None else f", {solution.gap:.2f} % above the reference"
    title = f"{instance.name}: length {answers.length_text(solution.length, instance.metric)}{comparison}"
    note = f"chosen by {solution.chooser}"
    if not instance.coords.shape[1]:
        note += "; places laid out by costs, not where they are"
    picture = draw_tour(shown_at(instance), solution.tour, title=title, note=note)
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
    run_help = "weights, a run's folder, or a checkpoint file in one; none: no model, a solver answers"
    add("run", type=Path, metavar="CHECKPOINT", help=run_help)
    add("files", type=Path, nargs="*", metavar="FILE", help="TSPLIB, CVRPLIB, .csv, .tsv, .json, .npy or .npz files")
    add("--random", type=positive, metavar="COUNT", help="solve random instances instead of files")
    add("--nodes", type=positive, help="of the random instances, depot included; those of training where not given")
    add("--seed", type=_seed, help="of the random instances and of --decode sample (default 0)")
    decode_help = f"how to look for tours (default greedy); {PLAN}: a solver, for matrices of costs (default of none)"
    add("--decode", choices=(*Decoding.METHODS, PLAN), help=decode_help)
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


def _require_reference(reference: str | None, problems: Collection[str]) -> None:
    """Check that the solver asked for solves instances of these problems.

    Raises:
        ConfigError: it does not.
    """
    for problem in sorted(problems):
        if reference == "lkh" and SOLVERS[problem] != "lkh":
            raise ConfigError(f"LKH solves no {problem} instances here; give --reference pyvrp")


def _cases(arguments: argparse.Namespace, agent: Dreamer | None) -> tuple[list[Case], int]:
    """What is to be solved, and how many files cannot be read."""
    if arguments.random:
        assert agent is not None, "random instances are of a run's problem"
        num_nodes = arguments.nodes or agent.task.num_actions
        drawn = random_instances(agent, arguments.random, num_nodes, arguments.seed)
        return [(Path(each.name), each, None) for each in drawn], 0
    return _read(arguments.files, with_known=arguments.reference is None)


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
    suffixes = sorted({solution_path(folder, solution.instance).suffix for solution in solutions})
    if len(solutions) == 1:
        return f"written: {solution_path(folder, solutions[0].instance)} and its picture (.png)"
    return f"written to {folder}: {len(solutions)} solutions ({' or '.join(suffixes)}) and their pictures (.png)"


def _require_effect(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse options that would change nothing, and fill in the others."""
    if arguments.run == NO_RUN:
        _require_no_model(parser, arguments)
    arguments.decode = arguments.decode or Decoding.method
    draws = arguments.decode == "sample"
    if arguments.samples is not None and not draws:
        parser.error(f"--samples is of --decode sample, and --decode is {arguments.decode}")
    if arguments.nodes is not None and not arguments.random:
        parser.error("--nodes is of --random instances; files have nodes of their own")
    if arguments.seed is not None and not (draws or arguments.random):
        parser.error("--seed is of --random and of --decode sample; nothing is drawn here")
    arguments.samples = arguments.samples or Decoding.samples
    arguments.seed = arguments.seed or 0


def _require_no_model(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse what takes a model where there is none."""
    arguments.decode = arguments.decode or PLAN
    if arguments.decode != PLAN:
        parser.error(f"--decode {arguments.decode} is of a network, and the run is {NO_RUN}; give a run, or {PLAN}")
    if arguments.random:
        parser.error(f"--random draws what a run was trained on, and the run is {NO_RUN}; give files")
    if arguments.trust:
        parser.error(f"--trust is of code that a run names, and the run is {NO_RUN}; leave it out")
    if arguments.imagine:
        parser.error(f"--imagine asks a model, and the run is {NO_RUN}; give a run")


def main(argv: list[str]) -> None:
    """Read the command line and solve; an instance that cannot be solved does not keep the others from it."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.files) == bool(arguments.random):
        parser.error("give either files or --random COUNT")
    _require_effect(parser, arguments)
    with one_line_errors("solve.py", *loading.USER_ERRORS):
        decoding = Decoding(method=arguments.decode, samples=arguments.samples, seed=arguments.seed)
        agent = None
        if arguments.run != NO_RUN:
            agent = load_agent(arguments.run, devices.choose_device(arguments.device), trust=arguments.trust)
            _require_reference(arguments.reference, {rules_of(agent).name})
        found, failures = _cases(arguments, agent)
        if agent is None:
            _require_reference(arguments.reference, {instance.problem for _, instance, _ in found})
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
            solutions = with_references(solutions, arguments.reference)
        trained_on = 0 if agent is None else agent.task.num_actions
        _print(solutions, decoding, as_json=arguments.json, trained_on=trained_on)
        if arguments.out is not None and solutions:
            # Beside a JSON object nothing else goes to stdout.
            (tell if arguments.json else show)(_write_all(solutions, arguments.out))
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
