"""Plays episodes by tours that are best in the learnt model: a player, as the policy is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from imagining.routing_imagination import RoutingImagination
from parts.acting import Sight
from routing.leftovers import Leftover
from routing.rules import Instance, State, each_part
from routing.solvers import Solver
from settings.planning import PlanSettings
from tools import uniform

# Costs of which the two directions are on average this much apart, per unit of cost, are taken as equal in quick plans:
# what is left of a symmetric world's symmetry in a network. A solver is six times faster for 100 nodes then.
LEVEL = 0.005


class Planner:
    """Asks the model what every move costs, and a solver for the tour that is best by that.

    It plans where an episode begins, and with a belief about hidden costs again after every move, since each tells
    more. It works on the host, and waits for the device with every step.
    """

    def __init__(self, imagination: RoutingImagination, settings: PlanSettings, *, reward_scale: float = 1.0) -> None:
        """Start no process yet.

        Args:
            imagination: whose model says what moves cost.
            settings: what to plan by.
            reward_scale: what rewards were multiplied by before the model saw them.
        """
        rules = imagination.rules
        self.imagination, self.rules, self.settings = imagination, rules, settings
        self.reward_scale = reward_scale
        self.replans = bool(imagination.belief_size)
        self.solver = Solver(processes=settings.processes)

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        """What `act` carries from step to step, before the first step: nobody has a plan.

        `moves` [E, L] are the nodes of each plan, the one where it was made first, and `made` counts those of them
        that are behind; -1 stands where there is no plan.
        """
        steps = self.rules.episode_steps(self.imagination.model.task.num_actions) + 1
        moves = torch.full((num_envs, steps), -1, dtype=torch.long, device=torch.device("cpu"))
        made = torch.zeros(num_envs, dtype=torch.long, device=torch.device("cpu"))
        return {"moves": moves, "made": made, **self.imagination.first_notes(num_envs)}

    @torch.no_grad()
    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, " E"], dict[str, Any]]:
        """The next node of every environment's plan; a plan is made where there is none, or none that fits.

        Args:
            sight: what the environments show.
            state: from `initial_state` or the last call.
            generator: collecting, plans are made quickly, by `optimism` or a member drawn of the ensemble; None: they
                are made thoroughly, by `pessimism`.
        """
        instance, now = self.rules.restore(sight.obs)
        notes, belief = dict(state), None
        if self.imagination.belief_size:
            belief = notes["belief"] = self.imagination.believe(sight, instance, state["belief"])
        # A checkpoint may have brought them to the device.
        moves, made = state["moves"].cpu().clone(), state["made"].cpu().clone()
        current, rows = now.current.cpu(), torch.arange(len(made), device=made.device)
        # Whoever moved elsewhere meanwhile, by a random move perhaps, needs another plan.
        needed = sight.is_first.cpu() | (moves[rows, made] != current)
        if self.replans:
            needed[:] = True
        needed = needed.nonzero()[:, 0]
        if len(needed):
            there = needed.to(now.current.device)
            chosen, left = (each_part(part, lambda value: value[there]) for part in (instance, now))
            costs = self.costs(chosen, None if belief is None else belief[there], generator=generator)
            plans = self.solved(chosen, left, costs, thorough=generator is None)
            moves[needed] = _filled(current[needed], plans, length=moves.shape[1])
            made[needed] = 0
        # Where an episode is over, the last node of its plan stays.
        made = (made + 1).clamp(max=moves.shape[1] - 1)
        action = moves[rows, made].to(now.current.device)
        return action, {**notes, "moves": moves, "made": made}

    def costs(
        self, instance: Instance, belief: Float[Tensor, "B L"] | None, *, generator: torch.Generator | None = None
    ) -> Float64[np.ndarray, "B N N"]:
        """What every move from a node (row) to a node (column) costs, as plans take it.

        Args:
            instance: B of them.
            belief: about hidden costs; None where nothing is hidden.
            generator: as for `act`.
        """
        each = -self.imagination.model.predict_moves_each(instance, belief)
        if generator is None:
            costs = apart(each, self.settings.pessimism)
        elif self.settings.thompson:
            member = (uniform((each.shape[1],), generator) * len(each)).long()
            costs = each[member, torch.arange(each.shape[1], device=each.device)]
        else:
            costs = apart(each, -self.settings.optimism)
        return costs.nan_to_num(0.0, 0.0, 0.0).double().cpu().numpy()

    def expected_legs(self, instance: Instance, tours: Int[Tensor, "B L"]) -> Float[Tensor, "K B L"] | None:
        """What each member of the ensemble expects the moves of closed tours to cost, in the world's unit.

        None of a lone head, which has no spread, and where a belief expects something else after every move.
        """
        model = self.imagination.model
        if self.imagination.belief_size or model.num_members == 1:
            return None
        return -model.predict_legs_each(instance, None, tours) / self.reward_scale

    def plan(
        self, instance: Instance, state: State, belief: Float[Tensor, "B L"] | None = None
    ) -> list[Int64[np.ndarray, " K"]]:
        """The nodes that the best plan visits from each state [B] on, home included."""
        return self.solved(instance, state, self.costs(instance, belief))

    def solved(
        self, instance: Instance, state: State, costs: Float64[np.ndarray, "B N N"], *, thorough: bool = True
    ) -> list[Int64[np.ndarray, " K"]]:
        """The nodes that are visited from each state [B] on, home included, at the least costs that the solver finds.

        One that is not `thorough` takes a fraction of the time, and misses the best tour now and then.
        """
        if not thorough:
            costs = levelled(costs)
        leftovers: list[Leftover] = self.rules.leftovers(instance, state, costs)
        solutions = self.solver.solve([leftover.problem for leftover in leftovers], thorough=thorough)
        return [leftover.moves(solution) for leftover, solution in zip(leftovers, solutions, strict=True)]

    def close(self) -> None:
        """End the processes that plan."""
        self.solver.close()


def apart(each: Float[Tensor, "K B M N"], deviations: float) -> Float[Tensor, "B M N"]:
    """The mean of an ensemble, and so many of its standard deviations."""
    mean = each.mean(0)
    return mean if deviations == 0 else mean + deviations * each.std(0, correction=0)


def levelled(costs: Float64[np.ndarray, "B N N"]) -> Float64[np.ndarray, "B N N"]:
    """The mean over both directions where they hardly differ in an instance, and the costs themselves elsewhere."""
    back = costs.swapaxes(1, 2)
    apart_by, size = (np.abs(each).sum((1, 2)) for each in (costs - back, costs))
    return np.where((apart_by <= LEVEL * size)[:, None, None], (costs + back) / 2, costs)


def _filled(current: Int[Tensor, " R"], plans: list[Int64[np.ndarray, " K"]], *, length: int) -> Int[Tensor, "R L"]:
    """Plans in rows of one length, each from where it was made; they stay where they end."""
    filled = np.empty((len(plans), length), dtype=np.int64)
    filled[:, 0] = current.numpy()
    for row, plan in zip(filled, plans, strict=True):
        row[1 : len(plan) + 1] = plan
        row[len(plan) + 1 :] = plan[-1]
    return torch.from_numpy(filled)
