"""The chances of actions, computed at once or some trajectories at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imagining import chances
from imagining.chances import chances_of
from parts.actors import TSPPointerActor
from parts.views import View

BATCH, TOURS, STEPS, NODES = 3, 5, 4, 6


# All the tours of an instance; two of them, and one that is left over; one.
@pytest.mark.parametrize("together", [TOURS * STEPS * NODES, 2 * STEPS * NODES, 1])
def test_a_few_trajectories_at_a_time_have_the_chances_of_all_together(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    actor = TSPPointerActor(4, 2, width=8, layers=1, heads=2, hidden=8, latent=0, clip=10.0, unimix=0.01)
    # So wild that some are penalised.
    scores = (5 * torch.randn(BATCH, TOURS, STEPS, NODES)).requires_grad_()
    mask = torch.rand(BATCH, TOURS, STEPS, NODES) > 0.3
    mask[..., 0] = True
    view, action, counts = View(mask), mask.int().argmax(-1), torch.rand(BATCH, TOURS, STEPS) > 0.3

    def looked_at() -> tuple[chances.Chances, Tensor]:
        found = chances_of(action, scores, actor, view, counts=counts)
        total = (found.log_prob * torch.arange(STEPS)).sum() + found.entropy.square().sum() + found.penalty
        return found, torch.autograd.grad(total, scores)[0]

    whole, gradient = looked_at()
    monkeypatch.setattr(chances, "TOGETHER", together)
    parts, gradient_of_parts = looked_at()
    assert float(whole.penalty.detach()) > 0 and whole.metrics.keys() == parts.metrics.keys() and whole.metrics
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient_of_parts, gradient)


def test_wild_scores_after_an_episodes_end_cost_nothing() -> None:
    actor = TSPPointerActor(4, 2, width=8, layers=1, heads=2, hidden=8, latent=0, clip=10.0, unimix=0.0)
    scores, mask = torch.zeros(1, 1, 3, NODES), torch.ones(1, 1, 3, NODES, dtype=torch.bool)
    scores[:, :, 2] = 20.0
    action, counts = torch.zeros(1, 1, 3, dtype=torch.int64), torch.tensor([[[True, True, True]]])
    assert float(chances_of(action, scores, actor, View(mask), counts=counts).penalty) > 0
    counts[..., 2] = False
    found = chances_of(action, scores, actor, View(mask), counts=counts)
    assert float(found.penalty) == 0 and float(found.metrics["actor_saturation"]) == 0
