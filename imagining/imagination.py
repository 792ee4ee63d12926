"""Imagination: trajectories in a world model's latent space, one path for every kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from config import UserError
from envs.tasks import CandidateSpec
from imagining.world_model import Metrics, Observed, WorldModel
from networks import Latent
from parts.acting import Sight
from parts.actors import Actor
from parts.latents import Chosen, Feat, gathering_pays
from parts.views import NodeSet
from routing.rules import each_part
from settings.imagination import ImaginationSettings
from system.ranks import here
from tools import Bounds
from training.evaluation import Pictures


class Noise(NamedTuple):
    """The randomness of one imagination, drawn beforehand: uniform in [0, 1)."""

    latent: Float[Tensor, "H B Q S"]
    action: Float[Tensor, "H B Q *A"]


class Start(NamedTuple):
    """Where imagination begins: Q trajectories for each of B instances, or replayed sequences.

    `latent` is None where nothing reads it; `state` is what the kind of task steps by rules, and `context` what never
    changes within an episode. `weight` is 0 for starts that must not count (rows beyond an episode's end). The last G
    of the Q trajectories begin with actions that are `given`, which nobody chose.
    """

    latent: Latent | None
    state: Any
    context: Any
    weight: Float[Tensor, "B Q"]
    given: Int[Tensor, "B G"] | None = None


class Moment(NamedTuple):
    """An imagined state before the next action: its latent, what rules know of it, and what networks see of it.

    `state` is None where nothing asks for it after imagination; `true_mask` is the rules' own, where there are any.
    A view is a NamedTuple with an `action_mask` (or None) and a method `at` like that of `View`; what else it holds,
    its kind of task and the actors that read it agree on.
    """

    feat: Feat | None
    state: Any
    view: Any
    true_mask: Bool[Tensor, "B *Q N"] | None

    def feat_at(self, steps: slice) -> Feat | None:
        """The features at `steps`, of moments stacked as a trajectory's; None where nothing reads them."""
        if self.feat is None:
            return None
        return self.feat.at(steps) if isinstance(self.feat, Chosen) else self.feat[:, :, steps]


class Decision(NamedTuple):
    """An imagined action, and the scores that it was drawn by.

    In differentiable imagination it comes with a graph: as the distribution embeds it.
    """

    action: Shaped[Tensor, "B *Q"]
    scores: Float[Tensor, "B *Q S"]
    choice: Float[Tensor, "B *P"] | None = None
    log_prob: Float[Tensor, "B *P"] | None = None
    entropy: Float[Tensor, "B *P"] | None = None


class Trajectory(NamedTuple):
    """What was imagined from a `Start`: H decisions, and the H + 1 moments around them, stacked as [B, Q, H, ...].

    `survival` is how likely each action is to be taken at all: the start's weight times every `cont` before it.
    """

    moments: Moment
    decisions: Decision
    cont: Float[Tensor, "B Q H"]
    survival: Float[Tensor, "B Q H"]

    @property
    def action(self) -> Shaped[Tensor, "B Q H *A"]:
        """The actions."""
        return self.decisions.action

    def feat(self, steps: slice) -> Feat | None:
        """The latent features at `steps`; None where nothing reads them."""
        return self.moments.feat_at(steps)


class Imagination(ABC):
    """How one kind of task is imagined: where it starts, how what is known is stepped, and what actions earn.

    Attributes:
        model: predicts what is not known.
        settings: the choices that the config makes.
        mask_from: `rules`, or `predicted` where the actor's mask is decoded from the latent.
        horizon: steps to imagine, at most.
        discount: by which returns are discounted beside every step's `cont`.
        reads_latent: whether rewards or continues are predicted from latents.
        starts_at_rows: whether `start` begins in replayed rows, and so takes their latents.
        node_features: numbers that describe a node; 0 where there are none.
        state_features: numbers that describe a state beside its nodes.
        belief_size: numbers in a belief about hidden costs; 0 where none is kept.
        candidates: what actors see of the lines that actions follow; None where actions are something else.
        agent_features: numbers that actors see of everybody around; 0 where nobody is known to be.
        shows_moves: whether actors see what every move between nodes is expected to earn.
        shows_costs: whether observations show what every move between nodes costs.
        can_plan: whether what moves cost is learnt by their ends, and a solver can make tours of that.
        can_explore: whether all that happens is predicted from latents, so that an ensemble knows what is new.
        reads_classes: whether heads, actors and critics of this kind take latents by classes, too.
        stops_early: whether to stop where `all_over` says so; what is compiled wants the same shapes each time.
    """

    model: WorldModel
    settings: ImaginationSettings
    mask_from: str
    horizon: int
    discount: float
    reads_latent: bool
    starts_at_rows: bool
    node_features: int = 0
    state_features: int = 0
    belief_size: int = 0
    candidates: CandidateSpec | None = None
    agent_features: int = 0
    shows_moves: bool = False
    shows_costs: bool = False
    can_plan: bool = False
    can_explore: bool = False
    reads_classes: bool = False
    stops_early: bool = True

    def __init__(self, settings: ImaginationSettings, *, knows_mask: bool, model: WorldModel) -> None:
        """Take the choices, and check those that every kind of task shares.

        Raises:
            UserError: they need a mask head that the model does not have.
        """
        # Where no rules say how the mask changes, it is predicted.
        self.mask_from = settings.mask if knows_mask else "predicted"
        if self.mask_from == "predicted" and "mask" not in model.heads:
            raise UserError("a predicted mask needs the mask head: set model.loss_scales.mask above 0")
        self.settings = settings

    def horizon_from(self, start: Start) -> int:
        """Steps to imagine from a start, at most."""
        return self.horizon

    @abstractmethod
    def start(
        self,
        batch: dict[str, Tensor],
        observed: Observed | None,
        *,
        needs_latent: bool,
        generator: torch.Generator,
    ) -> Start:
        """Where to imagine from.

        Args:
            batch: replayed sequences.
            observed: their latents; None where `starts_at_rows` is False or nothing reads latents.
            needs_latent: whether anything reads the latents of the start.
            generator: draws what is random about it.
        """

    @abstractmethod
    def view(self, feat: Feat | None, state: Any, context: Any) -> Moment:
        """What there is of a state [B, Q] to see."""

    @abstractmethod
    def step(
        self, state: Any, action: Shaped[Tensor, "B Q *A"], feat: Feat | None
    ) -> tuple[Any, Bool[Tensor, "B Q"] | None]:
        """The known part of the state after an action, and where the episode is over, as far as rules tell that.

        Args:
            state: before it.
            action: what is done.
            feat: of the latent before it; None where nothing reads one.
        """

    @abstractmethod
    def cont(self, moments: Moment, finished: Bool[Tensor, "B Q H"] | None) -> Float[Tensor, "B Q H"]:
        """How likely the episode goes on after each action."""

    @abstractmethod
    def reward(self, trajectory: Trajectory, start: Start) -> Float[Tensor, "B Q H"]:
        """What imagined actions earn."""

    @abstractmethod
    def possible_returns(self, trajectory: Trajectory, start: Start, rewards: Bounds) -> Bounds | None:
        """The range that returns can lie in, each bound [B, Q, H]; None where none is known.

        Args:
            trajectory: what was imagined.
            start: where it began.
            rewards: the smallest and largest reward in replay, 0-d.
        """

    @abstractmethod
    def node_set(self, context: Any) -> NodeSet | None:
        """The nodes that actor and critic see; None where there are none, or where they change with every state."""

    @abstractmethod
    def first_notes(self, num_envs: int) -> dict[str, Any]:
        """What acting keeps of each environment beside the latent, before the first step."""

    @abstractmethod
    def look(self, sight: Sight, notes: Mapping[str, Any], actor: Actor) -> Look:
        """What there is to see where the agent stands in the real environments.

        Args:
            sight: what they show.
            notes: from `first_notes` or the last look.
            actor: who is going to read it.
        """

    def replayed(self, batch: dict[str, Tensor]) -> Any:
        """What actors see of replayed rows [B, T] beside the latent, as in acting, where all of it was observed."""
        raise AssertionError("rows of this task are seen through tables of their instance")

    def average(self, values: Float[Tensor, "*B"], weight: Float[Tensor, "*B"]) -> Float[Tensor, ""]:
        """The mean of values that count by their weights, by which losses are averaged: their sum over that of weights.

        Rows of whole episodes that end apart count nothing, however many there are.
        """
        return here().balance(weight)((values * weight).sum() / weight.sum().clamp(min=1e-8))

    def metrics(self, trajectory: Trajectory) -> Metrics:
        """What was legal of what was imagined."""
        return legality(trajectory, every_step=self.mask_from == "predicted")

    def require_study(self, *, practises: bool, needs_latent: bool) -> None:
        """Check that a log of moves is all that is needed to learn from.

        Args:
            practises: whether tours are imagined, too.
            needs_latent: whether anything reads latents there.

        Raises:
            UserError: it is not.
        """
        raise UserError("trips are moves between nodes; this task has none")

    def dreamt(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The first observations [B, 1, ...] of cases that nobody has lived through, as replay would give them."""
        raise AssertionError("nobody knows what cases of this task there are")

    def all_over(self, start: Start, finished: Bool[Tensor, "B Q"] | None) -> bool:
        """Whether nothing is left to imagine before the horizon, where that can be asked without waiting for a GPU."""
        return False

    def pictures(
        self, actor: Actor, *, needs_latent: bool, reward_scale: float, device: torch.device
    ) -> Pictures | None:
        """What draws the imagination of an actor; None where there is nothing to draw.

        Args:
            actor: plays where actions are chosen.
            needs_latent: whether anything reads latents.
            reward_scale: rewards were multiplied with it.
            device: where the model lives.
        """
        return None


class Look(NamedTuple):
    """What acting sees: each environment's view [E, 1, ...], the actor's tables, and what to keep for the next step.

    `context` is what the world model embeds observations by.
    """

    view: Any
    context: Any
    tables: Any
    notes: dict[str, Any]


def imagine(
    imagination: Imagination,
    actor: Actor,
    *,
    start: Start,
    tables: Any,
    noise: Noise | None,
    horizon: int,
    differentiable: bool = False,
    learns: bool = False,
) -> Trajectory:
    """Let the actor act: the RSSM predicts the latent, and what is known is stepped by the rules.

    Args:
        imagination: steps the kind of task that there is.
        actor: chooses the actions.
        start: where to begin.
        tables: what the actor made of the start's nodes.
        noise: what to sample with; None takes the mode of actor and prior instead.
        horizon: steps to take, at most: where every episode has ended before, no more are taken.
        differentiable: keep the graph through latents and moves (straight-through); needs a latent and noise.
        learns: keep the graph from the actor's weights to the scores, for each step by itself.
    """
    shape, state, context = start.weight.shape, start.state, start.context
    latent = _first_latent(imagination, start, differentiable=differentiable)
    moments: list[Moment] = []
    decisions: list[Decision] = []
    ends: list[Tensor | None] = []
    with torch.set_grad_enabled(differentiable):
        for step in range(horizon):
            moments.append(_moment(imagination, latent, state, context, shape))
            action_noise = None if noise is None else noise.action[step]
            decision = _decide(actor, moments[-1], tables, action_noise, differentiable=differentiable, learns=learns)
            if step == 0 and start.given is not None:
                own = decision.action[:, : -start.given.shape[1]]
                decision = decision._replace(action=torch.cat((own, start.given), 1))
            decisions.append(decision)
            latent_noise = None if noise is None else noise.latent[step].flatten(0, 1)
            latent = _advance(imagination.model, latent, decision, context, latent_noise)
            state, finished = imagination.step(state, decision.action, moments[-1].feat)
            ends.append(finished)
            if imagination.stops_early and imagination.all_over(start, finished):
                break
        moments.append(_moment(imagination, latent, state, context, shape))
        stacked: Moment = stack_steps(moments, shape)
        cont = imagination.cont(stacked, stack_steps(ends, shape))
    # An action is taken if its start counts and every step before it let the episode go on.
    survival = torch.cat((start.weight[..., None], cont[:, :, :-1].detach()), -1).cumprod(-1)
    with torch.set_grad_enabled(learns or differentiable):
        decided: Decision = stack_steps(decisions, shape)
    return Trajectory(stacked, decided, cont, survival)


def _first_latent(imagination: Imagination, start: Start, *, differentiable: bool) -> Latent | Chosen | None:
    """The latents to begin with, in a row; in the form that layers read fastest."""
    if start.latent is None:
        return None
    latent = each_part(start.latent, lambda part: part.flatten(0, 1))
    by_classes = imagination.reads_classes and not differentiable and gathering_pays(latent.stoch)
    return latent.chosen() if by_classes else latent


def _moment(
    imagination: Imagination, latent: Latent | Chosen | None, state: Any, context: Any, shape: tuple[int, ...]
) -> Moment:
    feat = None if latent is None else each_part(latent, lambda part: part.unflatten(0, shape)).feat()
    return imagination.view(feat, state, context)


def _decide(
    actor: Actor,
    moment: Moment,
    tables: Any,
    noise: Float[Tensor, "B Q *A"] | None,
    *,
    differentiable: bool,
    learns: bool,
) -> Decision:
    # The score of an action is not differentiated through the latents that led to it.
    feat = None if moment.feat is None else moment.feat.detach()
    if not differentiable:
        return Decision(*actor.draw(feat, tables, moment.view, noise, learns=learns))
    scores = actor.scores(feat, tables, moment.view)
    dist = actor.distribution(scores, moment.view)
    action = dist.mode() if noise is None else dist.sample(noise)
    return Decision(action, scores, dist.embed(action), dist.log_prob(action), dist.entropy())


def _advance(
    model: WorldModel,
    latent: Latent | Chosen | None,
    decision: Decision,
    context: Any,
    noise: Float[Tensor, "R S"] | None,
) -> Latent | Chosen | None:
    """The latents after a decision; None where nothing reads them."""
    if latent is None:
        return None
    if decision.choice is None:
        embedded = model.embed_action(decision.action, context)
    else:
        embedded = model.embed_choice(decision.choice, context)
    return model.rssm.imagine_step(latent, embedded.flatten(0, 1), noise)


def stack_steps(parts: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """What every step [B, Q, ...] has, as [B, Q, H, ...]: tensors, and NamedTuples of them part by part."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        return type(first)(*(stack_steps(each, shape) for each in zip(*parts, strict=True)))
    # What no step changes is the same tensor throughout: a view of it takes no memory.
    if all(part is first for part in parts):
        return first.unsqueeze(2).expand(*shape, len(parts), *first.shape[2:])
    return torch.stack(list(parts), 2)


def legality(trajectory: Trajectory, *, every_step: bool) -> Metrics:
    """How often actions were illegal, and how well the actor's mask agreed with the rules'.

    The agreement is that of the first step, or of each where the mask is not the rules' own.
    """
    mask, true_mask = trajectory.moments.view.action_mask, trajectory.moments.true_mask
    if mask is None or true_mask is None:
        return {}
    legal = true_mask[:, :, :-1].gather(-1, trajectory.action[..., None]).squeeze(-1)
    survival = trajectory.survival
    metrics = {"miss_rate": ((~legal) * survival).sum() / survival.sum()}
    for step in range(mask.shape[2] - 1 if every_step else 1):
        metrics[f"imag_mask_step_{step}"] = (mask[:, :, step] == true_mask[:, :, step]).float().mean()
        metrics[f"imag_legal_step_{step}"] = true_mask[:, :, step].sum(-1).float().mean()
    return metrics


def thin(trajectory: Trajectory, count: int, tours: int) -> Trajectory:
    """The trajectories of the first `count` instances, and of those the first of every `tours`."""
    return each_part(trajectory, lambda part: part[:count, ::tours])


def repeated(latents: Latent, tours: int) -> Latent:
    """Latents [B, T] without their graph, each `tours` times side by side."""
    return each_part(latents, lambda part: part.detach().repeat_interleave(tours, 1))
