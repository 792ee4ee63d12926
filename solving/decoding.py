"""Decodes: from networks and instances of one size to the best tours that they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from config import UserError
from envs.routing import MIN_NODES
from imagining.behavior import ImagBehavior
from imagining.routing_imagination import RoutingImagination
from imagining.routing_model import RoutingContext
from parts.views import View
from routing.files import RoutingInstance
from routing.metrics import GIVEN, is_paid, tour_lengths
from routing.rules import Instance, Rules, expand_instance
from routing.solutions import route_counts
from settings.planning import PlanSettings
from solving.forecasts import WORKING_NUMBERS, Forecaster
from solving.frames import pose
from solving.patience import Patience
from system.memory import require_memory
from tools import uniform

# At more than so many times the nodes trained on, tours of whole instances were no better than those of simple rules.
FARTHEST_SIZE = 3
# Starts that `augment` tries in each symmetric image: more would cost more than they find.
MOST_STARTS = 100
SYMMETRIES = 8
# For one instance; so many take hours.
MOST_SAMPLES = 10**7
MOST_WIDTH = 10_000
# Tours of each instance that are looked for between two looks at the clock.
WATCHED_STARTS = 64
ENDLESS = Patience()
# More than a move costs by a model's reckoning, where nobody knows what it truly costs.
DEAREST_MOVE = 1e6


@dataclass(frozen=True)
class Decoding:
    """How tours are looked for.

    Attributes:
        method: `greedy` takes the likeliest actions, `sample` keeps the best of `samples` drawn tours, and `augment`
            the best greedy tour over the 8 symmetries of the square and up to 100 first nodes (of a plan that
            begins at its depot, first customers). `reconstruct` solves parts of a solution again, as long as there is
            time. `beam` keeps the `width` states from which greedy roll-outs end best, and `active` tunes what the
            network made of the instance, by the policy gradient. `plan` asks no network: a solver looks, by what moves
            cost.
        samples: tours drawn of each instance.
        seed: of the draws.
        seconds: for each instance, after which the best so far is taken; None where the method has an end of its own,
            or for `reconstruct` and `active`, which take 20 and 10.
        width: states that `beam` keeps.

    Raises:
        UserError: there is no such method, or nothing to draw, or more than anybody waits for.
    """

    method: str = "greedy"
    samples: int = 128
    seed: int = 0
    seconds: float | None = None
    width: int = 4

    # Those of networks for many instances at once, those for one at a time, the one on parts, and the one without any.
    METHODS: ClassVar[tuple[str, ...]] = ("greedy", "sample", "augment")
    SEARCHES: ClassVar[tuple[str, ...]] = ("beam", "active")
    PARTS: ClassVar[str] = "reconstruct"
    PLAN: ClassVar[str] = "plan"

    def __post_init__(self) -> None:
        every = (*self.METHODS, *self.SEARCHES, self.PARTS, self.PLAN)
        if self.method not in every:
            raise UserError(f"decode is {self.method!r}; choose one of {', '.join(every)}")
        if self.seconds is not None and not self.seconds > 0:
            raise UserError(f"seconds is {self.seconds:g}; looking takes more than none")
        if not 1 <= self.width <= MOST_WIDTH:
            raise UserError(f"width is {self.width:,}; a beam keeps 1 to {MOST_WIDTH:,} states")
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}; at least 1 tour is drawn")
        if self.samples > MOST_SAMPLES:
            raise UserError(f"samples is {self.samples:,}; at most {MOST_SAMPLES:,} tours are drawn")

    @property
    def symmetries(self) -> int:
        """Symmetric images of each instance that are solved."""
        return SYMMETRIES if self.method == "augment" else 1

    def starts(self, num_nodes: int) -> int:
        """Tours of one image."""
        if self.method == "sample" and self.seconds is not None:
            return MOST_SAMPLES
        return {"sample": self.samples, "augment": min(num_nodes, MOST_STARTS)}.get(self.method, 1)

    def first_nodes(self, rules: type[Rules], num_nodes: int, columns: slice = slice(None)) -> list[int]:
        """Where the tours of one image begin, spread over the nodes; `columns` are those asked for.

        Where all begin at node 0: the nodes that they visit next, 0 for the actor's own choice.
        """
        count = self.starts(num_nodes)
        chosen = range(count)[columns]
        if self.method == "sample" and not rules.starts_anywhere:
            return [0] * len(chosen)
        return [index * num_nodes // count for index in chosen]

    def decisions(self, rules: type[Rules], num_nodes: int) -> int:
        """All decisions that an instance takes, at most."""
        return self.symmetries * self.starts(num_nodes) * rules.episode_steps(num_nodes)


def is_far(num_nodes: int, trained_on: int) -> bool:
    """Whether an instance has many more nodes than those trained on, so that a policy does badly on it as a whole."""
    return num_nodes > FARTHEST_SIZE * trained_on


# Tells what Q tours of each of B instances cost; the least is taken.
Judge = Callable[[Int64[np.ndarray, "B Q L"]], Float64[np.ndarray, "B Q"]]


class Imagined(NamedTuple):
    """A tour as the model imagines it, and the length that it expects, in the unit of the instance."""

    tour: Int64[np.ndarray, " L"]
    length: float


def best_tours(
    behavior: ImagBehavior,
    instances: Sequence[RoutingInstance],
    decoding: Decoding,
    *,
    patience: Patience = ENDLESS,
    progress: Callable[[int], object] = lambda decisions: None,
) -> list[Int64[np.ndarray, " L"]]:
    """The best tour found of each instance, as in `routing.solutions`.

    It is the best by the length in the instance's own metric; where positions do not tell what moves cost, by what the
    model expects.

    Args:
        behavior: its actor decides.
        instances: all of the model's problem, of one size and one metric.
        decoding: how to look.
        patience: when to take the best so far; its clock is set.
        progress: called with the decisions just taken.

    Raises:
        UserError: the actor is made for another number of nodes, memory is too small for one instance, or nothing says
            which tour is the best.
    """
    rules, num_nodes = routing_of(behavior).rules, len(instances[0].coords)
    if decoding.symmetries > 1 and not rules.costs.symmetric:
        raise UserError(
            f"costs of {rules.costs.name} have no symmetries that --decode {decoding.method} could turn to; choose"
            f" another way, such as --decode {Decoding.PLAN}"
        )
    refuse_other_sizes(behavior, num_nodes)
    require_room(behavior, num_nodes)
    if num_nodes < MIN_NODES:
        for _ in instances:
            progress(decoding.decisions(rules, num_nodes))
        return [np.arange(num_nodes) for _ in instances]
    generator = sampling(behavior, decoding)
    found: list[Int64[np.ndarray, " L"]] = []
    for rows in pieces(behavior, len(instances), num_nodes):
        posed = pose(instances[rows], next(behavior.actor.parameters()).device).instance
        judge = judge_of(behavior, instances[rows], posed, decoding)
        best = best_by(behavior, posed, decoding, judge, generator=generator, patience=patience, progress=progress)
        found += [without_waiting(tour) for tour in best]
    return found


def sampling(behavior: ImagBehavior, decoding: Decoding) -> torch.Generator | None:
    """What draws actions; None where the likeliest are taken."""
    if decoding.method != "sample":
        return None
    return torch.Generator(next(behavior.actor.parameters()).device).manual_seed(decoding.seed)


def best_by(
    behavior: ImagBehavior,
    posed: Instance,
    decoding: Decoding,
    judge: Judge,
    *,
    generator: torch.Generator | None,
    patience: Patience = ENDLESS,
    progress: Callable[[int], object] = lambda decisions: None,
) -> Int64[np.ndarray, "B S"]:
    """The tour of each instance that a judge finds the cheapest; it waits at its first node where others are longer.

    Args:
        behavior: its actor decides.
        posed: B instances, which fit into memory together.
        decoding: how to look.
        judge: says what tours cost.
        generator: from `sampling`.
        patience: as in `best_tours`.
        progress: as in `best_tours`.
    """
    count, num_nodes = posed.coords.shape[:2]
    rules = routing_of(behavior).rules
    best = np.zeros((count, rules.episode_steps(num_nodes)), dtype=np.int64)
    lowest = np.full(count, np.inf)
    each_state = _numbers_per_state(behavior, num_nodes)
    # Whoever watches the clock has to look at it in time.
    most = WATCHED_STARTS if decoding.seconds is not None else None
    for image in range(decoding.symmetries):
        instance = posed._replace(coords=symmetric(posed.coords, image))
        # Tables are the expensive part, so all the tours of an image share them.
        with torch.no_grad():
            context, tables = static(behavior, instance)
        for columns in chunks(decoding.starts(num_nodes), count * each_state, most=most):
            if patience.is_over and np.isfinite(lowest).all():
                return best
            first = torch.tensor(decoding.first_nodes(rules, num_nodes, columns), device=posed.coords.device)
            found = roll_out(
                behavior,
                context=context,
                tables=tables,
                first=first.expand(count, -1),
                generator=generator,
                progress=progress,
            )
            tours = found.cpu().numpy()
            costs = judge(tours)
            chosen = np.arange(count), costs.argmin(1)
            better = costs[chosen] < lowest
            best[better, : tours.shape[-1]] = tours[chosen][better]
            # Where a longer tour stood before, this one waits at its first node.
            best[better, tours.shape[-1] :] = tours[chosen][better][:, :1]
            lowest[better] = costs[chosen][better]
    return best


def chooser(costs: Float64[np.ndarray, "B N N"]) -> Judge:
    """Judges closed tours by what moves from each node (row) to each (column) cost."""
    rows = np.arange(len(costs))[:, None, None]
    return lambda tours: costs[rows, tours, np.roll(tours, -1, axis=-1)].sum(-1)


def judge_of(
    behavior: ImagBehavior, instances: Sequence[RoutingInstance], posed: Instance, decoding: Decoding
) -> Judge:
    """Judges tours by what can be known of their costs, and by their routes.

    Raises:
        UserError: positions do not tell costs, and the model knows none apart from latents.
    """
    metric, imagination = instances[0].metric, routing_of(behavior)
    if metric == GIVEN:
        return chooser(np.stack([instance.cost_matrix() for instance in instances]))
    if not is_paid(metric):
        coords = np.stack([instance.coords for instance in instances])
        return lambda tours: tour_lengths(coords, tours, metric) + _penalties(instances, tours)
    if decoding.starts(len(instances[0].coords)) == 1:
        # There is one to choose from.
        return lambda tours: np.zeros(tours.shape[:2])
    if not imagination.can_plan:
        raise UserError(
            f"has costs that are unknown, and this run's model does not tell which of several tours is cheap: --decode"
            f" {decoding.method} needs model.reward_latent: false; leave it out"
        )
    expected = chooser(Forecaster(imagination, PlanSettings(), reward_scale=1.0).matrices(posed))
    return lambda tours: expected(tours) + _penalties(instances, tours)


def without_waiting(tour: Int64[np.ndarray, " L"]) -> Int64[np.ndarray, " M"]:
    """A closed tour without the steps at its end in which it waited at its first node."""
    return tour[: np.flatnonzero(tour != tour[0]).max(initial=0) + 1]


@torch.no_grad()
def roll_out(
    behavior: ImagBehavior,
    *,
    context: RoutingContext,
    tables: Any,
    first: Int[Tensor, "B Q"],
    generator: torch.Generator | None,
    progress: Callable[[int], object] = lambda decisions: None,
) -> Int[Tensor, "B Q L"]:
    """Tours of B instances, Q of each; those that are complete before the last wait at their first node.

    Args:
        behavior: as in `best_tours`.
        context: the instances.
        tables: of the pointer actor; None for any other.
        first: as `Decoding.first_nodes` has them.
        generator: draws the actions; None takes the likeliest.
        progress: as in `best_tours`.
    """
    model, actor = routing_of(behavior).model, behavior.actor
    rules = model.rules
    instance = expand_instance(context.instance, first.shape)
    state = rules.reset(instance, first if rules.starts_anywhere else None)
    latent = model.begin(context, state, None) if actor.latent_size else None
    tours = [state.current]
    steps = rules.episode_steps(context.instance.coords.shape[1])
    # A closed tour needs no last step, back to where it began.
    for step in range(steps - 1):
        view = View.of(rules, state, rules.action_mask(state))
        dist = actor(None if latent is None else latent.feat(), tables, view)
        action = dist.mode() if generator is None else dist.sample(uniform(tuple(first.shape), generator))
        if step == 0 and not rules.starts_anywhere:
            action = torch.where(first > 0, first, action)
        state, finished = rules.step(state, action)
        if latent is not None:
            latent = model.observe_state(latent, action, context, state)
        tours.append(action)
        progress(first.numel())
        if not rules.fixed_length and bool(finished.all()):
            break
    progress(first.numel() * (steps + 1 - len(tours)))
    return torch.stack(tours, -1)


def symmetric(coords: Float[Tensor, "B N 2"], image: int) -> Float[Tensor, "B N 2"]:
    """One of the 8 images of the unit square under its symmetries; image 0 is the square itself."""
    x, y = coords.unbind(-1)
    if image & 1:
        x = 1 - x
    if image & 2:
        y = 1 - y
    return torch.stack((y, x) if image & 4 else (x, y), -1)


@torch.no_grad()
def imagined_tours(behavior: ImagBehavior, instances: Sequence[RoutingInstance]) -> list[Imagined | None]:
    """The tour of each instance that the model imagines greedily; None where there are too few nodes for one.

    Args:
        behavior: its actor decides.
        instances: all of one size and one metric.

    Raises:
        UserError: the actor is made for another number of nodes.
    """
    num_nodes = len(instances[0].coords)
    refuse_other_sizes(behavior, num_nodes)
    if num_nodes < MIN_NODES:
        return [None for _ in instances]
    device = next(behavior.actor.parameters()).device
    found: list[Imagined | None] = []
    for rows in pieces(behavior, len(instances), num_nodes):
        posed, units = pose(instances[rows], device, unit=routing_of(behavior).rules.costs.unit)
        greedy = routing_of(behavior).imagine_greedily(behavior.actor, posed, needs_latent=behavior.needs_latent)
        lengths = -greedy.reward.double().sum(-1).cpu().numpy() * units
        pairs = zip(map(without_waiting, greedy.tours.cpu().numpy()), lengths.tolist(), strict=True)
        found += [Imagined(tour, length) for tour, length in pairs]
    return found


def routing_of(behavior: ImagBehavior) -> RoutingImagination:
    """How an agent of routing imagines."""
    assert isinstance(behavior.imagination, RoutingImagination), "tours are of routing"
    return behavior.imagination


def refuse_other_sizes(behavior: ImagBehavior, num_nodes: int) -> None:
    """Check that the actor takes instances of that size.

    Raises:
        UserError: it does not.
    """
    if not behavior.actor.takes(num_nodes):
        raise UserError(
            f"has {num_nodes} nodes, and the run's actor takes {behavior.task.num_actions};"
            " one trained with actor.type: tsp_pointer takes any number"
        )


def why_not_alone(behavior: ImagBehavior, instance: RoutingInstance) -> str | None:
    """Why a policy cannot be asked in the middle of a tour that it did not begin; None where it can."""
    if is_paid(instance.metric):
        return "has costs that are no distances, by which tries cannot be judged; choose another --decode"
    if behavior.actor.latent_size:
        return (
            "cannot be looked at move by move, or in parts, by this run's actor, which reads latents; one trained with"
            " actor.type: tsp_pointer and actor.pointer.latent: 0 reads none"
        )
    return None


def require_room(behavior: ImagBehavior, num_nodes: int) -> None:
    """Check that memory can hold what one instance of that size needs; others can wait, and are solved in pieces.

    Raises:
        NotEnoughMemory: it cannot.
    """
    # A few positions more or less are not worth asking the system for.
    needed = 4 * _numbers_per_instance(behavior, num_nodes)
    if needed > WORKING_NUMBERS:
        device = next(behavior.actor.parameters()).device
        work = f"has {num_nodes:,} nodes, and solving so many takes"
        require_memory(needed, device=device, work=work, remedy="solve it in parts, or where there is more memory")


def _penalties(instances: Sequence[RoutingInstance], tours: Int64[np.ndarray, "B Q L"]) -> Float64[np.ndarray, "B Q"]:
    """What puts a plan with more routes than there are vehicles behind every other; 0 for all others."""
    penalties = np.zeros(tours.shape[:2])
    for row, instance in enumerate(instances):
        if instance.vehicles is not None:
            # No plan is longer than a route of its own for each customer.
            longest = instance.longest_leg() if instance.is_priced else DEAREST_MOVE
            worst = 2 * len(instance.coords) * longest + 1
            penalties[row] = worst * np.maximum(route_counts(tours[row]) - instance.vehicles, 0)
    return penalties


def static(behavior: ImagBehavior, instance: Instance) -> tuple[RoutingContext, Any]:
    """What the networks need of B instances, encoded once."""
    model = routing_of(behavior).model
    # Where the actor reads no latent, the world model's own embeddings are not needed.
    context = model.context(instance, embedded=bool(behavior.actor.latent_size))
    # Where costs are hidden, all tours are planned by what is believed before the first move.
    tables = behavior.actor.tables(model.node_set(instance, model.first_belief(instance)))
    return context, tables


def pieces(behavior: ImagBehavior, count: int, num_nodes: int) -> Iterator[slice]:
    """Slices of `count` instances of that size that fit into memory."""
    return chunks(count, _numbers_per_instance(behavior, num_nodes))


def _numbers_per_instance(behavior: ImagBehavior, num_nodes: int) -> int:
    # Attention scores and the pointer's tables, each of heads x nodes x nodes; activations of a few thousand per node.
    return 6 * behavior.actor.heads * num_nodes**2 + 4096 * num_nodes


def _numbers_per_state(behavior: ImagBehavior, num_nodes: int) -> int:
    return 8 * behavior.actor.heads * num_nodes


def chunks(count: int, numbers_each: int, *, most: int | None = None) -> Iterator[slice]:
    """Slices of `count` rows that fit the working memory, at least one row each and at `most` so many."""
    size = min(max(1, WORKING_NUMBERS // numbers_each), most or count)
    return (slice(begin, begin + size) for begin in range(0, count, size))
