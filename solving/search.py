"""Searches with a policy for one instance at a time: a beam that looks ahead by roll-outs, and a policy that is tuned.

Both keep to what the rules allow, since all that they try are roll-outs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from config import UserError
from envs.routing import MIN_NODES
from imagining.behavior import ImagBehavior
from imagining.routing_model import RoutingContext
from parts.actors import Actor
from parts.views import View
from routing.files import RoutingInstance
from routing.rules import State, each_part, expand_instance
from solving.decoding import (
    SYMMETRIES,
    Decoding,
    Judge,
    judge_of,
    require_room,
    roll_out,
    routing_of,
    static,
    symmetric,
    why_not_alone,
    without_waiting,
)
from solving.frames import pose
from solving.patience import Patience

# Children of each state that a beam looks at.
EXPANSION = 4
# Seconds that a policy is tuned for, where nobody says how many.
TUNING_SECONDS = 10.0
# Tours that are drawn between two changes of the policy.
DRAWN = 64
LEARNING_RATE = 0.02
# How much the best tour so far is imitated beside the policy gradient.
IMITATION = 0.03


class Posed(NamedTuple):
    """An instance as networks know it, under one symmetry: what they need of it, and who judges its tours."""

    context: RoutingContext
    tables: Any
    judge: Judge


class Search(ABC):
    """Looks for the best solution of one instance."""

    def __init__(self, behavior: ImagBehavior, instance: RoutingInstance, decoding: Decoding) -> None:
        """Take an instance.

        Args:
            behavior: its actor decides.
            instance: of the problem that it was trained on.
            decoding: how to look.

        Raises:
            UserError: the policy reads latents, or distances do not tell what moves cost.
        """
        if (reason := why_not_alone(behavior, instance)) is not None:
            raise UserError(reason)
        require_room(behavior, len(instance.coords))
        self.behavior, self.instance, self.decoding = behavior, instance, decoding
        self.rules, self.count = routing_of(behavior).rules, len(instance.coords)
        self.device = next(behavior.actor.parameters()).device
        self.best: Int64[np.ndarray, " L"] = np.arange(self.count)
        self.lowest = np.inf

    def run(self, patience: Patience, *, watch: Callable[[], object] = lambda: None) -> Int64[np.ndarray, " L"]:
        """The best solution by the time that patience or the search itself ends.

        Args:
            patience: its clock is set.
            watch: called again and again.
        """
        if self.count < MIN_NODES:
            return self.best
        posed = pose([self.instance], self.device).instance
        judge = judge_of(self.behavior, [self.instance], posed, self.decoding)
        image = 0
        while image == 0 or not patience.is_over:
            turned = posed._replace(coords=symmetric(posed.coords, image % self.images))
            context, tables = static(self.behavior, turned)
            self.look(Posed(context, tables, judge), patience, watch)
            image += 1
            if self.ends and image == self.images:
                break
        return without_waiting(self.best)

    # Symmetric images to go through, and whether that is all there is to do.
    images = 1
    ends = True

    @abstractmethod
    def look(self, posed: Posed, patience: Patience, watch: Callable[[], object]) -> None:
        """Look in one image of the instance."""

    def keep(self, tours: Int64[np.ndarray, "1 Q L"], costs: Float64[np.ndarray, "1 Q"]) -> None:
        """Keep the best of some tours, if it is the best so far."""
        index = int(costs[0].argmin())
        if costs[0, index] < self.lowest:
            self.best, self.lowest = tours[0, index], float(costs[0, index])


class BeamSearch(Search):
    """Keeps the K states from which greedy roll-outs end best, move by move (Choo et al. 2022, "SGBS").

    Where all symmetries hold, the beam is led through each of the 8 images.
    """

    @property
    def images(self) -> int:  # type: ignore[override]
        """Symmetric images of the instance."""
        return SYMMETRIES if self.rules.costs.symmetric else 1

    @torch.no_grad()
    def look(self, posed: Posed, patience: Patience, watch: Callable[[], object]) -> None:
        actor = self.behavior.actor
        state = self.rules.reset(expand_instance(posed.context.instance, torch.Size((1, 1))))
        taken = state.current[..., None]
        while True:
            view = View.of(self.rules, state, self.rules.action_mask(state))
            scores = actor(None, posed.tables, view).log_probs
            likeliest = scores.topk(min(EXPANSION, self.count), -1)
            legal = view.action_mask.gather(-1, likeliest.indices)  # type: ignore[union-attr]
            width = likeliest.indices.shape[-1]
            children = each_part(state, partial(torch.repeat_interleave, repeats=width, dim=1))
            children, finished = self.rules.step(children, likeliest.indices.flatten(1))
            prefix = torch.cat((taken.repeat_interleave(width, 1), likeliest.indices.flatten(1)[..., None]), -1)
            rest = _greedy_rest(self.rules, actor, posed.tables, children, steps=self._steps - prefix.shape[-1])
            tours = torch.cat((prefix, rest), -1).cpu().numpy()
            costs = np.where(legal.flatten(1).cpu().numpy(), posed.judge(tours), np.inf)
            self.keep(tours, costs)
            watch()
            if prefix.shape[-1] >= self._steps or bool(finished.all()) or patience.is_over:
                return
            order = np.argsort(costs[0], kind="stable")
            kept = order[np.isfinite(costs[0, order])][: self.decoding.width]
            chosen = torch.from_numpy(kept).to(self.device)
            state = each_part(children, itemgetter((slice(None), chosen)))
            taken = prefix[:, chosen]

    @property
    def _steps(self) -> int:
        # A closed tour needs no last step, back to where it began.
        return self.rules.episode_steps(self.count)


def _greedy_rest(rules: Any, actor: Actor, tables: Any, state: State, *, steps: int) -> Int[Tensor, "B Q L"]:
    """The likeliest moves from states on, to the end."""
    moves = [state.current[..., None][..., :0]]
    for _ in range(steps):
        view = View.of(rules, state, rules.action_mask(state))
        action = actor(None, tables, view).mode()
        state, finished = rules.step(state, action)
        moves.append(action[..., None])
        if not rules.fixed_length and bool(finished.all()):
            break
    return torch.cat(moves, -1)


class ActiveSearch(Search):
    """Tunes what the actor's pointer made of one instance, by the policy gradient (Hottung et al. 2022, "EAS").

    What is tuned are the tables of the instance, so that the weights stay as they are; the best tour so far is imitated
    beside that.
    """

    ends = False

    def look(self, posed: Posed, patience: Patience, watch: Callable[[], object]) -> None:
        actor = self.behavior.actor
        generator = torch.Generator(self.device).manual_seed(self.decoding.seed)
        tuned = {name: part.detach().clone().requires_grad_() for name, part in actor.named(posed.tables).items()}
        optimizer = torch.optim.Adam(tuned.values(), lr=LEARNING_RATE)
        first = torch.tensor([self._firsts()], device=self.device)
        # There is an answer however little time was given.
        while not np.isfinite(self.lowest) or not patience.is_over:
            tables = actor.restore(tuned)
            found = roll_out(self.behavior, context=posed.context, tables=tables, first=first, generator=generator)
            tours = found.cpu().numpy()
            costs = posed.judge(tours)
            self.keep(tours, costs)
            both = torch.cat((found, self._best(found)), 1)
            log_probs = _log_probs(self.rules, actor, tables, posed.context, both)
            spread = torch.from_numpy((costs - costs.mean()) / (costs.std() + 1e-8)).to(log_probs)
            loss = (spread * log_probs[:, :-1]).mean() - IMITATION * log_probs[:, -1].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch()

    def _firsts(self) -> list[int]:
        if self.rules.starts_anywhere:
            return [index * self.count // DRAWN for index in range(DRAWN)]
        return [0] * DRAWN

    def _best(self, like: Int[Tensor, "1 Q L"]) -> Int[Tensor, "1 1 L"]:
        """The best tour so far, as long as those that were just drawn."""
        best = self.best[: like.shape[-1]]
        padded = np.concatenate((best, np.full(like.shape[-1] - len(best), best[0])))
        return torch.from_numpy(padded).to(like)[None, None]


def _log_probs(
    rules: Any, actor: Actor, tables: Any, context: RoutingContext, tours: Int[Tensor, "B Q L"]
) -> Float[Tensor, "B Q"]:
    """How likely whole tours are, given their first nodes."""
    first = tours[..., 0]
    state = rules.reset(expand_instance(context.instance, first.shape), first if rules.starts_anywhere else None)
    views = []
    for action in tours[..., 1:].unbind(-1):
        views.append(View.of(rules, state, rules.action_mask(state)))
        state, _ = rules.step(state, action)
    stacked = View(*(None if parts[0] is None else torch.stack(parts, 2) for parts in zip(*views, strict=True)))
    return actor(None, tables, stacked).log_prob(tours[..., 1:]).sum(-1)
