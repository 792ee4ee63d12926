"""The ways in which solutions are found: by a policy, of many instances at once or one by one, or by solvers."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from config import UserError
from imagining.behavior import ImagBehavior
from routing.files import RoutingInstance
from routing.metrics import GIVEN, is_paid
from routing.rules import Rules
from routing.solutions import check_solution, route_counts
from solving.answers import NETWORK, Solution
from solving.decoding import (
    Decoding,
    best_tours,
    imagined_tours,
    routing_of,
)
from solving.forecasts import Forecaster
from solving.given_costs import long_work, solve_given
from solving.nearest import nearest_neighbour_lengths, nearest_neighbour_tours
from solving.patience import Patience
from solving.plans import planned
from solving.polishing import polished

# Who chose a plan from which local search got further than from the network's.
NEAREST = "nearest nodes"
# Called with the nodes of the instances just solved, or their share of the work.
Progress = Callable[[float], object]


class Way(ABC):
    """A way to solve instances."""

    @abstractmethod
    def kind(self, instance: RoutingInstance) -> Hashable:
        """What those instances share that are solved together."""

    @abstractmethod
    def solve(self, group: Sequence[RoutingInstance], *, progress: Progress) -> list[Solution | UserError]:
        """A checked solution of each instance of one kind, in order, or why there is none.

        Raises:
            UserError: there is none of any of them.
            IllegalSolution: a solution breaks the rules, which is a defect.
        """

    def long_work(self, group: Sequence[RoutingInstance]) -> list[str]:
        """What there is to say before a group is solved, of instances that take minutes."""
        return []


@dataclass(frozen=True, eq=False)
class BySolver(Way):
    """By a solver and the costs that instances have themselves."""

    processes: int | None

    def kind(self, instance: RoutingInstance) -> Hashable:
        # Solvers take instances of any sizes beside each other.
        return None

    def solve(self, group: Sequence[RoutingInstance], *, progress: Progress) -> list[Solution | UserError]:
        return solve_given(group, processes=self.processes, progress=progress)

    def long_work(self, group: Sequence[RoutingInstance]) -> list[str]:
        return long_work(group)


@dataclass(frozen=True, eq=False)
class ByModel(Way):
    """By a solver and the costs that an agent's model expects.

    Attributes:
        rules: of the agent's problem.
        forecaster: asks the model; None where it does not tell what moves cost.
        processes: as for `solve_given`.
    """

    rules: type[Rules]
    forecaster: Forecaster | None
    processes: int | None

    def kind(self, instance: RoutingInstance) -> Hashable:
        return instance.problem

    def solve(self, group: Sequence[RoutingInstance], *, progress: Progress) -> list[Solution | UserError]:
        refuse_other_problems(self.rules, group[0])
        if self.forecaster is None:
            raise UserError(
                "cannot be planned: the run's model does not tell what moves cost, which takes"
                f" model.loss_scales.reward above 0 and model.reward_latent: false; leave --decode {Decoding.PLAN} out"
            )
        found = planned(self.forecaster, group, processes=self.processes, progress=progress)
        return [self._looked_at(each) if isinstance(each, Solution) else each for each in found]

    def _looked_at(self, solution: Solution) -> Solution:
        """A solution beside what a simple rule finds, where positions tell what moves cost."""
        if is_paid(solution.instance.metric):
            return solution
        (nearest,) = nearest_neighbour_lengths(self.rules, [solution.instance]).tolist()
        return solution._replace(nearest=nearest)

    def long_work(self, group: Sequence[RoutingInstance]) -> list[str]:
        return long_work(group)


@dataclass(frozen=True, eq=False)
class ByPolicy(Way):
    """By an agent's policy, on whole instances.

    Attributes:
        behavior: its actor decides.
        decoding: how to look.
        reward_scale: rewards were multiplied with it before the model saw them.
        imagine: also show the tour that the model imagines.
        patience: when to take the best so far.
    """

    behavior: ImagBehavior
    decoding: Decoding
    reward_scale: float
    imagine: bool
    patience: Patience

    def kind(self, instance: RoutingInstance) -> Hashable:
        return instance.problem, len(instance.coords), instance.metric

    def solve(self, group: Sequence[RoutingInstance], *, progress: Progress) -> list[Solution | UserError]:
        rules, first, count = routing_of(self.behavior).rules, group[0], len(group[0].coords)
        refuse_other_problems(rules, first)
        share = count / self.decoding.decisions(rules, count)
        begin = time.perf_counter()
        self.patience.begin(len(group))
        tours = best_tours(
            self.behavior,
            group,
            self.decoding,
            patience=self.patience,
            progress=lambda decisions: progress(share * decisions),
        )
        seconds = (time.perf_counter() - begin) / len(group)
        pictured = imagined_tours(self.behavior, group) if self.imagine else [None] * len(group)
        known = [None] * len(group) if is_paid(first.metric) else nearest_neighbour_lengths(rules, group).tolist()
        found: list[Solution | UserError] = []
        for instance, tour, picture, simple in zip(group, tours, pictured, known, strict=True):
            if picture is not None:
                # The model knows rewards as they were stored.
                picture = picture._replace(length=picture.length / self.reward_scale)
            check_solution(instance, tour)
            length = instance.tour_length(tour) if instance.is_priced else None
            solution = Solution(instance, tour, length, seconds, imagined=picture, nearest=simple)
            found.append(_too_many_routes(solution) or solution)
        return found


class Looking(Protocol):
    """What looks for a solution of one instance."""

    def run(self, patience: Patience, *, watch: Callable[[], object]) -> Int64[np.ndarray, " L"]:
        """The best solution by the time that patience ends."""


@dataclass(frozen=True, eq=False)
class OneByOne(Way):
    """By an agent's policy, one instance at a time.

    Attributes:
        behavior: its actor decides.
        decoding: how to look.
        patience: when to stop.
        begin: makes what looks for a solution of an instance.
        seconds: for each instance, where `decoding` does not say.
        chosen_by: as the solution is marked.
    """

    behavior: ImagBehavior
    decoding: Decoding
    patience: Patience
    begin: Callable[[ImagBehavior, RoutingInstance, Decoding], Looking]
    seconds: float = math.inf
    chosen_by: str = NETWORK

    def kind(self, instance: RoutingInstance) -> Hashable:
        return None

    def solve(self, group: Sequence[RoutingInstance], *, progress: Progress) -> list[Solution | UserError]:
        found: list[Solution | UserError] = []
        for instance in group:
            try:
                found.append(self._solve(instance, progress))
            except UserError as error:
                found.append(error)
        return found

    def _solve(self, instance: RoutingInstance, progress: Progress) -> Solution | UserError:
        rules, count = routing_of(self.behavior).rules, len(instance.coords)
        refuse_other_problems(rules, instance)
        if self.patience.is_stopped:
            raise UserError("was not begun when it was stopped")
        begin = time.perf_counter()
        self.patience.begin(seconds=self.decoding.seconds or self.seconds)
        counted = 0.0

        def watch() -> None:
            nonlocal counted
            progress(count * (self.patience.share - counted))
            counted = self.patience.share

        tour = self.begin(self.behavior, instance, self.decoding).run(self.patience, watch=watch)
        progress(count * (1 - counted))
        check_solution(instance, tour)
        (nearest,) = nearest_neighbour_lengths(rules, [instance]).tolist()
        seconds = time.perf_counter() - begin
        length = instance.tour_length(tour)
        solution = Solution(instance, tour, length, seconds, nearest=nearest, chosen_by=self.chosen_by)
        return _too_many_routes(solution) or solution


def polish(rules: type[Rules], solution: Solution, *, seconds: float) -> Solution:
    """A solution after so many seconds of local search, where distances tell what moves cost."""
    instance = solution.instance
    if instance.metric == GIVEN or is_paid(instance.metric):
        return solution
    begin = time.perf_counter()
    (simple,) = nearest_neighbour_tours(rules, [instance])
    tour, library, from_own = polished(instance, solution.tour, simple, seconds=seconds)
    solution = solution._replace(seconds=solution.seconds + time.perf_counter() - begin)
    if library is None:
        return solution
    check_solution(instance, tour)
    solution = solution._replace(tour=tour, length=instance.tour_length(tour))
    if instance.demand is None:
        # It began with a tour of its own.
        return solution._replace(chosen_by=library, by_model=False)
    return solution._replace(chosen_by=solution.chosen_by if from_own else NEAREST, polished_by=library)


def refuse_other_problems(rules: type[Rules], instance: RoutingInstance) -> None:
    """Check that an instance is one that an agent's rules and networks are of.

    Raises:
        UserError: it is not.
    """
    if instance.metric == GIVEN and not rules.shows_costs:
        raise UserError(
            "is a matrix of costs, which this run's network does not read (those of task atsp do);"
            f" --decode {Decoding.PLAN} has a solver answer"
        )
    if instance.problem != rules.problem():
        raise UserError(f"is a {instance.problem} instance, and the run was trained on {rules.name}")


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
