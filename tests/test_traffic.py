"""Traffic that is carried along: how it is read from observations, stepped, and foreseen by what is learnt of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config import UserError
from driving.candidates import ACTIONS, MODES
from driving.features import AGENTS, FEATURES, features
from driving.lines import LINE_FEATURES, LINES, POINTS
from driving.scene import STEP, Log
from envs.tasks import ActionSpec, CandidateSpec, ObservationKey, ObservationTask
from imagining.traffic import Traffic, motion_error, observed, observed_before
from imagining.traffic import features as read
from imagining.traffic_model import TrafficModel
from tests.driving_scenes import crossing, log_of, straight
from tests.scenes import SCRIPTED, Scene, vector


def key_of(name: str) -> ObservationKey:
    size = math.prod(FEATURES[name].shape)
    return ObservationKey("classes", (size,), torch.int64, (2,) * size) if name.endswith("_valid") else vector(size)


OBSERVED = ("ego", "agents", "agents_valid", "lines", "lines_valid")
TASK = ObservationTask(
    ActionSpec("discrete", (ACTIONS,), masked=True),
    {name: key_of(name) for name in OBSERVED},
    candidates=CandidateSpec(LINES, POINTS, LINE_FEATURES, MODES),
)
MOVING: dict[str, Any] = {"actor.type": "candidates", "actor.units": 16, "imag_horizon": "2", "imag_tours": 1}
MOVING |= {"model.loss_scales.motion": 1.0}


def rows_of(log: Log, agent: int, frames: range) -> dict[str, Tensor]:
    """Rows of an ego of a log as a replayed sequence [1, T]."""
    found = [features(log, crossing(), np.array([agent]), frame) for frame in frames]
    batch = {name: torch.from_numpy(np.stack([row[name][0] for row in found]))[None] for name in found[0]}
    batch = {name: batch[name] for name in (*OBSERVED, "action_mask", "action")}
    batch = {name: value.flatten(2) if value.ndim > 3 else value for name, value in batch.items()}
    flags = torch.zeros(1, len(frames), dtype=torch.bool)
    batch |= {"is_first": flags.clone(), "is_last": flags, "is_terminal": flags, "reward": flags.float()}
    batch["is_first"][:, 0] = True
    batch["prev_action"] = torch.cat((torch.zeros_like(batch["action"][:, :1]), batch["action"][:, :-1]), 1)
    return batch


def braking(x: float, speed: float, frames: int, *, by: float) -> list[tuple[float, float, float, float]]:
    """A track to the east that loses `by` m/s in every half second."""
    track = []
    for _ in range(frames):
        track.append((x, 0.0, 0.0, speed))
        x, speed = x + STEP * (speed - by / 2), speed - by
    return track


def traffic_of(*agents: tuple[float, float, float, float], length: float = 4.0, width: float = 1.8) -> Traffic:
    """Of (x, y, heading, speed) of each, the ego first."""
    table = torch.tensor(agents, dtype=torch.float32)
    none = torch.zeros(len(agents))
    there = torch.ones(len(agents), dtype=torch.bool)
    sizes = torch.full_like(none, length)
    widths = torch.full_like(none, width)
    return Traffic(table[:, :2], table[:, 2], table[:, 3], none, none, none, sizes, widths, torch.tensor(10.0), there)


def test_traffic_moves_on_by_hand():
    traffic = traffic_of((0, 0, 0, 10), (5, 5, math.pi / 2, 1), (0, 0, 0, 0))
    later = traffic.after(torch.tensor([[2.0, 0, 1.0], [-4.0, 0, 0], [0, 0.2, 0]]))
    # 10 and 11 m/s on average for half a second, and 1 m/s to the left; who brakes harder than it drives, stands.
    torch.testing.assert_close(later.place, torch.tensor([[5.25, 0.5], [5.0, 5.25], [0.0, 0.0]]))
    assert later.speed.tolist() == [11.0, 0.0, 0.0] and later.acceleration.tolist() == [2.0, -2.0, 0.0]
    torch.testing.assert_close(later.heading, torch.tensor([0.0, math.pi / 2, 0.1]))
    gone = traffic._replace(valid=torch.tensor([True, False, True])).after(torch.full((3, 3), torch.nan))
    assert gone.place[1].tolist() == [5.0, 5.5]


def test_traffic_turns_along_the_middle_of_its_turn():
    (later,) = traffic_of((0, 0, 0, 10)).after(torch.tensor([[0.0, math.pi / 2, 0.0]])).place
    torch.testing.assert_close(later, 5 * torch.tensor([math.cos(math.pi / 8), math.sin(math.pi / 8)]))


def test_traffic_is_read_from_what_an_ego_observes():
    log = log_of({1: braking(0, 8.0, 4, by=1.0), 2: straight(20, 6.0, 4), 3: straight(0, 4.0, 4, y=3.0)})
    traffic = observed(rows_of(log, 1, range(3, 4)))
    # At 1.5 s the ego is at 9.75 m with 5 m/s, the others at 29 m and at (6, 3) m.
    torch.testing.assert_close(traffic.place[0, 0, :3], torch.tensor([[0.0, 0.0], [-3.75, 3.0], [19.25, 0.0]]))
    assert traffic.speed[0, 0, :3].tolist() == pytest.approx([5.0, 4.0, 6.0])
    assert traffic.valid[0, 0].tolist() == [True] * 3 + [False] * (AGENTS - 2)
    assert (traffic.place[0, 0, 3:] == 0).all()


def test_acceleration_of_others_is_that_of_the_last_half_second():
    log = log_of({1: straight(0, 8.0, 4), 2: braking(20, 8.0, 4, by=1.0)})
    traffic = observed(rows_of(log, 1, range(3, 4)))
    assert traffic.acceleration[0, 0, 1].item() == pytest.approx(-2.0)
    assert traffic.yaw_rate[0, 0, 1].item() == traffic.slip[0, 0, 1].item() == pytest.approx(0.0)


def test_traffic_before_a_row_leads_to_it():
    frames = 6
    arc = [(20 * math.sin(0.1 * n), 20 - 20 * math.cos(0.1 * n), 0.1 * n, 4.0) for n in range(frames)]
    log = log_of({1: arc, 2: straight(20, 6.0, frames), 3: braking(-30, 9.0, frames, by=0.5)}, kinds={})
    batch = rows_of(log, 1, range(2, frames))
    before, now = observed_before(batch), observed(batch)
    change = torch.stack((now.acceleration, now.yaw_rate, now.slip), -1)
    error = (before.after(change).place - now.place).norm(dim=-1)[:, 1:]
    # The chord of an arc is a little shorter than the arc.
    assert error[..., :3].max() < 0.02
    # As the row before has seen it, and as the row has it that follows.
    earlier, later = observed({name: value[:, :-1] for name, value in batch.items()}), before
    for name in ("speed", "acceleration", "length"):
        torch.testing.assert_close(getattr(earlier, name)[..., :1], getattr(later, name)[:, 1:, :1])
    seen, again = read(earlier)[..., :3, :], read(Traffic(*(part[:, 1:] for part in later)))[..., :3, :]
    order = [torch.argsort(each[0, :, 1:3, 0]) for each in (seen, again)]
    for one, other, first, second in zip(seen[0], again[0], *order, strict=True):
        torch.testing.assert_close(one[1:][first], other[1:][second], atol=2e-2, rtol=1e-2)
    assert not before.valid[:, 0, 0]


def test_who_drives_in_front_is_the_nearest_on_the_way():
    traffic = traffic_of((0, 0, 0, 10), (34, 1, 0, 4), (19, -1, 0, 7), (10, 4, 0, 1), (-9, 0, 0, 15))
    front = read(traffic)[:, -3:]
    # 15 m between the bumpers of the ego and the third, of 60 m at most; 3 m/s slower.
    assert front[0].tolist() == pytest.approx([0.75, -0.3, 1.0])
    assert front[1].tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert front[4].tolist() == pytest.approx([1 - 5 / 60, -0.5, 1.0])


def test_who_is_not_there_changes_nothing_and_gets_no_gradient():
    log = log_of({1: braking(0, 8.0, 4, by=1.0), 2: straight(20, 6.0, 4)})
    batch = rows_of(log, 1, range(2, 4))
    spoilt = batch["agents"].clone()
    spoilt[batch["agents_valid"].unflatten(-1, (AGENTS, 3)).repeat_interleave(8, -1).flatten(2) == 0] = torch.nan
    spoilt.requires_grad_()
    made = Scene(TASK, **MOVING)
    torch.nn.init.normal_(made.model.motion.others.output.weight)
    foreseen = [
        traffic.after(
            made.model.motion(traffic, torch.ones(1, 2, made.model.rssm.feat_size), torch.ones(1, 2, ACTIONS))
        )
        for traffic in (observed(batch), observed({**batch, "agents": spoilt}))
    ]
    torch.testing.assert_close(foreseen[0].place, foreseen[1].place)
    foreseen[1].place.sum().backward()
    assert spoilt.grad is not None and spoilt.grad.isfinite().all() and spoilt.grad.abs().max() > 0
    assert (spoilt.grad[spoilt.isnan()] == 0).all()


def test_error_of_motion_is_a_mean_over_those_who_count():
    seen = traffic_of((0, 0, 0, 10), (5, 5, 0, 1), (9, 9, 0, 0))
    foreseen = seen._replace(place=seen.place + torch.tensor([[1.0, 0.0], [0.0, 2.0], [50.0, 0.0]]))
    error = motion_error(foreseen, seen, torch.tensor([True, True, False]))
    # Smooth L1 whose square reaches to 0.2 m: 0.9 and 1.9 m.
    assert error.item() == pytest.approx((0.9 + 1.9) / 2)
    round_about = seen._replace(heading=seen.heading + 2 * math.pi)
    assert motion_error(round_about, seen, seen.valid).item() == pytest.approx(0, abs=1e-5)


def moving() -> tuple[Scene, dict[str, Tensor]]:
    """A model, and rows of an ego that closes up to one who brakes."""
    log = log_of({1: braking(0, 9.0, 10, by=0.5), 2: braking(25, 8.0, 10, by=0.8), 3: straight(2, 6.0, 10, y=3.0)})
    return Scene(TASK, **MOVING), rows_of(log, 1, range(2, 10))


def test_model_begins_with_constant_velocity():
    made, batch = moving()
    assert isinstance(made.model, TrafficModel)
    noise = torch.rand(1, 11, made.model.rssm.stoch_size)
    first = {name: value[:, :1] for name, value in batch.items()}
    traffic = made.model.foresee(
        first, steps=3, choose=lambda step, latent, traffic: first["action"][:, 0], noise=noise
    )
    start = observed(first)
    expected = start.place[:, 0] + 1.5 * start.speed[:, 0, :, None] * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(traffic[-1].place[:, :4], expected[:, :4])
    _, metrics, _ = made.model.loss(batch, torch.rand(1, 8, made.model.rssm.stoch_size))
    assert metrics["motion_loss"] == metrics["motion_constant_velocity"] > 0


def test_one_batch_of_motion_is_learnt():
    made, batch = moving()
    noise = torch.rand(1, 8, made.model.rssm.stoch_size)
    optimizer = torch.optim.Adam(made.model.motion.parameters(), lr=1e-2)
    feat = made.model.observe(batch, noise).latents.feat().detach()
    for _ in range(60):
        error, still = (part.sum() for part in made.model._motion_errors(batch, feat))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.1 * still


def errors_of(made: Scene, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
    return made.model._motion_errors(batch, made.model.observe(batch, noise).latents.feat())[0]


def test_motion_is_foreseen_by_nothing_that_happens_after_it():
    made, batch = moving()
    torch.nn.init.normal_(made.model.motion.ego.output.weight)
    noise = torch.rand(1, 8, made.model.rssm.stoch_size)
    # What is seen of lines in a row, and what is done there.
    changed = {**batch, "lines": batch["lines"].clone(), "prev_action": batch["prev_action"].clone()}
    changed["lines"][:, 5] = 100 * torch.randn_like(changed["lines"][:, 5])
    changed["prev_action"][:, 6] = ACTIONS - 1
    seen = [made.model.observe(each, noise).latents.feat()[:, 5] for each in (batch, changed)]
    assert not torch.equal(*seen)
    one, other = (errors_of(made, each, noise) for each in (batch, changed))
    torch.testing.assert_close(one[:, :6], other[:, :6])
    assert (one[:, 6:] != other[:, 6:]).any() and one[0, 0] == 0


@pytest.mark.parametrize("task", [SCRIPTED, TASK], ids=["no candidates", "no agents"])
def test_motion_of_a_task_without_traffic_is_refused(task: ObservationTask):
    seen = {name: key for name, key in task.observations.items() if name != "agents"}
    without = ObservationTask(task.actions, seen, candidates=task.candidates)
    with pytest.raises(UserError, match="model.loss_scales.motion is .*set it to 0"):
        Scene(without, **{**MOVING, "actor.type": "masked"})
