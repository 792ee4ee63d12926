"""How routing is imagined: the rules step the state exactly, and what a move costs is learnt, or known on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from config import UserError, load_function
from envs.tasks import ACTION_MASK
from imagining.imagination import Imagination, Look, Moment, Start, Trajectory, imagine
from imagining.routing_model import RoutingContext, RoutingModel, places_of, shown_of
from imagining.routing_starts import episode_starts, generated_of_size, replayed_starts, row_starts, with_generated
from imagining.world_model import Observed
from parts.acting import Sight, encode_static
from parts.actors import Actor
from parts.latents import Chosen, Feat
from parts.views import NodeSet, View, take_nodes
from routing.cost_world import FACTORS, LAST_COST, LAST_NODE
from routing.drawing import draw_tour
from routing.rules import CURRENT_NODE, MIN_NODES, Instance, Rules, State, each_part, expand_instance
from settings.imagination import ImaginationSettings
from tools import Bounds
from training.evaluation import Pictures

# A return may be so many times what the dearest moves seen so far would add up to.
MARGIN = 1.5


class Greedy(NamedTuple):
    """Likeliest episodes of B instances: their closed tours, what each move earns by the model, and the trajectory."""

    tours: Int[Tensor, "B H"]
    reward: Float[Tensor, "B H"]
    trajectory: Trajectory


class RoutingImagination(Imagination):
    """Imagination whose states, masks and ends are the rules' own."""

    model: RoutingModel

    def __init__(self, model: RoutingModel, settings: ImaginationSettings) -> None:
        """Find the user's reward function, where one is named.

        Raises:
            UserError: the settings do not fit the problem or the model.
        """
        super().__init__(settings, knows_mask=True, model=model)
        rules, costs = model.rules, model.rules.costs
        if settings.first == "any" and not rules.starts_anywhere:
            _require_given_moves(rules, settings)
        if not costs.known and settings.reward == "simulated":
            raise UserError("what moves cost is known from a log alone: that needs imag_reward: head")
        if costs.hidden and settings.reward == "simulated":
            raise UserError(f"costs of {costs.name} depend on what is hidden: they need imag_reward: head")
        if settings.augment and not costs.symmetric:
            raise UserError(
                f"costs of {costs.name} differ under the square's symmetries: they need imag_augment: false"
            )
        if model.belief_size and (settings.start != "rows" or settings.reward != "head"):
            raise UserError(
                "model.belief is what the head expects and the actor knows where imagined tours begin, and there is"
                f" nothing to believe before the first move: it needs imag_reward: head and imag_start: rows, got"
                f" {settings.reward} and {settings.start}"
            )
        self.model, self.rules = model, rules
        steps = rules.episode_steps(model.task.num_actions)
        self.horizon = settings.horizon if isinstance(settings.horizon, int) else steps
        self.sizes = settings.nodes
        if self.sizes and self.sizes[0] < MIN_NODES:
            raise UserError(f"imag_nodes begins with {self.sizes[0]} nodes; a tour has {MIN_NODES} at least")
        self.discount = settings.discount
        self.reads_latent = settings.reward == "head" and model.reward_latent
        self.starts_at_rows = settings.start in ("rows", "replay")
        self.node_features, self.state_features = rules.num_node_features, rules.num_state_features
        self.shows_costs = rules.shows_costs
        self.belief_size, self.shows_moves = model.belief_size, model.shows_moves
        self.can_plan = rules.has_solver and "reward" in model.heads and not model.reward_latent
        self.custom_reward = load_function(settings.reward, key="imag_reward") if ":" in settings.reward else None

    @torch.no_grad()
    def start(
        self, batch: dict[str, Tensor], observed: Observed | None, *, needs_latent: bool, generator: torch.Generator
    ) -> Start:
        choice = self.settings
        if choice.start == "replay":
            return replayed_starts(self.model, batch, observed, tours=choice.tours)
        if choice.start == "rows":
            return row_starts(self.model, batch, observed, tours=choice.tours, generator=generator)
        instance = self.model.first_instance(batch)
        if choice.augment:
            instance = self.rules.augment(instance, generator)
        if self.sizes:
            count, nodes = instance.coords.shape[:2]
            least, most = self.sizes
            instance = generated_of_size(self.rules, count, nodes, least=least, most=most, generator=generator)
        elif choice.start == "generated":
            instance = with_generated(self.rules, instance, share=choice.generated, generator=generator)
        return episode_starts(
            self.model,
            instance,
            tours=choice.tours,
            spread=choice.first == "any",
            needs_latent=needs_latent,
            generator=generator,
        )

    def horizon_from(self, start: Start) -> int:
        if not self.sizes:
            return self.horizon
        return self.rules.episode_steps(start.context.instance.coords.shape[1])

    def require_study(self, *, practises: bool, needs_latent: bool) -> None:
        model, choice = self.model, self.settings
        wrong = {
            "model.loss_scales.reward above 0": "reward" not in model.heads,
            "model.reward_latent: false": model.reward_latent,
            "model.belief: false": model.belief is not None,
            "imag_reward: head": choice.reward != "head",
            "imag_start: episodes": practises and choice.start not in ("episodes", "generated"),
            "nothing that reads latents (actor.pointer.latent: 0, critic.latent: false)": practises and needs_latent,
        }
        if needed := [remedy for remedy, is_wrong in wrong.items() if is_wrong]:
            raise UserError(f"trips tell what moves cost, and nothing of whole episodes: they need {needed[0]}")

    def dreamt(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        nodes, device = self.model.task.num_actions, generator.device
        instance = self.rules.random(count, nodes, generator=generator, device=device)
        first = self.rules.observe(instance, self.rules.reset(instance))
        return {key: value[:, None] for key, value in first.items()}

    def view(self, feat: Feat | None, state: State, context: RoutingContext) -> Moment:
        true_mask = self.rules.action_mask(state)
        mask = true_mask
        if self.mask_from == "predicted":
            assert feat is not None, "a mask is predicted from the latent"
            mask = self.model.predict_mask(feat, context)
        return Moment(feat, state, View.of(self.rules, state, mask), true_mask)

    def step(self, state: State, action: Int[Tensor, "B Q"], feat: Feat | None) -> tuple[State, Bool[Tensor, "B Q"]]:
        return self.rules.step(state, action)

    def cont(self, moments: Moment, finished: Bool[Tensor, "B Q H"] | None) -> Float[Tensor, "B Q H"]:
        assert finished is not None, "rules know when an episode ends"
        return (~finished).float()

    def all_over(self, start: Start, finished: Bool[Tensor, "B Q"] | None) -> bool:
        # Where episodes differ in length, all of them have often ended some steps before the horizon.
        varied = start.context.instance.valid is not None or not self.rules.fixed_length
        return finished is not None and varied and finished.device.type == "cpu" and bool(finished.all())

    def reward(self, trajectory: Trajectory, start: Start) -> Float[Tensor, "B Q H"]:
        """What imagined moves earn by the head, the true cost or the user's function; 0 once an episode ended."""
        before = _before(trajectory)
        if self.settings.reward == "head":
            reward = self._learnt_reward(trajectory, before, start)
        else:
            instance = expand_instance(start.context.instance, trajectory.action.shape)
            if self.custom_reward is not None:
                reward = self.custom_reward(instance, before, trajectory.action)
            else:
                reward = -self.rules.cost(instance, before, trajectory.action)
        if self.settings.penalty:
            assert trajectory.moments.true_mask is not None
            legal = trajectory.moments.true_mask[:, :, :-1].gather(-1, trajectory.action[..., None]).squeeze(-1)
            reward = reward - self.settings.penalty * (~legal)
        return reward * trajectory.survival

    def _learnt_reward(self, trajectory: Trajectory, before: State, start: Start) -> Float[Tensor, "B Q H"]:
        instance, choice = start.context.instance, trajectory.decisions.choice
        coords, places, shown = instance.coords, None, self.rules.shown_costs(instance)
        if choice is None:
            origin, target = take_nodes(coords, before.current), take_nodes(coords, trajectory.action)
            places = places_of(instance, before.current, trajectory.action)
            shown = shown_of(shown, before.current, trajectory.action)
        else:
            # A move ends where the actor's choice lies, and the next one begins there, gradient included.
            target = choice @ coords[:, None]
            origin = torch.cat((take_nodes(coords, before.current[:, :, :1]), target[:, :, :-1]), 2)
            if shown is not None:
                rows = choice @ shown[:, None]
                rows = torch.cat((take_nodes(shown, before.current[:, :, :1]), rows[:, :, :-1]), 2)
                shown = (rows * choice).sum(-1)
        latent = trajectory.feat(slice(0, -1)) if self.model.reward_latent else None
        assert not isinstance(latent, Chosen), "beside positions, latents are read as numbers"
        if start.context.belief is not None:
            # All that is imagined from a start uses the belief that there was at the start.
            latent = start.context.belief[:, None, None]
        return self.model.predict_move(origin, target, latent, places, shown)

    def possible_returns(self, trajectory: Trajectory, start: Start, rewards: Bounds) -> Bounds | None:
        """The range that returns can lie in, each bound [B, Q, H]; None under the user's own rewards.

        Simulated: the legs that remain times this instance's longest, and 0 above. Learned: the legs that remain times
        1.5 times the largest move cost in replay, and likewise above if a positive reward was seen. A penalty widens
        the range by its largest sum.
        """
        if self.custom_reward is not None:
            return None
        legs = self.rules.remaining_legs(_before(trajectory)).float()
        if self.settings.reward == "simulated":
            worst = self.rules.longest_leg(start.context.instance)[:, None, None]
            best = torch.zeros_like(worst)
        else:
            worst = MARGIN * (-rewards.low).clamp(min=0)
            best = MARGIN * rewards.high.clamp(min=0)
        return Bounds(-legs * worst - self.settings.penalty * legs.shape[-1], legs * best)

    def node_set(self, context: RoutingContext) -> NodeSet:
        return self.model.node_set(context.instance, context.belief)

    @torch.no_grad()
    def imagine_greedily(
        self,
        actor: Actor,
        instance: Instance,
        *,
        needs_latent: bool,
        belief: Float[Tensor, "B L"] | None = None,
    ) -> Greedy:
        """The likeliest whole episode of each instance, and what the model expects it to earn.

        Args:
            actor: chooses.
            instance: B of them.
            needs_latent: whether actor, mask or rewards read latents.
            belief: about hidden costs throughout; None for the one before any move.
        """
        start = episode_starts(self.model, instance, tours=1, needs_latent=needs_latent, generator=None)
        if belief is not None:
            start = start._replace(context=start.context._replace(belief=belief))
        trajectory = imagine(
            self,
            actor,
            start=start,
            tables=actor.tables(self.node_set(start.context)),
            noise=None,
            horizon=self.rules.episode_steps(instance.coords.shape[1]),
        )
        # A closed tour needs no last step, back to where it began.
        tours = torch.cat((trajectory.moments.state.current[:, 0, :1], trajectory.action[:, 0, :-1]), -1)
        return Greedy(tours, self.reward(trajectory, start)[:, 0], trajectory)

    def pictures(self, actor: Actor, *, needs_latent: bool, reward_scale: float, device: torch.device) -> Pictures:
        @torch.no_grad()
        def imagined_tour(instance: Instance) -> dict[str, np.ndarray]:
            instance = each_part(instance, lambda part: part[:1].to(device))
            greedy = self.imagine_greedily(actor, instance, needs_latent=needs_latent)
            title = f"imagined: length {-float(greedy.reward.sum()) / reward_scale:.3f} by the model"
            coords, tour = instance.coords[0].cpu().numpy(), greedy.tours[0].cpu().numpy()
            return {"imagined": draw_tour(coords, tour, title=title)}

        return imagined_tour

    def first_notes(self, num_envs: int) -> dict[str, Any]:
        notes: dict[str, Any] = {"static": {}}
        if self.belief_size:
            notes["belief"] = next(self.model.parameters()).new_zeros(num_envs, self.belief_size)
        return notes

    def look(self, sight: Sight, notes: Mapping[str, Any], actor: Actor) -> Look:
        instance, state = self.rules.restore(sight.obs)

        def encode(instance: Instance) -> dict[str, Tensor]:
            return self._encode_static(actor, instance)

        static = encode_static(notes["static"], instance, sight, rules=self.rules, encode=encode)
        states = each_part(state, lambda part: part[:, None])
        view = View.of(self.rules, states, sight.obs[ACTION_MASK][:, None])
        context = RoutingContext(instance, static["nodes"]) if "nodes" in static else None
        if not self.belief_size:
            return Look(view, context, actor.restore(static), {"static": static})
        # Every move tells more of what is hidden.
        belief = self.believe(sight, instance, notes["belief"])
        tables = actor.tables(self.model.node_set(instance, belief))
        return Look(view, context, tables, {"static": static, "belief": belief})

    def _encode_static(self, actor: Actor, instance: Instance) -> dict[str, Tensor]:
        """What acting needs of each instance for a whole episode."""
        encoded: dict[str, Tensor] = {}
        if not self.belief_size:
            encoded = actor.named(actor.tables(self.model.node_set(instance)))
        if actor.latent_size:
            encoded["nodes"] = self.model.context(instance).embedded()
        return encoded

    def believe(self, sight: Sight, instance: Instance, before: Float[Tensor, "E L"]) -> Float[Tensor, "E L"]:
        """The belief after an observation; nothing passes from one episode to the next."""
        obs, names = sight.obs, (CURRENT_NODE, LAST_NODE, LAST_COST, FACTORS)
        rows = {name: obs[name][:, None] for name in names if name in obs}
        belief = self.model.believe(rows, instance, before.masked_fill(sight.is_first[:, None], 0.0))[:, 0]
        # One failed update must not leave its NaN in here until the episode ends.
        return belief.nan_to_num(0.0, 0.0, 0.0)


def _require_given_moves(rules: type[Rules], settings: ImaginationSettings) -> None:
    """Check that half of the tours can begin with moves that are given, where all begin at the depot.

    Raises:
        UserError: they cannot.
    """
    needed = f"task {rules.name} begins at node 0, so that imag_first: any gives half of imag_tours their first moves"
    if settings.gradient != "reinforce":
        raise UserError(f"{needed}, which nobody chose: it needs imag_gradient: reinforce, or imag_first: stored")
    if settings.tours < 4:
        raise UserError(f"{needed}: it needs imag_tours of 4 or more, got {settings.tours}, or imag_first: stored")


def _before(trajectory: Trajectory) -> State:
    """The states in which decisions were made, [B, Q, H]."""
    return each_part(trajectory.moments.state, lambda part: part[:, :, :-1])
