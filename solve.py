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
import contextlib
import math
import sys
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import config
from config import ConfigError, UserError, one_line_errors
from dreamer import Dreamer
from envs.routing import ATSPInstance, CVRPInstance, VRPTWInstance
from envs.tasks import RoutingTask
from routing.cvrp import FIELD_INSTANCES
from routing.files import InstanceError, RoutingInstance, read_instances
from routing.matrices import as_costs, without_positions
from routing.metrics import EXACT, GIVEN
from routing.rules import Rules
from routing.solutions import known_length
from routing.windows import TimeWindows
from solving import answers, writing
from solving.answers import Solution
from solving.command_line import NO_RUN, make_parser, require_effect
from solving.decoding import WORKING_NUMBERS, Decoding, is_far, refuse_other_sizes, require_room
from solving.expectations import with_forecasts
from solving.given_costs import SOLVERS
from solving.patience import Patience
from solving.polishing import suited_seconds
from solving.reconstruction import SECONDS, reconstruction, why_no_parts
from solving.references import with_references
from solving.search import TUNING_SECONDS, ActiveSearch, BeamSearch
from solving.times import strange_times
from solving.ways import ByModel, ByPolicy, BySolver, OneByOne, Way, polish
from solving.worlds import at_home, in_world, require_positions, tells_costs
from system.memory import NotEnoughMemory, is_exhausted, require_memory
from system.terminal import show, tell
from training import devices, loading
from training.stopping import StopRequests

CONFIGS = Path(__file__).with_name("configs.yaml")
PLAN = Decoding.PLAN
NETWORKS = (answers.NETWORK, answers.NETWORK_IN_PARTS)
# Names of the ways to solve instances.
BY_SOLVER, BY_MODEL, BY_POLICY, BY_PARTS = "solver", "model", "policy", "parts"
BEAM, ACTIVE = Decoding.SEARCHES
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
    name = agent.task.rules.problem()
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
    drawn_at_once = max(count, FIELD_INSTANCES) if SOLVERS[rules.problem()] == "pyvrp" else count
    needed = 4 * WORKING_NUMBERS + INSTANCE_BYTES * count + NODE_BYTES * num_nodes * drawn_at_once
    work = f"{count:,} random instances of {num_nodes:,} nodes take"
    require_memory(needed, device=torch.device("cpu"), work=work, remedy="ask for fewer, or for smaller ones")
    drawn = rules.field_instances(count, num_nodes, seed=seed)
    width = len(str(count - 1))
    instances = []
    for row, nodes in enumerate(drawn.coords.numpy()):
        each = RoutingInstance(f"random-{row:0{width}}", rules.problem(), nodes, EXACT)
        if isinstance(drawn, ATSPInstance):
            costs = as_costs(drawn.costs[row].numpy())
            each = each._replace(coords=without_positions(num_nodes), metric=GIVEN, costs=costs)
        if isinstance(drawn, CVRPInstance | VRPTWInstance):
            demand, capacity = drawn.demand[row].long().numpy(), int(drawn.capacity[row])
            each = each._replace(demand=demand, capacity=capacity)
        if isinstance(drawn, VRPTWInstance):
            ready, due, service = (part[row].double().numpy() for part in (drawn.ready, drawn.due, drawn.service))
            each = each._replace(windows=TimeWindows(ready, due, service, float(drawn.pace[row])))
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
    requests: StopRequests | None = None,
    by_size: bool = False,
) -> list[Solution | UserError]:
    """A checked solution of each instance, in order, or why it cannot be solved; a progress bar shows long work.

    Args:
        agent: trained on the instances' problem; None where a solver finds every solution by the instances' own costs.
        instances: of any sizes and metrics; those of one size and metric are decoded together. Where the agent learnt
            costs that are no distances, solutions have them as they are in its world.
        decoding: how to look.
        imagine: also show the tour that the model imagines.
        processes: that solvers look in; see `solve_given`.
        requests: asks to end the work with the best so far.
        by_size: whether to solve those in parts that have many more nodes than the agent was trained on.

    Raises:
        IllegalSolution: a tour breaks the rules, which is a defect.
    """
    taken, outcomes = _taken(agent, instances)
    ways = _ways(agent, decoding, imagine=imagine, processes=processes, requests=requests)
    groups: dict[tuple[Way, Hashable], list[int]] = {}
    for index, instance in taken.items():
        way = ways[_which(agent, instance, decoding, by_size=by_size)]
        groups.setdefault((way, way.kind(instance)), []).append(index)
    total = sum(len(instance.coords) for instance in taken.values())
    with tqdm(total=total, desc="solving", unit="node", unit_scale=True, delay=1, disable=None, leave=False) as bar:
        for (way, _), members in groups.items():
            group = [taken[index] for index in members]
            for line in way.long_work(group):
                tell(f"solve.py: {line}")
            try:
                found = way.solve(group, progress=bar.update)
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


def _ways(
    agent: Dreamer | None,
    decoding: Decoding,
    *,
    imagine: bool,
    processes: int | None,
    requests: StopRequests | None,
) -> dict[str, Way]:
    """The ways that there are to solve instances, by the names of `_which`."""
    ways: dict[str, Way] = {BY_SOLVER: BySolver(processes)}
    if agent is not None:
        behavior, patience = agent.behavior, Patience(decoding.seconds or math.inf, requests=requests)
        ways[BY_MODEL] = ByModel(rules_of(agent), agent.forecaster, processes)
        ways[BY_POLICY] = ByPolicy(behavior, decoding, agent.reward_scale, imagine, patience)
        ways[BY_PARTS] = OneByOne(behavior, decoding, patience, reconstruction, SECONDS, answers.NETWORK_IN_PARTS)
        ways[BEAM] = OneByOne(behavior, decoding, patience, BeamSearch)
        ways[ACTIVE] = OneByOne(behavior, decoding, patience, ActiveSearch, TUNING_SECONDS)
    return ways


def _which(agent: Dreamer | None, instance: RoutingInstance, decoding: Decoding, *, by_size: bool) -> str:
    """The name of the way to solve an instance."""
    if agent is None or (decoding.method == PLAN and (instance.metric == GIVEN or instance.windows is not None)):
        # No model plans by the clock.
        return BY_SOLVER
    if decoding.method == PLAN:
        return BY_MODEL
    if decoding.method == Decoding.PARTS or (by_size and _takes_parts(agent, instance)):
        return BY_PARTS
    return decoding.method if decoding.method in Decoding.SEARCHES else BY_POLICY


def _takes_parts(agent: Dreamer, instance: RoutingInstance) -> bool:
    """Whether an instance is so large that parts of it are better solved than all of it, where that can be done."""
    if instance.problem != rules_of(agent).problem() or not is_far(len(instance.coords), agent.task.num_actions):
        return False
    return why_no_parts(agent.behavior, instance) is None


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
            elif instance.problem == rules_of(agent).problem():
                instance = in_world(rules_of(agent), instance)
        except UserError as error:
            refused[index] = error
        else:
            taken[index] = instance
    return taken, refused


def _polished(
    agent: Dreamer, solutions: Sequence[Solution], seconds: float | None, *, patience: Patience
) -> list[Solution]:
    """Solutions after local search: `seconds` of each, or what those need that were solved in parts."""
    found = []
    for solution in tqdm(solutions, desc="polishing", delay=1, disable=None, leave=False):
        given = seconds
        if given is None:
            in_parts = solution.chosen_by == answers.NETWORK_IN_PARTS
            given = suited_seconds(len(solution.instance.coords)) if in_parts else 0.0
        if given and not patience.is_stopped:
            solution = polish(rules_of(agent), solution, seconds=given)
        found.append(solution)
    return found


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
    by_distance = agent is None or tells_costs(rules_of(agent))
    return _read(arguments.files, with_known=arguments.reference is None and by_distance)


def _print(solutions: Sequence[Solution], decoding: Decoding, *, as_json: bool, agent: Dreamer | None) -> None:
    if as_json:
        show(answers.as_json(solutions))
    elif solutions:
        show(answers.table(solutions))
        if tours := answers.tours(solutions):
            show(f"\n{tours}")
    trained_on = 0 if agent is None else agent.task.num_actions
    lines = answers.warnings(solutions, decoding, trained_on=trained_on)
    for line in [*lines, *strange_times([each.instance for each in solutions if each.chosen_by in NETWORKS])]:
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
        agent, by_size = None, arguments.decode is None
        if arguments.run != NO_RUN:
            agent = load_agent(arguments.run, devices.choose_device(arguments.device), trust=arguments.trust)
            _require_policy(agent, arguments)
            _require_reference(arguments.reference, {rules_of(agent).problem()})
            if arguments.reference in ("lkh", "pyvrp") and not rules_of(agent).costs.known:
                reference = arguments.reference
                raise ConfigError(f"--reference {reference} is by true costs, and {arguments.run} knows a log alone")
        decoding = Decoding(
            arguments.decode, arguments.samples, arguments.seed, arguments.seconds, width=arguments.width
        )
        found, failures = _cases(arguments, agent)
        if agent is None:
            _require_reference(arguments.reference, {instance.problem for _, instance, _ in found})
        if arguments.out is not None:
            writing.check_output(arguments.out, [(path, instance) for path, instance, _ in found])
        solutions: list[Solution] = []
        told: set[str] = set()
        instances = [instance for _, instance, _ in found]
        requests = StopRequests()
        one_by_one = agent is not None and any(
            _which(agent, each, decoding, by_size=by_size) in (BY_PARTS, BEAM, ACTIVE) for each in instances
        )
        # Where there is a best so far at any time, Ctrl-C asks for it; elsewhere it ends the program.
        timed = one_by_one or decoding.seconds is not None
        with requests.taken() if timed else contextlib.nullcontext():
            outcomes = solve(
                agent,
                instances,
                decoding,
                imagine=arguments.imagine,
                processes=arguments.processes,
                requests=requests,
                by_size=by_size,
            )
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
            unasked = None if by_size else 0.0
            seconds = unasked if arguments.polish is None else arguments.polish
            solutions = _polished(agent, solutions, seconds, patience=Patience(requests=requests))
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
