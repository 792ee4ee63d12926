"""How any gymnasium task is imagined: everything in latents, but for a mask whose rules the user wrote down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from config import UserError
from envs.tasks import ACTION_MASK
from imagining.imagination import Imagination, Look, Moment, Start, Trajectory, repeated
from imagining.observation_model import ObservationModel
from imagining.world_model import Observed
from parts.acting import Sight
from parts.actors import Actor
from parts.latents import Feat
from parts.views import NodeSet, View
from routing.drawing import draw_open_loop
from routing.rules import each_part
from settings.imagination import ImaginationSettings
from tools import Bounds, uniform
from training.evaluation import Pictures

# Rows that an open-loop picture observes before it imagines.
OPEN_LOOP_SEEN = 8


class Legality(NamedTuple):
    """What is known of which actions are legal: a state of the mask's rules, and what was observed at the start.

    Both are None where every action is legal; `rules_state` also where there are no rules, and `observed` beyond
    the first step.
    """

    rules_state: Any = None
    observed: Bool[Tensor, "B Q N"] | None = None


class ObservationImagination(Imagination):
    """Imagination that knows of a state no more than its latent, and perhaps its mask."""

    model: ObservationModel
    can_explore = reads_classes = True

    def __init__(self, model: ObservationModel, settings: ImaginationSettings) -> None:
        """Take the model and the settings.

        Raises:
            UserError: the settings do not fit the task or the model.
        """
        if not isinstance(settings.horizon, int) or settings.reward != "head":
            raise UserError("a task without rules needs imag_horizon as a number of steps and imag_reward: head")
        if settings.target_clip == "auto":
            raise UserError("target_clip auto is what rules allow; a task without rules needs none, or two numbers")
        knows_mask = model.mask_rules is not None or not model.task.actions.masked
        super().__init__(settings, knows_mask=knows_mask, model=model)
        self.model, self.mask_rules, self.masked = model, model.mask_rules, model.task.actions.masked
        self.horizon = settings.horizon
        # The `cont` head predicts the discount with it.
        self.discount = 1.0
        self.reads_latent = self.starts_at_rows = True

    @torch.no_grad()
    def start(
        self, batch: dict[str, Tensor], observed: Observed | None, *, needs_latent: bool, generator: torch.Generator
    ) -> Start:
        """Every row of replayed sequences, as much as the episode is expected to go on from there.

        Where it does not, the `cont` head has been shown so: the row counts next to nothing (DreamerV3, as released).
        """
        assert observed is not None, "imagination starts from replayed latents here"
        tours = self.settings.tours
        rules_state = None if self.mask_rules is None else self.mask_rules.restore(batch)
        legality = Legality(rules_state, batch[ACTION_MASK] if self.masked else None)
        latents = repeated(observed.latents, tours)
        return Start(latents, _repeated(legality, tours), None, self.model.predict_cont(latents.feat()))

    def average(self, values: Float[Tensor, "*B"], weight: Float[Tensor, "*B"]) -> Float[Tensor, ""]:
        """The mean of weighted values, as DreamerV3's losses are released: near an episode's end all count less."""
        return (values * weight).mean()

    def view(self, feat: Feat | None, state: Any, context: None) -> Moment:
        assert feat is not None, "a task without routing rules is imagined in latents"
        true_mask = None
        if self.mask_rules is not None:
            true_mask = self.mask_rules.action_mask(state.rules_state)
        if not self.masked:
            mask = None
        elif self.mask_from == "rules":
            mask = true_mask
        elif state.observed is not None:
            mask = state.observed
        else:
            mask = self.model.predict_mask(feat, context)
        return Moment(feat, None, View(mask), true_mask)

    def step(self, state: Any, action: Shaped[Tensor, "B Q *A"], feat: Feat | None) -> tuple[Any, None]:
        if self.mask_rules is None:
            return Legality(), None
        return Legality(self.mask_rules.step(state.rules_state, action)), None

    def cont(self, moments: Moment, finished: Bool[Tensor, "B Q H"] | None) -> Float[Tensor, "B Q H"]:
        feat = moments.feat_at(slice(1, None))
        assert feat is not None
        return self.model.predict_cont(feat)

    def reward(self, trajectory: Trajectory, start: Start) -> Float[Tensor, "B Q H"]:
        """What the reward head expects with each latent."""
        feat = trajectory.feat(slice(1, None))
        assert feat is not None
        return self.model.predict_reward(feat)

    def possible_returns(self, trajectory: Trajectory, start: Start, rewards: Bounds) -> Bounds | None:
        return None

    def node_set(self, context: None) -> NodeSet | None:
        return None

    def pictures(
        self, actor: Actor, *, needs_latent: bool, reward_scale: float, device: torch.device
    ) -> Pictures | None:
        @torch.no_grad()
        def open_loop(sequence: dict[str, Tensor]) -> dict[str, np.ndarray]:
            length = sequence["is_first"].shape[1]
            seen = max(1, min(OPEN_LOOP_SEEN, length // 2))
            if length < seen + 1:
                return {}
            generator = torch.Generator(device).manual_seed(0)
            noise = uniform((1, length, self.model.rssm.stoch_size), generator)
            predicted = self.model.open_loop(sequence, seen=seen, noise=noise)
            return {
                f"open_loop_{name}": draw_open_loop(sequence[name][0].cpu().numpy(), value[0].cpu().numpy(), seen=seen)
                for name, value in predicted.items()
            }

        return open_loop if self.model.decoder is not None else None

    def first_notes(self, num_envs: int) -> dict[str, Any]:
        return {}

    def replayed(self, batch: dict[str, Tensor]) -> Any:
        return View(batch[ACTION_MASK] if self.masked else None)

    def look(self, sight: Sight, notes: Mapping[str, Any], actor: Actor) -> Look:
        view = View(sight.obs[ACTION_MASK][:, None] if self.masked else None)
        return Look(view, context=None, tables=None, notes={})


def _repeated(legality: Legality, tours: int) -> Legality:
    return each_part(legality, lambda part: part.repeat_interleave(tours, 1))
