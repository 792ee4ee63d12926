"""Solve routing instances, from files or drawn at random, with a trained agent: lengths, gaps, tours and pictures.

With --decode plan a solver looks, by the costs that the agent's model expects; or by a matrix of costs in a file, also
without an agent (none). Of an agent that had to learn what moves cost, the table says what tours are expected to cost.

For example:
  python solve.py logdir/tsp_attn-seed0 berlin52.tsp --out solved
  python solve.py logdir/tsp_attn-seed0 --random 1000 --nodes 20 --seed 777 --decode augment --reference lkh
  python solve.py logdir/cvrp_attn-seed0 X-n101-k25.vrp --decode sample --samples 100 --out solved
  python solve.py none examples/minutes.csv ftv33.atsp --out solved
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import config
from config import ConfigError, UserError, one_line_errors
from dreamer import Dreamer
from envs.routing import CVRPInstance
from envs.tasks import RoutingTask
from routing.cvrp import FIELD_INSTANCES, CVRPRules
from routing.files import InstanceError, RoutingInstance, read_instances
from routing.metrics import EXACT, GIVEN, is_paid
from routing.rules import Rules
from routing.solutions import check_solution, known_length, route_counts
from solving import answers, writing
from solving.answers import Solution
from solving.command_line import NO_RUN, make_parser, require_effect
from solving.decoding import (
    WORKING_NUMBERS,
    Decoding,
    best_tours,
    imagined_tours,
    nearest_neighbour_lengths,
    refuse_other_sizes,
    require_room,
)
from solving.expectations import with_forecasts
from solving.given_costs import SOLVERS, long_work, solve_given
from solving.plans import planned
from solving.references import with_references
from solving.worlds import at_home, costs_distances, in_world, require_positions
from system.memory import NotEnoughMemory, is_exhausted, require_memory
from system.terminal import show, tell
from training import devices, loading

CONFIGS = Path(__file__).with_name("configs.yaml")
PLAN = Decoding.PLAN
# The groups of instances that a solver answers, by their own costs or by those of a model.
BY_SOLVER, BY_MODEL = "solver", "model"
# Bytes, by measurement and rounded up: of a random instance and its solution, and of each of its nodes.
INSTANCE_BYTES, NODE_BYTES = 3000, 80

# An instance with the file it came from, and the length that is known of it.
Case = tuple[Path, RoutingInstance, int | float | None]


def load_agent(run: Path, device: torch.device, *, trust: bool = False) -> Dreamer:
    """The trained agent of a run.

    Args:
        run: as in `loading.load_run`.
        device: where it will act.
        trust: as in `loading.load_run`.

    Raises:
        ConfigError: there is no such run, or it is of no problem that can be solved from files.
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
    return agent


def rules_of(agent: Dreamer) -> type[Rules]:
    """The rules of the problem that an agent was trained on."""
    assert isinstance(agent.task, RoutingTask), "load_agent refuses others"
    return agent.task.rules


def random_instances(
    agent: Dreamer, count: int, num_nodes: int, seed: int, *, method: str = Decoding.method
) -> list[RoutingInstance]:
    """Instances of the problem that an agent was trained on, as the field draws them, in the agent's cost world.

    Raises:
        UserError: the agent takes another size, or memory is too small for so many, or for one of that size.
    """
    rules = rules_of(agent)
    if method != PLAN:
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
        if drawn.place is not None:
            each = each._replace(place=drawn.place[row].long().numpy())
        instances.append(at_home(rules, each))
    return instances


def solve(
    agent: Dreamer | None,
    instances: Sequence[RoutingInstance],
    decoding: Decoding,
    *,
    imagine: bool = False,
    processes: int | None = None,
) -> list[Solution | UserError]:
    """A checked solution of each instance, in order, or why it cannot be solved; a progress bar shows long work.

    Args:
        agent: trained on the instances' problem; None where a solver finds every solution by the instances' own costs.
        instances: of any sizes and metrics; those of one size and metric are decoded together. Where the agent learnt
            costs that are no distances, solutions have them as they are in its world.
        decoding: how to look.
        imagine: also show the tour that the model imagines.
        processes: that solvers look in; see `solve_given`.

    Raises:
        IllegalSolution: a tour breaks the rules, which is a defect.
    """
    taken, outcomes = _taken(agent, instances)
    groups: dict[tuple[str, int, str], list[int]] = {}
    for index, instance in taken.items():
        groups.setdefault(_group(agent, instance, decoding), []).append(index)
    total = sum(_decisions(agent, instance, decoding) for instance in taken.values())
    unit = "node" if agent is None or decoding.method == PLAN else "decision"
    with tqdm(total=total, desc="solving", unit=unit, unit_scale=True, delay=1, disable=None, leave=False) as bar:
        for (kind, _, _), members in groups.items():
            group = [taken[index] for index in members]
            try:
                if kind in (BY_SOLVER, BY_MODEL):
                    for line in long_work(group):
                        tell(f"solve.py: {line}")
                if kind == BY_SOLVER:
                    found = solve_given(group, processes=processes, progress=bar.update)
                elif kind == BY_MODEL:
                    assert agent is not None, "without an agent, a solver solves everything"
                    found = _plan_group(agent, group, processes=processes, progress=bar.update)
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


def _taken(
    agent: Dreamer | None, instances: Sequence[RoutingInstance]
) -> tuple[dict[int, RoutingInstance], dict[int, Solution | UserError]]:
    """The instances as they can be solved, and of the others why they cannot."""
    taken: dict[int, RoutingInstance] = {}
    refused: dict[int, Solution | UserError] = {}
    for index, instance in enumerate(instances):
        try:
            if agent is None:
                require_positions(instance)
            elif instance.problem == rules_of(agent).name:
                instance = in_world(rules_of(agent), instance)
        except UserError as error:
            refused[index] = error
        else:
            taken[index] = instance
    return taken, refused


def _group(agent: Dreamer | None, instance: RoutingInstance, decoding: Decoding) -> tuple[str, int, str]:
    """What an instance shares with those that are solved together with it."""
    # Solvers take instances of any sizes beside each other.
    if agent is None or (instance.metric == GIVEN and decoding.method == PLAN):
        return (BY_SOLVER, 0, "")
    if decoding.method == PLAN:
        return (BY_MODEL, 0, instance.problem)
    return (instance.problem, len(instance.coords), instance.metric)


def _decisions(agent: Dreamer | None, instance: RoutingInstance, decoding: Decoding) -> int:
    """What an instance counts as in the progress bar."""
    count = len(instance.coords)
    return count if agent is None or decoding.method == PLAN else decoding.decisions(rules_of(agent), count)


def _plan_group(
    agent: Dreamer,
    group: Sequence[RoutingInstance],
    *,
    processes: int | None,
    progress: Callable[[int], object],
) -> list[Solution | UserError]:
    """The same by a solver in the agent's model, for instances of one problem."""
    rules, forecaster = rules_of(agent), agent.forecaster
    _refuse_other_problems(rules, group[0])
    if forecaster is None:
        raise UserError(
            f"cannot be planned: the run's model does not tell what moves cost, which takes model.loss_scales.reward"
            f" above 0 and model.reward_latent: false; leave --decode {PLAN} out"
        )
    found = planned(forecaster, group, processes=processes, progress=progress)
    return [_looked_at(rules, each) if isinstance(each, Solution) else each for each in found]


def _refuse_other_problems(rules: type[Rules], instance: RoutingInstance) -> None:
    if instance.problem != rules.name:
        raise UserError(f"is a {instance.problem} instance, and the run was trained on {rules.name}")


def _looked_at(rules: type[Rules], solution: Solution) -> Solution:
    """A solution beside what a simple rule finds, where positions tell what moves cost."""
    if is_paid(solution.instance.metric):
        return solution
    (nearest,) = nearest_neighbour_lengths(rules, [solution.instance]).tolist()
    return solution._replace(nearest=nearest)


def _solve_group(
    agent: Dreamer,
    group: Sequence[RoutingInstance],
    decoding: Decoding,
    *,
    imagine: bool,
    progress: Callable[[int], object],
) -> list[Solution | UserError]:
    """The same by the agent's policy, for instances of one problem, size and metric."""
    rules, first = rules_of(agent), group[0]
    if first.metric == GIVEN:
        raise UserError(f"is a matrix of costs, which no network reads; --decode {PLAN} has a solver answer")
    _refuse_other_problems(rules, first)
    begin = time.perf_counter()
    tours = best_tours(agent.behavior, group, decoding, progress=progress)
    seconds = (time.perf_counter() - begin) / len(group)
    pictured = imagined_tours(agent.behavior, group) if imagine else [None] * len(group)
    known = [None] * len(group) if is_paid(first.metric) else nearest_neighbour_lengths(rules, group).tolist()
    found: list[Solution | UserError] = []
    for instance, tour, picture, simple in zip(group, tours, pictured, known, strict=True):
        if picture is not None:
            # The model knows rewards as they were stored.
            picture = picture._replace(length=picture.length / agent.reward_scale)
        check_solution(instance, tour)
        length = instance.tour_length(tour) if instance.is_priced else None
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
        drawn = random_instances(agent, arguments.random, num_nodes, arguments.seed, method=arguments.decode)
        return [(Path(each.name), each, None) for each in drawn], 0
    # What is known of a file are distances.
    by_distance = agent is None or costs_distances(rules_of(agent))
    return _read(arguments.files, with_known=arguments.reference is None and by_distance)


def _print(solutions: Sequence[Solution], decoding: Decoding, *, as_json: bool, agent: Dreamer | None) -> None:
    if as_json:
        show(answers.as_json(solutions))
    elif solutions:
        show(answers.table(solutions))
        if tours := answers.tours(solutions):
            show(f"\n{tours}")
    trained_on = 0 if agent is None else agent.task.num_actions
    for line in answers.warnings(solutions, decoding, trained_on=trained_on):
        tell(f"solve.py: {line}")


def _require_policy(agent: Dreamer, arguments: argparse.Namespace) -> None:
    """Choose how to look where the command line does not, and check that there is a policy where one is asked for.

    Raises:
        ConfigError: the run trained none.
    """
    arguments.decode = arguments.decode or (Decoding.method if agent.trains_policy else PLAN)
    if arguments.decode != PLAN and not agent.trains_policy:
        raise ConfigError(f"{arguments.run} trained no policy (imag_policy: 0) for {arguments.decode}; --decode {PLAN}")
    if arguments.imagine and not agent.trains_policy:
        raise ConfigError(f"{arguments.run} trained no policy (imag_policy: 0) that could imagine; leave --imagine out")
    if arguments.processes is not None and arguments.decode != PLAN:
        raise ConfigError(f"--processes is of solvers, and --decode {arguments.decode} asks none; leave it out")


def main(argv: list[str]) -> None:
    """Read the command line and solve; an instance that cannot be solved does not keep the others from it."""
    parser = make_parser(__doc__)
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.files) == bool(arguments.random):
        parser.error("give either files or --random COUNT")
    require_effect(parser, arguments)
    with one_line_errors("solve.py", *loading.USER_ERRORS):
        agent = None
        if arguments.run != NO_RUN:
            agent = load_agent(arguments.run, devices.choose_device(arguments.device), trust=arguments.trust)
            _require_policy(agent, arguments)
            _require_reference(arguments.reference, {rules_of(agent).name})
            if arguments.reference in ("lkh", "pyvrp") and not rules_of(agent).costs.known:
                reference = arguments.reference
                raise ConfigError(f"--reference {reference} is by true costs, and {arguments.run} knows a log alone")
        decoding = Decoding(method=arguments.decode, samples=arguments.samples, seed=arguments.seed)
        found, failures = _cases(arguments, agent)
        if agent is None:
            _require_reference(arguments.reference, {instance.problem for _, instance, _ in found})
        if arguments.out is not None:
            writing.check_output(arguments.out, [(path, instance) for path, instance, _ in found])
        solutions: list[Solution] = []
        told: set[str] = set()
        instances = [instance for _, instance, _ in found]
        outcomes = solve(agent, instances, decoding, imagine=arguments.imagine, processes=arguments.processes)
        for (path, _, known), outcome in zip(found, outcomes, strict=True):
            if isinstance(outcome, Solution):
                solutions.append(outcome._replace(reference=known))
                continue
            failures += 1
            # All instances of a batch fail for the same reason.
            if (line := f"solve.py: {path} {outcome}") not in told:
                told.add(line)
                tell(line)
        if agent is not None:
            solutions = with_forecasts(agent.forecaster, solutions, agent.calibration.get(decoding.method))
        if arguments.reference in ("lkh", "pyvrp") and solutions:
            solutions = with_references(solutions, arguments.reference)
        _print(solutions, decoding, as_json=arguments.json, agent=agent)
        if arguments.out is not None and solutions:
            costs = None if agent is None else rules_of(agent).costs
            # Beside a JSON object nothing else goes to stdout.
            (tell if arguments.json else show)(writing.write_all(solutions, arguments.out, costs))
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
