from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guard import Guard, GuardSettings, NonFinite
from updates import recovery
from updates.optimizer import Optimizer, update_together
from updates.recovery import Recovery

NAN, INF = math.nan, math.inf
SETTINGS = GuardSettings(max_skips=3, snapshot_every=4, max_rollbacks=2, recovery=6)


class Scene:
    """Two groups of parameters, `left` and `right`, trained side by side, and what watches them."""

    def __init__(self, settings: GuardSettings = SETTINGS, *, algorithm: str = "adam") -> None:
        torch.manual_seed(0)
        self.guard = Guard("cpu", settings)
        self.modules = {"left": nn.Linear(3, 2), "right": nn.Linear(3, 2)}
        self.optimizers = {
            name: Optimizer(name, {name: module}, guard=self.guard, lr=0.1, clip=1.0, algorithm=algorithm, warmup=0)
            for name, module in self.modules.items()
        }
        self.recovery = Recovery(self.optimizers, self.modules, guard=self.guard)
        self.update = 0
        self.diagnosed: list[int] = []

    def step(self, **scales: float) -> bool:
        """One update; the losses of the named groups are scaled. Returns whether there was a way back."""
        inputs = torch.linspace(-1, 1, 12).view(4, 3) + self.update / 10
        losses = [
            (module(inputs).square().sum() * scales.get(name, 1.0), [self.optimizers[name]])
            for name, module in self.modules.items()
        ]
        update_together(losses, progress=0.0)
        went_back = self.recovery.after_update(self.update, diagnose=self._diagnose)
        self.update += 1
        return went_back

    def _diagnose(self) -> dict[str, Any]:
        self.diagnosed.append(self.update)
        return {"findings": [], "seen": [], "rows": []}

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.recovery._state().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_recovery_leaves_an_undisturbed_run_alone():
    scene, alone = Scene(), Scene(GuardSettings(enabled=False))
    assert not any([scene.step() for _ in range(10)])
    for _ in range(10):
        alone.step()
    assert same(scene.state(), alone.state())
    assert scene.guard.notices == scene.guard.reports == []


@pytest.mark.parametrize("algorithm", ["adam", "laprop"])
def test_skip_leaves_the_group_as_it_was_and_the_other_goes_on(algorithm: str):
    scene = Scene(algorithm=algorithm)
    scene.step()
    before = scene.state()
    assert not scene.step(left=NAN)
    after = scene.state()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("left"), name


def test_skips_in_a_row_lead_back_to_the_state_that_was_kept():
    scene = Scene()
    for _ in range(4):
        scene.step()
    kept = scene.state()
    for _ in range(2):
        scene.step()
    assert not same(scene.state(), kept)
    assert [scene.step(left=INF) for _ in range(3)] == [False, False, True]
    assert same(scene.state(), kept)
    assert scene.recovery.rollbacks == 1


def test_skips_with_good_updates_between_them_lead_nowhere():
    scene = Scene()
    assert not any(scene.step(left=NAN if update % 3 else 1.0) for update in range(12))


def test_skipped_updates_are_no_good_state_to_keep():
    scene = Scene()
    for _ in range(3):
        scene.step()
    start = scene.recovery._good
    scene.step(left=NAN)
    assert all(torch.equal(value, scene.recovery._good[name]) for name, value in start.items())


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_broken_parameter_leads_back_at_once(value: float):
    scene = Scene()
    for _ in range(5):
        scene.step()
    with torch.no_grad():
        scene.modules["right"].weight[0, 0] = value
    assert scene.step()
    assert all(tensor.isfinite().all() and tensor.abs().max() < 1e3 for tensor in scene.state().values())


@pytest.mark.parametrize("algorithm", ["adam", "laprop"])
@pytest.mark.parametrize("group", ["left", "right"])
def test_infinite_second_moment_leads_back_at_the_next_look_at_the_latest(group: str, algorithm: str):
    scene = Scene(algorithm=algorithm)
    for _ in range(4):
        scene.step()
    kept = scene.state()
    (name,) = [name for name in kept if name.endswith(("weight.exp_avg_sq", "weight.square")) and group in name]
    scene.recovery._state()[name][0, 0] = INF
    # LaProp's averages pass it on to the parameter.
    steps = {"adam": 4, "laprop": 1}[algorithm]
    assert [scene.step() for _ in range(steps)] == [False] * (steps - 1) + [True]
    assert same(scene.state(), kept)
    (report,) = scene.guard.reports
    assert name in [entry["name"] for entry in report["state"]]


@pytest.mark.parametrize("algorithm", ["adam", "laprop"])
def test_way_back_before_anything_was_kept_leads_to_the_very_beginning(algorithm: str):
    scene, fresh = Scene(algorithm=algorithm), Scene(algorithm=algorithm)
    scene.step()
    for _ in range(3):
        scene.step(right=NAN)
    assert scene.recovery.rollbacks == 1
    begun = scene.state()
    assert all(torch.equal(value, begun[name]) for name, value in fresh.state().items())
    assert all((value == 0).all() for name, value in begun.items() if "optimizer" in name)
    # The same updates from there are those of a run that has just begun, at half the rate.
    for optimizer in fresh.optimizers.values():
        optimizer.recover(SETTINGS.recovery)
    fresh.update = scene.update
    scene.step()
    fresh.step()
    assert same(scene.state(), fresh.state())


def test_learning_rate_is_halved_for_a_while():
    scene = Scene()
    for _ in range(3):
        scene.step(left=NAN)
    rates = []
    for _ in range(8):
        rates.append(scene.optimizers["right"].rate(0.0))
        scene.step()
    assert rates == [0.05] * 6 + [0.1] * 2


def test_too_many_ways_back_raise_and_leave_the_good_state():
    scene = Scene()
    for _ in range(4):
        scene.step()
    kept = scene.state()
    for _ in range(3 * 3 - 1):
        scene.step(left=NAN)
    with pytest.raises(NonFinite, match=r"skipped left 3 times in a row, and 2 returns .* have not helped"):
        scene.step(left=NAN)
    assert same(scene.state(), kept)
    assert scene.recovery.rollbacks == 3


def test_good_stretch_forgives_earlier_ways_back():
    scene = Scene()
    for _ in range(5):
        for _ in range(3):
            scene.step(left=NAN)
        for _ in range(8):
            scene.step()
    assert scene.recovery.rollbacks == 5


def test_row_of_failures_is_diagnosed_once():
    scene = Scene()
    scene.step()
    scene.step(left=NAN)
    scene.step(left=NAN, right=NAN)
    scene.step()
    scene.step(right=NAN)
    assert scene.diagnosed == [1, 4]
    assert [report["verdict"] for report in scene.guard.reports] == ["skipped left", "skipped right"]
    assert len(scene.guard.notices) == 2


def test_reports_end_but_ways_back_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recovery, "MOST_REPORTS", 2)
    scene = Scene()
    for _ in range(4):
        scene.step(left=NAN)
        scene.step()
    assert len(scene.guard.reports) == 2
    assert [line for line in scene.guard.notices if "only counted" in line] == [
        "guard: 2 events reported; from here on they are only counted"
    ]
    assert [scene.step(left=NAN) for _ in range(3)][-1]


def test_mend_takes_up_the_good_state_of_a_broken_one_only():
    scene = Scene()
    scene.step()
    before = scene.state()
    scene.recovery.mend()
    assert same(scene.state(), before) and not scene.guard.notices
    with torch.no_grad():
        scene.modules["left"].bias[0] = NAN
    scene.recovery.mend()
    assert all(tensor.isfinite().all() for tensor in scene.state().values())
    assert scene.guard.notices == ["guard: the state is not finite: back to the last good one"]


def test_resumed_recovery_goes_back_to_what_was_loaded():
    scene, resumed = Scene(), Scene()
    for _ in range(6):
        scene.step()
    for name, optimizer in resumed.optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(scene.optimizers[name].state_dict()))
        resumed.modules[name].load_state_dict(scene.modules[name].state_dict())
    resumed.recovery.load_state_dict(scene.recovery.state_dict())
    resumed.update = scene.update
    loaded = resumed.state()
    assert same(loaded, scene.state())
    for _ in range(3):
        resumed.step(left=NAN)
    assert same(resumed.state(), loaded)
    resumed.step()
    assert not same(resumed.state(), loaded)


def test_guard_that_is_off_does_nothing():
    scene = Scene(GuardSettings(enabled=False))
    assert not any(scene.step(left=NAN) for _ in range(20))
    assert scene.modules["left"].weight.isnan().all()
