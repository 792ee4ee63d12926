"""The learner: what a failed update may and may not leave behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from guard import Guard, GuardSettings, NonFinite, culprit
from updates.learner import Computed, Learner
from updates.optimizer import Optimizer

SETTINGS = GuardSettings(max_skips=2, snapshot_every=4, max_rollbacks=2, recovery=6)


class Scene:
    """One group, whose loss draws noise and moves a statistic, as an agent's losses do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.guard = Guard("cpu", SETTINGS)
        self.network = nn.Linear(3, 1)
        self.statistic, self.before = torch.zeros(()), torch.zeros(())
        self.generators = {name: torch.Generator().manual_seed(7) for name in ("noise", "replay")}
        self.drawn: list[Tensor] = []
        self.made = 0
        self.learner = Learner(
            self.make_optimizers,
            modules={"network": self.network},
            watched={"network": self.network},
            follow=self.follow,
            generators=self.generators,
            guard=self.guard,
        )

    def make_optimizers(self) -> dict[str, Optimizer]:
        self.made += 1
        return {
            "network": Optimizer("network", {"network": self.network}, guard=self.guard, lr=0.1, clip=1.0, warmup=0)
        }

    def follow(self, applied: dict[str, Tensor]) -> None:
        self.statistic = torch.where(applied["network"] > 0, self.statistic, self.before)

    def update(self, scale: float = 1.0) -> dict[str, Tensor]:
        rows = torch.zeros(4, 1, dtype=torch.int64)
        batch = {"inputs": torch.full((4, 1, 3), scale), "is_first": rows.bool(), "env": rows, "column": rows}

        def compute() -> Computed:
            noise = torch.rand(4, 1, 3, generator=self.generators["noise"])
            self.drawn.append(noise)
            self.before, self.statistic = self.statistic, self.statistic + 1
            loss = self.network(batch["inputs"] + noise).square().mean()
            return Computed([(loss, ("network",))], {"seen": noise.mean()}, seen=noise)

        self.guard.update = self.learner.updates
        drawn = len(self.drawn)
        metrics, seen = self.learner.update(compute, batch=batch, progress=0.0)
        assert seen is self.drawn[drawn]
        return metrics

    def update_alone(self, scale: float = 1.0) -> dict[str, Tensor]:
        rows = torch.zeros(4, 1, dtype=torch.int64)
        batch = {"alone": torch.full((4, 1, 3), scale), "is_first": rows.bool(), "env": rows, "column": rows}

        def compute() -> Computed:
            return Computed([(self.network(batch["alone"]).square().mean(), ("network",))], {})

        return self.learner.update_alone("network", compute, batch=batch, progress=0.0)


def test_learner_makes_its_optimisers_once_and_no_sooner_than_the_first_update():
    scene = Scene()
    scene.learner.keep()
    scene.learner.mend()
    assert scene.made == 0
    scene.update()
    scene.update_alone()
    assert scene.made == 1


@pytest.mark.parametrize("update", [Scene.update, Scene.update_alone])
def test_first_good_state_is_the_one_before_the_first_update(update):
    scene = Scene()
    before = copy.deepcopy(scene.network.state_dict())
    update(scene)
    scene.network.weight.data.fill_(math.nan)
    scene.learner.mend()
    assert all(torch.equal(value, before[name]) for name, value in scene.network.state_dict().items())


@pytest.mark.parametrize("updates", [0, 1])
def test_learner_keeps_no_parameters_that_are_not_finite(updates: int):
    scene = Scene()
    for _ in range(updates):
        scene.update()
    scene.network.bias.data.fill_(math.inf)
    with pytest.raises(NonFinite, match=r"network\.bias"):
        scene.learner.keep()


def test_learner_keeps_parameters_that_were_loaded_as_the_good_ones():
    scene = Scene()
    scene.update()
    scene.network.weight.data.fill_(2.0)
    scene.learner.keep()
    scene.network.weight.data.fill_(math.nan)
    scene.learner.mend()
    assert bool((scene.network.weight == 2).all())


def test_update_returns_metrics_of_losses_optimisers_and_rollbacks():
    metrics = Scene().update()
    assert {"seen", "network_grad_norm", "rollbacks_max"} <= metrics.keys()
    assert metrics["rollbacks_max"] == 0


def test_update_that_is_fine_computes_its_losses_once():
    scene = Scene()
    scene.update()
    assert len(scene.drawn) == 1 and scene.statistic == 1 and scene.learner.updates == 1


def test_failed_update_is_computed_again_with_the_same_noise():
    scene = Scene()
    scene.update(math.nan)
    first, again = scene.drawn
    assert torch.equal(first, again)
    (report,) = scene.guard.reports
    assert culprit(report) == "replayed inputs"


def test_failed_update_leaves_parameters_statistics_and_generators_as_if_it_had_been_computed_once():
    scene, fine = Scene(), Scene()
    weight = scene.network.weight.clone()
    scene.update(math.nan)
    fine.update()
    assert torch.equal(scene.network.weight, weight)
    assert scene.statistic == 0
    for name, generator in scene.generators.items():
        assert torch.equal(generator.get_state(), fine.generators[name].get_state())


def test_way_back_draws_other_batches():
    scene = Scene()
    scene.update(math.nan)
    replay = scene.generators["replay"].get_state()
    metrics = scene.update(math.nan)
    assert metrics["rollbacks_max"] == 1
    assert not torch.equal(scene.generators["replay"].get_state(), replay)


@pytest.mark.parametrize("updates", [0, 3])
def test_restored_learner_goes_on_like_the_saved_one(updates: int):
    one, other = Scene(), Scene()
    for _ in range(updates):
        one.update()
    other.network.load_state_dict(one.network.state_dict())
    other.learner.load_state_dict(copy.deepcopy(one.learner.state_dict()))
    other.generators["noise"].set_state(one.generators["noise"].get_state())
    one.update()
    other.update()
    assert other.learner.updates == updates + 1
    assert torch.equal(one.network.weight, other.network.weight)


@pytest.mark.parametrize(("alone", "together"), [(math.nan, 1.0), (1.0, math.nan)])
def test_updates_that_keep_failing_are_not_hidden_by_others_of_their_group(alone: float, together: float):
    scene = Scene()
    for update in range(SETTINGS.max_skips):
        assert scene.learner.recovery.rollbacks == 0, update
        scene.update_alone(alone)
        scene.update(together)
    assert scene.learner.recovery.rollbacks == 1


def test_failed_update_of_one_group_alone_is_explained_by_its_own_batch():
    scene = Scene()
    scene.update_alone(1.0)
    scene.update_alone(math.nan)
    statistic = scene.statistic
    scene.update()
    (report,) = scene.guard.reports
    assert "alone" in culprit(report) and report["update"] == 0
    # What the update of all groups moved stays moved.
    assert scene.statistic == statistic + 1
