"""The environments whose answer is one tour: TSP, TSP by a matrix of costs, and pickup and delivery."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from envs.routing_env import RoutingEnv, require_known
from routing.atsp import ATSPInstance, ATSPRules
from routing.costs import EUCLIDEAN, find_costs
from routing.matrix_costs import WHOLE_COSTS
from routing.pickup import PickupRules
from routing.rules import COORDS_LIMIT, MIN_NODES, Rules
from routing.tsp import TSPInstance, TSPRules


class TSPEnv(RoutingEnv):
    """The travelling-salesman problem, registered as `TSP-v0`.

    Args:
        num_nodes: nodes of every instance.
        seed: seeds the first `reset` that gives no seed of its own, and the action space.
        render_mode: None, or "rgb_array".
        cost: what moves cost: a world of `routing.costs`, or your own `module:function`.
        streets: of costs `streets` and `rush`: `helsinki`, or an extract of OpenStreetMap.

    Random instances are uniform in the unit square; `reset(options={"coords": array [N, 2]})` takes your own.
    """

    problem: ClassVar[type[Rules]] = TSPRules

    def __init__(
        self,
        *,
        num_nodes: int = 20,
        seed: int | None = None,
        render_mode: str | None = None,
        cost: str = EUCLIDEAN.name,
        streets: str = "",
    ):
        rules = self.problem.under(find_costs(cost, streets=streets))
        super().__init__(rules, num_nodes=num_nodes, seed=seed, render_mode=render_mode)

    def _own_instance(self, options: dict[str, Any]) -> TSPInstance | None:
        require_known(options, "coords")
        if "coords" not in options:
            return None
        try:
            coords = np.asarray(options["coords"], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options['coords'] is not an array of numbers: {error}") from None
        if coords.shape != (self.num_nodes, 2):
            raise ValueError(
                f"options['coords'] has shape {coords.shape}, and this environment takes {(self.num_nodes, 2)}: "
                f"give [N, 2] positions and make the environment with num_nodes=N, at least {MIN_NODES}"
            )
        # Written so that NaN is refused too.
        impossible = np.flatnonzero(~(np.abs(coords) <= COORDS_LIMIT).all(-1))
        if impossible.size:
            raise ValueError(
                f"options['coords'] is {coords[impossible[0]].tolist()} at node {impossible[0]}; "
                f"coordinates must be finite and within +-{COORDS_LIMIT:g}"
            )
        return TSPInstance(coords=torch.from_numpy(coords.astype(np.float32))[None])

    def _random_instance(self) -> TSPInstance:
        nodes = self.rules.costs.numpy_nodes(self.np_random.uniform, 1, self.num_nodes)
        return TSPInstance(coords=nodes.coords.float(), place=nodes.place)


class ATSPEnv(RoutingEnv):
    """The travelling-salesman problem by a matrix of costs, registered as `ATSP-v0`.

    Args:
        num_nodes: nodes of every instance.
        seed: seeds the first `reset` that gives no seed of its own, and the action space.
        render_mode: None, or "rgb_array"; nodes are drawn on a circle.

    Random instances are of the field's class (see `routing.atsp`); `reset(options={"costs": array [N, N]})` takes your
    own, of moves from each node (row) to each (column), in any unit. What stands from a node to itself is ignored.
    """

    def __init__(self, *, num_nodes: int = 20, seed: int | None = None, render_mode: str | None = None):
        super().__init__(ATSPRules, num_nodes=num_nodes, seed=seed, render_mode=render_mode)

    def _own_instance(self, options: dict[str, Any]) -> ATSPInstance | None:
        require_known(options, "costs")
        if "costs" not in options:
            return None
        try:
            costs = np.array(options["costs"], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options['costs'] is not an array of numbers: {error}") from None
        if costs.shape != (self.num_nodes, self.num_nodes):
            raise ValueError(
                f"options['costs'] has shape {costs.shape}, and this environment takes"
                f" {(self.num_nodes, self.num_nodes)}: give [N, N] costs and make the environment with num_nodes=N, at"
                f" least {MIN_NODES}"
            )
        np.fill_diagonal(costs, 0.0)
        return ATSPInstance.of(torch.from_numpy(costs).float()[None])

    def _random_instance(self) -> ATSPInstance:
        return ATSPRules.of_class(torch.from_numpy(self.np_random.integers(WHOLE_COSTS, size=self._shape)))

    @property
    def _shape(self) -> tuple[int, int, int]:
        return 1, self.num_nodes, self.num_nodes


class PickupEnv(TSPEnv):
    """Pickup and delivery by one vehicle, registered as `Pickup-v0`; arguments and options as for `TSPEnv`."""

    problem = PickupRules

    def __init__(
        self,
        *,
        num_nodes: int = 21,
        seed: int | None = None,
        render_mode: str | None = None,
        cost: str = EUCLIDEAN.name,
        streets: str = "",
    ):
        super().__init__(num_nodes=num_nodes, seed=seed, render_mode=render_mode, cost=cost, streets=streets)
