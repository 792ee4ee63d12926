"""What training tours have cost above the best ones, by true costs: the price of learning."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from config import ConfigError
from envs.vector import RoutingVectorEnv
from routing.instances import tour_costs
from routing.leftovers import Leftover
from routing.rules import Rules
from routing.solvers import Solver


class Regret:
    """Adds up what episodes have paid, and what the best tours would have.

    The true costs are asked for here alone, for the log: no agent sees them. A solver finds the best tours when the sum
    is asked for; it looks once for each, and what it finds costs some 0.04 % more than the best with 20 nodes.
    """

    def __init__(self, rules: type[Rules]) -> None:
        """Begin with nothing paid.

        Raises:
            ConfigError: there is no solver of the problem.
        """
        if not rules.has_solver:
            raise ConfigError(f"log_regret takes a solver of task {rules.name}, and there is none: set it false")
        self.rules, self.solver = rules, Solver()
        self.paid, self.best = 0.0, 0.0
        self._ended: list[Leftover] = []

    def note(self, env: RoutingVectorEnv, ended: Bool[Tensor, " E"], returns: Float[Tensor, " E"]) -> None:
        """Take the episodes that have just ended, with what they earned. Waits for the device.

        Args:
            env: still shows these episodes.
            ended: which.
            returns: the sum of each running episode's rewards.
        """
        rows = ended.nonzero()[:, 0]
        if len(rows):
            instance, costs = env.ended_episodes(rows)
            self.paid -= float(returns[rows].double().sum())
            self._ended += self.rules.leftovers(instance, self.rules.reset(instance), costs)

    def percent(self) -> dict[str, float]:
        """How much more was paid than the best tours cost, so far; nothing before the first episode has ended."""
        problems = [leftover.problem for leftover in self._ended]
        for problem, solution in zip(problems, self.solver.solve(problems, thorough=False), strict=True):
            self.best += float(tour_costs(problem.costs[None], solution[None])[0])
        self._ended.clear()
        return {"regret": 100 * (self.paid / self.best - 1)} if self.best else {}

    def state_dict(self) -> dict[str, float]:
        """The two sums; what ended since they were last asked for is added first."""
        self.percent()
        return {"paid": self.paid, "best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`."""
        self.paid, self.best = state["paid"], state["best"]
