"""Improves solutions of instances larger than those trained on: parts are cut out, and solved again by the policy.

The policy sees each part as an instance of its own size, in a frame of its own, and a part is kept only if it became
shorter. The rest of a tour is one forced move from the end of a piece to its mate, so that any region of a tour can be
cut out, not only sections (the revisers of Ye et al. 2024, "GLOP", are of sections). Of plans, whole routes are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor
from torch.nn import functional

from config import UserError
from envs.routing import TSPInstance
from imagining.behavior import ImagBehavior
from parts.views import View
from routing.files import RoutingInstance
from routing.instances import scale_to_unit_square
from routing.metrics import GIVEN, leg_lengths, plane
from routing.rules import expand_instance
from routing.solutions import join_routes, route_counts, split_routes
from solving.cuts import FEWEST_NODES, Cut, choose_apart, neighbourhood, random_insertion, sections, splice
from solving.decoding import (
    SYMMETRIES,
    Decoding,
    best_tours,
    is_far,
    routing_of,
    static,
    symmetric,
    why_not_alone,
)
from solving.nearest import nearest_neighbour_tours
from solving.patience import Patience
from tools import uniform

# Seconds for each instance, where nobody says how many.
SECONDS = 20.0
# Ends of pieces that a region is solved from.
MOST_STARTS = 4
# A pass over all sections that shortens a tour by less than this share is the last.
LEAST_GAIN = 0.003
# Nodes of an instance for each region that is solved beside others.
NODES_A_REGION, MOST_REGIONS = 200, 16
# So often the likeliest moves are taken everywhere; later ones are drawn, since those would come out the same.
TIMES_GREEDY = 2
AUGMENT = Decoding(method="augment")
SAMPLES = 256
# Customers of a part of a plan, at most, as shares of those trained on.
PLAN_SIZES = 0.75, 2.0


class Reconstruction(ABC):
    """Solves parts of one instance again, as long as there is time; one kind for each kind of solution."""

    def __init__(self, behavior: ImagBehavior, instance: RoutingInstance, *, seed: int) -> None:
        """Take an instance.

        Args:
            behavior: its actor decides.
            instance: of the problem that it was trained on.
            seed: of what is drawn.
        """
        self.behavior, self.instance = behavior, instance
        # Nodes of a part: as many as the policy was trained on.
        self.size = behavior.task.num_actions
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator(next(behavior.actor.parameters()).device).manual_seed(seed)

    @abstractmethod
    def start(self) -> Int64[np.ndarray, " L"]:
        """A solution to begin with."""

    @abstractmethod
    def improved(self, tour: Int64[np.ndarray, " L"]) -> Int64[np.ndarray, " K"]:
        """A solution that is not longer, after some of its parts were solved again."""

    def run(self, patience: Patience, *, watch: Callable[[], object] = lambda: None) -> Int64[np.ndarray, " L"]:
        """The best solution by the time that patience ends.

        Args:
            patience: its clock is set.
            watch: called after each attempt.
        """
        tour = self.start()
        while not patience.is_over and self.is_worth_it:
            tour = self.improved(tour)
            watch()
        return tour

    @property
    def is_worth_it(self) -> bool:
        """Whether there are parts at all."""
        return True


def why_no_parts(behavior: ImagBehavior, instance: RoutingInstance) -> str | None:
    """Why parts of an instance cannot be solved apart; None where they can."""
    if instance.metric == GIVEN:
        return "is a matrix of costs, which has no regions that could be cut out; choose another --decode"
    return why_not_alone(behavior, instance)


def reconstruction(behavior: ImagBehavior, instance: RoutingInstance, decoding: Decoding) -> Reconstruction:
    """What solves parts of an instance again; of the decoding it takes the seed.

    Raises:
        UserError: the policy cannot, or distances do not tell what moves cost.
    """
    if (reason := why_no_parts(behavior, instance)) is not None:
        raise UserError(reason)
    kind = TourReconstruction if routing_of(behavior).rules.starts_anywhere else PlanReconstruction
    return kind(behavior, instance, seed=decoding.seed)


class TourReconstruction(Reconstruction):
    """Of tours: first sections of the whole tour at once, as long as that pays, then regions one after another."""

    def __init__(self, behavior: ImagBehavior, instance: RoutingInstance, *, seed: int) -> None:
        super().__init__(behavior, instance, seed=seed)
        self.plane = plane(instance.coords, instance.metric)
        count = len(instance.coords)
        self.size = min(self.size, count // 2)
        self._by_sections = True
        # How often a region around each node was solved.
        self._visits = np.zeros(count)

    @property
    def is_worth_it(self) -> bool:
        return self.size >= FEWEST_NODES

    def start(self) -> Int64[np.ndarray, " N"]:
        """The shorter of an insertion's tour and, up to a few times the nodes trained on, the policy's own."""
        tour = random_insertion(self.plane, self.random)
        if is_far(len(tour), self.behavior.task.num_actions):
            return tour
        (own,) = best_tours(self.behavior, [self.instance], AUGMENT)
        return min(tour, own, key=self.instance.tour_length)

    def improved(self, tour: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        if not self._by_sections:
            return self._solved_again(tour, choose_apart(self._regions(tour), tour))
        before = self.instance.tour_length(tour)
        offset = int(self.random.integers(len(tour)))
        tour = self._solved_again(tour, sections(tour, self.size, offset=offset))
        self._by_sections = self.instance.tour_length(tour) < (1 - LEAST_GAIN) * before
        return tour

    def _regions(self, tour: Int64[np.ndarray, " N"]) -> list[Cut]:
        """The surroundings of nodes that were looked at least often."""
        found: list[Cut] = []
        wanted = min(MOST_REGIONS, max(1, len(tour) // NODES_A_REGION))
        for _ in range(wanted):
            centre = int(self.random.choice(np.flatnonzero(self._visits == self._visits.min())))
            away = np.square(self.plane - self.plane[centre]).sum(-1)
            near = np.argpartition(away, self.size - 1)[: self.size]
            # What lies at a region's border is looked at again, in the middle of another.
            self._visits[near[np.argsort(away[near])[: max(1, self.size // 3)]]] += 1
            cut = neighbourhood(tour, near)
            if cut is not None:
                found.append(cut)
        return found

    def _solved_again(self, tour: Int64[np.ndarray, " N"], cuts: Sequence[Cut]) -> Int64[np.ndarray, " N"]:
        if not cuts:
            return tour
        generator = self.generator if self._visits.min() >= TIMES_GREEDY else None
        orders = solve_cuts(self.behavior, self.plane, cuts, random=self.random, generator=generator)
        for cut, tried in zip(cuts, orders, strict=True):
            own = np.arange(len(cut.nodes))[None]
            lengths = self._free_length(cut, np.concatenate((own, tried)))
            best = int(lengths.argmin())
            if best:
                tour = splice(tour, cut, tried[best - 1])
        return tour

    def _free_length(self, cut: Cut, orders: Int64[np.ndarray, "Q K"]) -> Float64[np.ndarray, " Q"]:
        positions = self.instance.coords[cut.nodes[orders]]
        legs = leg_lengths(positions, np.roll(positions, -1, axis=1), self.instance.metric)
        return np.where(cut.free(orders), legs, 0.0).sum(-1)


@torch.no_grad()
def solve_cuts(
    behavior: ImagBehavior,
    plane: Float[np.ndarray, "N 2"],
    cuts: Sequence[Cut],
    *,
    random: np.random.Generator,
    generator: torch.Generator | None = None,
) -> list[Int64[np.ndarray, "Q K"]]:
    """Closed orders of the nodes of each cut, from several ends of its pieces and under all 8 symmetries.

    Args:
        behavior: its actor decides.
        plane: positions of all nodes.
        cuts: of one tour.
        random: draws the ends, where there are many.
        generator: draws the moves; None takes the likeliest.
    """
    device = next(behavior.actor.parameters()).device
    coords, valid, mate = _padded(plane, cuts)
    begin = np.stack([_starts(cut, random) for cut in cuts])
    images = torch.cat([symmetric(torch.from_numpy(coords).float().to(device), image) for image in range(SYMMETRIES)])
    padding = None if valid.all() else torch.from_numpy(valid).to(device).repeat(SYMMETRIES, 1)
    first, mates = (torch.from_numpy(part).to(device).repeat(SYMMETRIES, 1) for part in (begin, mate))
    instance = TSPInstance(coords=images, valid=padding)
    found = _roll_out_cuts(behavior, instance, mates=mates, first=first, generator=generator)
    # Images of one cut stand next to each other.
    orders = found.unflatten(0, (SYMMETRIES, len(cuts))).transpose(0, 1).flatten(1, 2).cpu().numpy()
    return [each[:, : len(cut.nodes)] for cut, each in zip(cuts, orders, strict=True)]


def _padded(
    plane: Float[np.ndarray, "N 2"], cuts: Sequence[Cut]
) -> tuple[Float64[np.ndarray, "B K 2"], Bool[np.ndarray, "B K"], Int64[np.ndarray, "B K"]]:
    """Positions of the nodes of each cut in a unit square of its own, which of them there are, and their mates."""
    longest = max(len(cut.nodes) for cut in cuts)
    coords = np.zeros((len(cuts), longest, 2))
    valid = np.zeros((len(cuts), longest), dtype=bool)
    mate = np.full((len(cuts), longest), -1)
    for row, cut in enumerate(cuts):
        count = len(cut.nodes)
        coords[row, :count] = scale_to_unit_square(plane[cut.nodes])
        valid[row, :count], mate[row, :count] = True, cut.mate
    return coords, valid, mate


def _starts(cut: Cut, random: np.random.Generator) -> Int64[np.ndarray, " S"]:
    """Ends of pieces to begin at, going on at their mates first of all: as many for each cut."""
    ends = random.permutation(np.flatnonzero(cut.mate >= 0))
    return np.resize(ends, MOST_STARTS)


def _roll_out_cuts(
    behavior: ImagBehavior,
    instance: TSPInstance,
    *,
    mates: Int[Tensor, "B K"],
    first: Int[Tensor, "B Q"],
    generator: torch.Generator | None,
) -> Int[Tensor, "B Q K"]:
    """The nodes of B cuts in the order in which moves visit them; from an end, the mate comes next."""
    rules = routing_of(behavior).rules
    context, tables = static(behavior, instance)
    state = rules.reset(expand_instance(context.instance, first.shape), first)
    visited = [first]
    for _ in range(mates.shape[-1] - 1):
        mask = rules.action_mask(state)
        mate = mates.gather(1, state.current)
        at = mate.clamp(min=0)[..., None]
        # Whoever begins at an end, or comes there from within its piece, goes on where the rest of the tour leads.
        forced = (mate[..., None] >= 0) & mask.gather(-1, at)
        only = functional.one_hot(at.squeeze(-1), mask.shape[-1]).bool()
        mask = torch.where(forced, only & mask, mask)
        dist = behavior.actor(None, tables, View.of(rules, state, mask))
        action = dist.mode() if generator is None else dist.sample(uniform(tuple(first.shape), generator))
        state, _ = rules.step(state, action)
        visited.append(action)
    return torch.stack(visited, -1)


class PlanReconstruction(Reconstruction):
    """Of plans: a route and those next to it are the plan of a smaller instance, which is solved by `augment`."""

    def __init__(self, behavior: ImagBehavior, instance: RoutingInstance, *, seed: int) -> None:
        super().__init__(behavior, instance, seed=seed)
        self.plane = plane(instance.coords, instance.metric)
        self._visits = np.zeros(len(instance.coords))

    def start(self) -> Int64[np.ndarray, " L"]:
        """The shortest of the plan that goes to the nearest customer each time, and the policy's."""
        (nearest,) = nearest_neighbour_tours(routing_of(self.behavior).rules, [self.instance])
        try:
            (own,) = best_tours(self.behavior, [self.instance], Decoding())
        except UserError:
            # It does not fit into memory at once.
            return nearest
        return min(nearest, own, key=self._cost)

    def improved(self, tour: Int64[np.ndarray, " L"]) -> Int64[np.ndarray, " K"]:
        routes = [route for route in split_routes(tour) if len(route)]
        chosen = self._neighbours(routes)
        part = np.concatenate([routes[index] for index in chosen])
        nodes = np.append(0, part)
        assert self.instance.demand is not None, "plans are of demands"
        windows = self.instance.windows
        smaller = self.instance._replace(
            coords=self.instance.coords[nodes],
            demand=self.instance.demand[nodes],
            windows=None if windows is None else windows.of(nodes),
            vehicles=None,
            reference=None,
        )
        (found,) = best_tours(self.behavior, [smaller], self._decoding())
        again = [nodes[route] for route in split_routes(found) if len(route)]
        kept = [route for index, route in enumerate(routes) if index not in set(chosen)]
        candidate = join_routes([route.tolist() for route in (*kept, *again)])
        return min(tour, candidate, key=self._cost)

    def _decoding(self) -> Decoding:
        if self._visits[1:].min() < TIMES_GREEDY:
            return AUGMENT
        return Decoding(method="sample", samples=SAMPLES, seed=int(self.random.integers(2**31)))

    def _cost(self, tour: Int64[np.ndarray, " L"]) -> tuple[int, float]:
        """Routes above the number of vehicles, then length."""
        (routes,) = route_counts(tour[None]).tolist()
        most = routes if self.instance.vehicles is None else self.instance.vehicles
        return max(0, routes - most), self.instance.tour_length(tour)

    def _neighbours(self, routes: Sequence[Int64[np.ndarray, " _"]]) -> list[int]:
        """Routes that pass closest to a customer that was looked at least often, up to the nodes trained on."""
        customers = np.concatenate(routes)
        visits = self._visits[customers]
        centre = int(self.random.choice(customers[visits == visits.min()]))
        away = np.square(self.plane - self.plane[centre]).sum(-1)
        order = np.argsort([away[route].min() for route in routes], kind="stable")
        # Another number of routes each time, so that what is stuck with one comes loose with another.
        most = self.size * self.random.uniform(*PLAN_SIZES)
        chosen: list[int] = []
        count = 0
        for index in order.tolist():
            if len(chosen) >= 2 and count + len(routes[index]) > most:
                break
            chosen.append(index)
            count += len(routes[index])
        self._visits[np.concatenate([routes[index] for index in chosen])] += 1
        return chosen
