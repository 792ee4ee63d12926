"""What imitation is trained on and measured by, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imitation.decoder import Plans
from imitation.losses import Driven, imitation_losses, masked_average, turned
from imitation.metrics import BEST, constant_velocity, errors

TRUE = torch.ones(1, 2, dtype=torch.bool)


def plans(trajectories: Tensor, scores: Tensor, mask: Tensor | None = None) -> Plans:
    return Plans(trajectories, scores, torch.ones_like(scores, dtype=torch.bool) if mask is None else mask)


def straight(*speeds: float, points: int = 2) -> Tensor:
    """A candidate for each speed, in metres a step."""
    ahead = torch.tensor(speeds)[:, None] * torch.arange(1, points + 1)
    return torch.stack((ahead, torch.zeros_like(ahead), torch.zeros_like(ahead)), -1)[None]


def driven(action: int, speed: float, valid: Tensor = TRUE) -> Driven:
    return Driven(torch.tensor([action]), straight(speed, points=valid.shape[1])[0], valid)


def test_masked_average_by_hand():
    assert masked_average(torch.tensor([1.0, math.nan, 5.0]), torch.tensor([True, False, True])) == 3


def test_masked_average_of_nothing_is_0_with_gradient_0():
    values = torch.tensor([math.nan, 1.0], requires_grad=True)
    average = masked_average(values, torch.zeros(2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(average, values)
    assert average == 0 and (gradient == 0).all()


def test_turned_is_the_short_way_round():
    angles = torch.tensor([0.5, 2 * math.pi + 0.5, 1.5 * math.pi, -1.5 * math.pi])
    torch.testing.assert_close(turned(angles), torch.tensor([0.5, 0.5, -0.5 * math.pi, 0.5 * math.pi]))


def test_losses_by_hand():
    """The chosen candidate is 1 m too far, then 2 m; the last, without a line, 3 m, then 6 m."""
    made = plans(straight(2.0, 4.0), torch.tensor([[0.0, math.log(3)]]))
    losses, metrics = imitation_losses(made, driven(0, 1.0))
    # Smooth L1 is half the square up to 1 m, and the distance less a half beyond.
    assert float(losses["trajectory"]) == pytest.approx((0.5 + 1.5) / 2)
    assert float(losses["free"]) == pytest.approx((2.5 + 5.5) / 2)
    assert float(losses["choice"]) == pytest.approx(math.log(4))
    assert metrics["choice_accuracy"] == 0


def test_headings_count_by_the_turn_between_them():
    trajectory = torch.zeros(1, 1, 1, 3)
    trajectory[..., 2] = math.pi - 0.1
    future = torch.tensor([[[0.0, 0.0, -math.pi + 0.1]]])
    known = Driven(torch.tensor([0]), future, torch.ones(1, 1, dtype=torch.bool))
    losses, _ = imitation_losses(plans(trajectory, torch.zeros(1, 1)), known)
    assert float(losses["trajectory"]) == pytest.approx(0.5 * 0.4**2)


def test_points_that_are_not_known_count_nowhere():
    first = torch.tensor([[True, False]])
    losses, _ = imitation_losses(plans(straight(2.0, 4.0), torch.zeros(1, 2)), driven(0, 1.0, first))
    assert float(losses["trajectory"]) == 0.5


def test_a_batch_without_any_known_point_trains_nothing():
    trajectories, scores = straight(2.0, 4.0).requires_grad_(), torch.zeros(1, 2, requires_grad=True)
    losses, metrics = imitation_losses(plans(trajectories, scores), driven(0, math.nan, ~TRUE))
    gradients = torch.autograd.grad(torch.stack([*losses.values()]).sum(), (trajectories, scores))
    assert all(loss == 0 for loss in losses.values()) and all((gradient == 0).all() for gradient in gradients)
    assert all(metric.isfinite() for metric in metrics.values())


def test_errors_by_hand():
    """Candidates are 0, 1, 2 ... metres a step too fast; the eighth is best, and scored seventh."""
    speeds = [1.0 + (number - 7) for number in range(8)]
    made = plans(straight(*speeds), -torch.tensor([[*range(6), 7.0, 6.0]]))
    found = errors(made, driven(7, 1.0), speed=torch.tensor([4.0]))
    assert BEST == 6 and found["ade"] == (7 + 14) / 2 and found["fde"] == 14
    # Of the six that are scored best, the sixth is 2 m a step too slow.
    assert found["min_ade"] == (2 + 4) / 2 and found["oracle_ade"] == 0 and found["choice"] == 0
    # 4 m/s are 2 m in each half second, where 1 m was driven.
    assert found["constant_velocity_ade"] == (1 + 2) / 2


def test_errors_are_of_legal_candidates_alone():
    mask = torch.tensor([[False, False, True]])
    made = plans(straight(1.0, 1.0, 3.0), torch.tensor([[5.0, 4.0, 0.0]]), mask)
    found = errors(made, driven(2, 1.0), speed=torch.tensor([2.0]))
    assert found["ade"] == found["min_ade"] == found["oracle_ade"] == 3 and found["choice"] == 1


def test_errors_are_of_known_points_alone():
    made = plans(straight(2.0, 2.0), torch.zeros(1, 2))
    found = errors(made, driven(0, 1.0, torch.tensor([[True, False]])), speed=torch.tensor([2.0]))
    assert found["ade"] == found["fde"] == 1 and found["constant_velocity_ade"] == 0


def test_constant_velocity_by_hand():
    assert constant_velocity(torch.tensor([4.0]), points=2).tolist() == [[[2.0, 0.0, 0.0], [4.0, 0.0, 0.0]]]
