"""How good an agent's greedy tours are, beside reference tours."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from parts.acting import Sight
from routing.rules import Instance, each_part
from training.agent import POLICY, Player, Trained
from training.evaluation import Report, interval


class Evaluation(NamedTuple):
    """Instances of a routing problem with the costs of their reference tours, and what those depend on in secret."""

    instance: Instance
    references: Float[np.ndarray, " I"]
    factors: Float[Tensor, "I F"] | None = None

    @property
    def coords(self) -> Float[Tensor, "I N 2"]:
        """Where the nodes lie."""
        return self.instance.coords

    def first(self, count: int) -> Evaluation:
        """The first instances, so many at most."""
        factors = None if self.factors is None else self.factors[:count]
        return Evaluation(each_part(self.instance, lambda part: part[:count]), self.references[:count], factors)


def percent_above(cost: float, reference: float) -> float:
    """How much more than a reference a cost is, in percent of the reference's size; NaN where that is 0.

    Where rewards are earned costs are negative, and to earn less than the reference is positive all the same.
    """
    if reference == 0:
        return math.nan
    return math.copysign(100.0, reference) * (cost / reference - 1)


@runtime_checkable
class Forecasting(Player, Protocol):
    """A player that goes by what an ensemble expects: `expected_legs` tells what each member expects tours to cost.

    It gives None where there is no ensemble, or where what it expects changes on the way.
    """

    def expected_legs(self, instance: Instance, tours: Int[Tensor, "B L"]) -> Float[Tensor, "K B L"] | None: ...


class Result(NamedTuple):
    """How an agent did on an `Evaluation`. Closed tours from their first node; it is repeated where a tour is short."""

    lengths: Float[Tensor, " I"]
    tours: Int[Tensor, "I L"]
    gap: float


def evaluate(player: Player, task: RoutingTask, evaluation: Evaluation, *, device: torch.device) -> Result:
    """Greedy tours of every instance, each action checked against the rules.

    Args:
        player: acts by its mode; nothing random is drawn.
        task: the problem.
        evaluation: instances and the lengths to compare with.
        device: where the agent lives.
    """
    instance = each_part(evaluation.instance, lambda part: part.to(device))
    count, num_nodes, _ = instance.coords.shape
    env = RoutingVectorEnv(
        task.rules,
        num_envs=count,
        num_nodes=num_nodes,
        device=device,
        instances=instance,
        factors=evaluation.factors,
        check_actions=True,
    )
    obs, info = env.reset()
    state = player.initial_state(count)
    returns = torch.zeros(count, device=device)
    running = torch.ones(count, dtype=torch.bool, device=device)
    first = obs["current_node"]
    visited = [first]
    for _ in range(task.rules.episode_steps(num_nodes)):
        if not task.rules.fixed_length and not bool(running.any()):
            break
        action, state = player.act(Sight.of(obs, info), state, generator=None)
        obs, reward, terminated, _, info = env.step(action)
        # Rows that have ended begin their instance again, which counts no more.
        returns += reward.masked_fill(~running, 0.0)
        visited.append(torch.where(running, action, first))
        running = running & ~terminated
    lengths = -returns
    gap = percent_above(float(lengths.double().mean()), float(evaluation.references.mean()))
    return Result(lengths=lengths, tours=torch.stack(visited[:-1], 1), gap=gap)


def doubt(player: Player, task: RoutingTask, instance: Instance, tours: Int[Tensor, "I L"]) -> dict[str, float]:
    """How far a player's ensemble is apart about the moves of tours, and how wrong it is about them.

    `spread` is the mean standard deviation of its members, `error` the mean absolute error of their mean, both in
    percent of the moves' mean cost. Nothing where costs hide something, or the player has no ensemble.

    Args:
        player: whose expectations these are.
        task: knows the true costs.
        instance: I of them.
        tours: closed ones; to stay at a node is no move.
    """
    costs = task.rules.costs
    if costs.hidden or not isinstance(player, Forecasting):
        return {}
    expected = player.expected_legs(instance, tours)
    if expected is None:
        return {}
    ends = tours.roll(-1, -1)
    # Each step of all tours together: a move of several per instance is nothing that cost worlds take.
    legs = zip(tours.unbind(-1), ends.unbind(-1), strict=True)
    true = torch.stack([costs.between(instance, begin, end) for begin, end in legs], -1)
    # Whoever stays pays nothing and expects nothing else, so that the ratios are those of moves alone.
    mean = float(true.double().mean().abs())
    spread = expected.std(0, correction=0).double().mean()
    error = (expected.mean(0) - true).abs().double().mean()
    return {
        name: 100 * float(each) / mean if mean else math.nan for name, each in (("spread", spread), ("error", error))
    }


class RoutingEvaluator:
    """Greedy tours of fixed instances, by their gap to the reference."""

    def __init__(
        self,
        task: RoutingTask,
        *,
        validation: Evaluation,
        test: Evaluation,
        device: torch.device,
        pictures: Callable[[Instance], dict[str, np.ndarray]] | None = None,
        players: Sequence[str] = (POLICY,),
        planned: int | None = None,
    ) -> None:
        """Take the instances.

        Args:
            task: the problem.
            validation: instances of every evaluation during training.
            test: those of the final one.
            device: where the agent lives.
            pictures: draws what the agent imagines of the first instance.
            players: whose tours are judged, by the names that the agent gives them.
            planned: validation instances that whoever is not the policy plays; None for all.
        """
        self.task, self.device, self.pictures, self.players = task, device, pictures, tuple(players)
        self._validation, self._test, self._planned = validation, test, planned

    def validate(self, agent: Trained) -> Report:
        """Tours of the validation instances."""
        return self._report(agent, self._validation, planned=self._planned)

    def test(self, agent: Trained) -> Report:
        """Tours of the test instances."""
        return self._report(agent, self._test, planned=None)

    def _report(self, agent: Trained, evaluation: Evaluation, *, planned: int | None) -> Report:
        values: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        summaries = []
        for name in self.players:
            judged, prefix = evaluation, ""
            if name != POLICY:
                judged, prefix = evaluation if planned is None else evaluation.first(planned), f"{name}_"
            begin = time.perf_counter()
            result = evaluate(agent.players[name], self.task, judged, device=self.device)
            seconds = (time.perf_counter() - begin) / len(result.lengths)
            costs, first = self.task.rules.costs, float(result.lengths[0])
            title = f"length {first:.3f}{costs.measured(first)}, reference {judged.references[0]:.3f}"
            tour = result.tours[0].cpu().numpy()
            pictures[f"{prefix}tour"] = costs.picture(judged.instance, tour, title=title, factors=judged.factors)
            mean = float(result.lengths.mean())
            values |= {f"{prefix}gap": result.gap, f"{prefix}return": -mean}
            summary = (
                f"{len(result.lengths)} instances, mean length {mean:.4f}{interval(result.lengths)}"
                f"{costs.measured(mean)}, gap {result.gap:.2f} % to the reference"
            )
            if name != POLICY:
                values[f"{prefix}seconds"] = seconds
                instance = each_part(judged.instance, lambda part: part.to(self.device))
                if doubts := doubt(agent.players[name], self.task, instance, result.tours):
                    values |= {f"{prefix}{key}": value for key, value in doubts.items()}
                    summary += (
                        f", heads are {doubts['spread']:.2f} % apart about its moves, and wrong by"
                        f" {doubts['error']:.2f} %"
                    )
            summaries.append(summary)
        if self.pictures is not None:
            pictures |= self.pictures(evaluation.instance)
        if len(summaries) > 1:
            summaries = [f"{name}: {summary}" for name, summary in zip(self.players, summaries, strict=True)]
        return Report(values, pictures, "; ".join(summaries))
