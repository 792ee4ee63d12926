"""A third kind of world fits in: candidates that change with every state, as lines to drive along do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from envs.tasks import ActionSpec, ObservationTask
from imagining.imagination import Imagination, Look, Moment, Start, Trajectory, repeated
from imagining.observation_model import ObservationModel
from imagining.world_model import Observed
from models import make_behavior
from parts.acting import Sight
from parts.actors import Actor
from parts.latents import Feat
from parts.views import NodeSet
from settings.dreamer import DreamerSettings
from settings.imagination import ImaginationSettings
from tests.scenes import RANGE, debug_config, generator, random_rows, vector
from tools import Bounds, OneHotDist, uniform

OFFERS, NUMBERS = 5, 3
TASK = ObservationTask(actions=ActionSpec("discrete", (OFFERS,)), observations={"position": vector(2)})


class Offers(NamedTuple):
    """What a state offers: numbers of each candidate, and which of them can be had."""

    action_mask: Tensor
    numbers: Tensor

    def at(self, steps: slice) -> Offers:
        return Offers(self.action_mask[:, :, steps], self.numbers[:, :, steps])


class Chooser(Actor):
    """Scores each candidate by its own numbers."""

    latent_size = 0

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(NUMBERS, 1)

    def scores(self, feat: Feat | None, tables: Any, view: Offers) -> Tensor:
        return self.score(view.numbers).squeeze(-1)

    def distribution(self, scores: Tensor, view: Offers) -> OneHotDist:
        return OneHotDist(scores, mask=view.action_mask)


class Market(Imagination):
    """A known counter per state decides what is offered there; all else is in the latent."""

    model: ObservationModel

    def __init__(self, model: ObservationModel, settings: ImaginationSettings) -> None:
        super().__init__(settings, knows_mask=True, model=model)
        self.model, self.horizon, self.discount = model, 4, 1.0
        self.reads_latent = self.starts_at_rows = True

    def start(
        self, batch: dict[str, Tensor], observed: Observed | None, *, needs_latent: bool, generator: torch.Generator
    ) -> Start:
        assert observed is not None
        weight = (~batch["is_terminal"]).float()
        return Start(repeated(observed.latents, 1), torch.zeros_like(weight).long(), None, weight)

    def view(self, feat: Feat | None, state: Tensor, context: None) -> Moment:
        phase = state[..., None] + torch.arange(OFFERS)
        mask = phase % 3 != 0
        numbers = torch.stack([torch.sin(phase * (1.0 + part)) for part in range(NUMBERS)], -1)
        return Moment(feat, state, Offers(mask, numbers), mask)

    def step(self, state: Tensor, action: Tensor, feat: Any) -> tuple[Tensor, None]:
        return state + action + 1, None

    def cont(self, moments: Moment, finished: Tensor | None) -> Tensor:
        feat = moments.feat_at(slice(1, None))
        assert feat is not None
        return self.model.predict_cont(feat)

    def reward(self, trajectory: Trajectory, start: Start) -> Tensor:
        # What was taken earns its own first number.
        numbers = trajectory.moments.view.at(slice(0, -1)).numbers[..., 0]
        return numbers.gather(-1, trajectory.action[..., None]).squeeze(-1)

    def possible_returns(self, trajectory: Trajectory, start: Start, rewards: Bounds) -> None:
        return None

    def node_set(self, context: None) -> NodeSet | None:
        return None

    def first_notes(self, num_envs: int) -> dict[str, Any]:
        return {}

    def look(self, sight: Sight, notes: Mapping[str, Any], actor: Actor) -> Look:
        raise AssertionError("there is no acting here")


def test_candidates_that_change_with_every_state_are_imagined_and_learnt_from():
    settings = debug_config("gym", imag_horizon="4", **{"actor.type": "masked", "actor.advantage_scale": "none"})
    sections = DreamerSettings.of(settings)
    imagination = Market(ObservationModel(TASK, sections.model, discount=1.0), sections.imagination)
    behavior = make_behavior(TASK, imagination, settings=sections)
    behavior.actor = Chooser()
    batch = random_rows(TASK)
    noise = uniform((*batch["reward"].shape, imagination.model.rssm.stoch_size), generator(1))
    observed = imagination.model.observe(batch, noise)
    optimizer = torch.optim.Adam(behavior.actor.parameters(), lr=0.05)
    returns = []
    for update in range(40):
        losses, metrics = behavior.losses(batch, observed, progress=0.0, rewards=RANGE, generator=generator(update))
        assert metrics["miss_rate"] == 0 and metrics["imag_legal_step_0"] == 3
        optimizer.zero_grad()
        losses["actor"].backward()
        optimizer.step()
        returns.append(float(metrics["imag_return"]))
    assert sum(returns[-5:]) / 5 > sum(returns[:5]) / 5 + 0.5
