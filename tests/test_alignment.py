from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from envs.tasks import RoutingTask, Task
from guard import Guard
from imagining.behavior import make_actor
from imagining.imagination import Noise, imagine
from settings.dreamer import ActorSettings
from tests.conftest import shapes_executed
from tests.scenes import (
    NODES,
    ROUTING,
    SCRIPTED,
    WORTH,
    debug_config,
    generator,
    imagination_in,
    make_world_model,
    routing_replay,
    scripted_replay,
)
from tools import uniform
from updates.optimizer import Optimizer


class Learner:
    """A world model with its optimiser, taught from replay."""

    def __init__(self, model: Any, *, lr: float = 5e-3) -> None:
        self.model = model
        self.optimizer = Optimizer("model", {"model": model}, guard=Guard("cpu"), lr=lr, clip=10.0)
        self.noise = generator(1)

    def learn(self, batch: dict[str, Tensor]) -> float:
        losses, _, _ = self.model.loss(batch, self.draw(batch))
        total = sum((self.model.loss_scales[name] * loss for name, loss in losses.items()), torch.zeros(()))
        self.optimizer.step(total, progress=0.0)
        return float(total.detach())

    def draw(self, batch: dict[str, Tensor]) -> Tensor:
        return uniform((*batch["reward"].shape, self.model.rssm.stoch_size), self.noise)

    @torch.no_grad()
    def feat(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.observe(batch, self.draw(batch)).latents.feat()


class Taught(NamedTuple):
    """A learner that has seen its task, and rows that it is asked about."""

    learner: Learner
    batch: dict[str, Tensor]
    feat: Tensor


@pytest.fixture(scope="module")
def scripted() -> Taught:
    torch.manual_seed(0)
    replay, draws = scripted_replay(), generator(2)
    learner = Learner(make_world_model(SCRIPTED))
    with shapes_executed(False):
        for _ in range(250):
            learner.learn(replay.sample_windows(16, 12, generator=draws))
    batch = replay.sample_windows(64, 12, generator=draws)
    return Taught(learner, batch, learner.feat(batch))


def mean_error(predicted: Tensor, actual: Tensor) -> float:
    return float((predicted - actual).abs().mean().detach())


def test_reward_head_predicts_the_reward_of_the_action_before_the_row(scripted: Taught):
    reward, predicted = scripted.batch["reward"], scripted.learner.model.predict_reward(scripted.feat)
    # The first row of a window is left out: the action before it is not in the window.
    assert mean_error(predicted[:, 1:], reward[:, 1:]) < 0.1
    assert mean_error(predicted[:, 1:-1], reward[:, 2:]) > 0.7
    assert mean_error(predicted[:, 2:], reward[:, 1:-1]) > 0.7


def test_reward_head_carries_nothing_over_an_episodes_end(scripted: Taught):
    first = scripted.batch["is_first"]
    assert first[:, 1:].any(1).all()
    assert (scripted.batch["reward"][first] == 0).all()
    assert scripted.learner.model.predict_reward(scripted.feat)[first].abs().mean() < 0.1


def test_cont_head_tells_termination_from_truncation(scripted: Taught):
    cont = scripted.learner.model.predict_cont(scripted.feat)
    terminated = scripted.batch["is_terminal"]
    truncated = scripted.batch["is_last"] & ~terminated
    assert terminated.any() and truncated.any()
    assert cont[terminated].mean() < 0.1
    assert cont[truncated].mean() > 0.9
    assert cont[~scripted.batch["is_last"]].mean() > 0.9


def test_cont_loss_takes_the_terminal_row_for_the_only_end(scripted: Taught):
    model, batch = scripted.learner.model, scripted.batch
    noise = scripted.learner.draw(batch)
    with torch.no_grad():
        right = model.loss(batch, noise)[0]["cont"]
        wrong = model.loss({**batch, "is_terminal": batch["is_last"]}, noise)[0]["cont"]
        same = model.loss({**batch, "is_last": torch.zeros_like(batch["is_last"])}, noise)[0]["cont"]
    assert right < 0.1 < wrong
    assert same == right


def test_imagined_reward_is_that_of_the_imagined_action(scripted: Taught):
    model = scripted.learner.model
    changes = {"imag_horizon": "3", "imag_start": "replay", "imag_first": "stored", "baseline": "critic"}
    settings = debug_config(imag_tours=1, target_clip="none", **{"actor.type": "masked"}, **changes)
    imagination, actor = (
        imagination_in(model, settings),
        make_actor(SCRIPTED, imagination_in(model, settings), ActorSettings.of(settings)),
    )
    observed = model.observe(scripted.batch, scripted.learner.draw(scripted.batch))
    start = imagination.start(scripted.batch, observed, needs_latent=True, generator=generator(3))
    noise = Noise(latent=torch.rand(2, *start.weight.shape, model.rssm.stoch_size), action=torch.rand(2, 64, 12))
    trajectory = imagine(imagination, actor, start=start, tables=None, noise=noise, horizon=2)
    # Two moves further the episode still goes on; what follows its end answers no action.
    inner = scripted.batch["clock"][..., 0] < 0.3
    reward, worth = imagination.reward(trajectory, start)[inner], WORTH[trajectory.action][inner]
    assert len(worth.unique()) == len(WORTH)
    assert mean_error(reward, worth) < 0.15
    assert mean_error(reward[:, 0], worth[:, 1]) > 0.5


@pytest.mark.run
@pytest.mark.parametrize("reward_latent", [False, True])
def test_move_head_predicts_the_next_rows_reward_of_the_rows_own_move(reward_latent: bool):
    replay, draws = routing_replay(reward_is_target=True), generator(2)
    learner = Learner(make_world_model(ROUTING, reward_latent=reward_latent))
    for _ in range(100):
        learner.learn(replay.sample_episodes(16, NODES + 1, generator=draws))
    batch = replay.sample_episodes(64, NODES + 1, generator=draws)
    feat, rows, reward = learner.feat(batch), torch.arange(64)[:, None], batch["reward"]
    origin = batch["coords"][:, 0][rows, batch["current_node"]]
    target = batch["coords"][:, 0][rows, batch["action"]]
    with torch.no_grad():
        predicted = learner.model.predict_move(origin, target, feat)
    assert mean_error(predicted[:, :-1], reward[:, 1:]) < 0.1
    assert mean_error(predicted[:, :-2], reward[:, 2:]) > 0.2
    assert mean_error(predicted[:, 1:-1], reward[:, 1:-1]) > 0.2


@pytest.mark.run
@pytest.mark.parametrize("task", [ROUTING, SCRIPTED], ids=["routing", "vectors"])
def test_model_overfits_one_batch(task: Task):
    learner = Learner(make_world_model(task, free_nats=0.0), lr=1e-2)
    if not isinstance(task, RoutingTask):
        batch = scripted_replay().sample_windows(4, 8, generator=generator())
    else:
        batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    totals = [learner.learn(batch) for _ in range(80)]
    assert sum(totals[-5:]) / 5 < totals[0] / 3
