"""The planner as an agent: it learns, survives what is not finite, and says where that came in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import config
import planner
from guard import Guard, culprit
from imitation.losses import LOSSES
from imitation.task import PlanningTask
from planner import Imitator
from tests.imitation_scenes import MODES, POINTS, driven, features
from training.devices import make_generators

CPU = torch.device("cpu")
LINES = [3, 0, 1, 2]


def make_agent(**changes: str) -> Imitator:
    """A small one, that is not disturbed by a warm-up."""
    small = {
        "schedule.warmup": "0",
        "guard.max_skips": "2",
        **{key.replace("__", "."): each for key, each in changes.items()},
    }
    settings = config.load(planner.CONFIGS, ["planner", "debug"], small)
    torch.manual_seed(0)
    return Imitator.of(
        PlanningTask(MODES, POINTS), settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU)
    )


def learn(agent: Imitator, rows: dict[str, Tensor], updates: int = 1) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for _ in range(updates):
        metrics = agent.learn(rows, driven(rows), progress=0.0)
    return metrics


def weights(agent: Imitator) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in agent.network.parameters()])


def test_imitator_learns_what_was_driven_in_a_few_rows():
    agent, rows = make_agent(planner__lr="1e-2"), features(LINES)
    first = learn(agent, rows)
    last = learn(agent, rows, updates=40)
    assert last["trajectory_loss"] < 0.5 * first["trajectory_loss"]
    assert last["choice_loss"] < 0.5 * first["choice_loss"] and last["choice_accuracy"] == 1


def test_every_weight_learns():
    agent = make_agent()
    before = {name: value.clone() for name, value in agent.network.named_parameters()}
    # Outputs begin at zero, so that what lies before them learns from the second update on.
    learn(agent, features(LINES), updates=3)
    still = [name for name, value in agent.network.named_parameters() if torch.equal(value, before[name])]
    assert still == []


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_counts_by_its_scale(name: str):
    others = {f"planner__loss_scales__{other}": "0" for other in LOSSES if other != name}
    metrics = learn(make_agent(**others, **{f"planner__loss_scales__{name}": "3"}), features(LINES))
    assert float(metrics["planner_loss"]) == pytest.approx(3 * float(metrics[f"{name}_loss"]))


def test_batches_without_a_line_and_without_a_known_future_are_learnt_from():
    agent, rows = make_agent(), features([0, 0])
    assert learn(agent, rows)["planner_skips_max"] == 0
    nothing = driven(rows)._replace(future_valid=torch.zeros(2, POINTS, dtype=torch.bool))
    assert agent.learn(rows, nothing, progress=0.0)["planner_loss"] == 0
    assert weights(agent).isfinite().all() and agent.guard.findings() == []


def with_nan(name: str) -> Callable[[Imitator, dict[str, Tensor]], None]:
    def spoil(agent: Imitator, rows: dict[str, Tensor]) -> None:
        rows[name].view(-1)[0] = math.nan

    return spoil


def with_nan_from(name: str) -> Callable[[Imitator, dict[str, Tensor]], None]:
    def spoil(agent: Imitator, rows: dict[str, Tensor]) -> None:
        layer = agent.network.get_submodule(name)
        layer.register_forward_hook(lambda _module, _inputs, output: output * math.nan)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (with_nan("lines"), "replayed lines"),
        (with_nan("agents"), "replayed agents"),
        (with_nan("ego"), "replayed ego"),
        (with_nan_from("scene.lines.point"), "output of planner.scene.lines.point"),
        (with_nan_from("scene.agents.point"), "output of planner.scene.agents.point"),
        (
            with_nan_from("decoder.layers.0.along_lines.attention.query"),
            "output of planner.decoder.layers.0.along_lines.attention.query",
        ),
        (
            with_nan_from("decoder.layers.0.to_scene.attention.key_value"),
            "output of planner.decoder.layers.0.to_scene.attention.key_value",
        ),
    ],
)
def test_the_report_says_whether_it_came_in_with_lines_agents_or_attention(spoil: Any, cause: str):
    agent, rows = make_agent(), features([3, 3])
    rows["agents_valid"][:] = True
    learn(agent, rows)
    before = weights(agent)
    spoil(agent, rows)
    learn(agent, rows, updates=2)
    assert culprit(agent.guard.reports[0]) == cause
    assert torch.equal(weights(agent), before)


def test_weights_that_are_not_finite_are_named_and_taken_back():
    agent, rows = make_agent(), features(LINES)
    learn(agent, rows)
    layer = agent.network.get_submodule("decoder.layers.0.along_modes.attention.out")
    with torch.no_grad():
        next(layer.parameters())[0] = math.nan
    learn(agent, rows, updates=2)
    assert culprit(agent.guard.reports[0]) == "state planner.decoder.layers.0.along_modes.attention.out.weight"
    assert weights(agent).isfinite().all() and learn(agent, rows)["planner_loss"].isfinite()


def test_padding_that_is_not_finite_is_no_fault():
    agent, rows = make_agent(), features(LINES, padding=math.nan)
    assert learn(agent, rows)["planner_skips_max"] == 0 and weights(agent).isfinite().all()


def test_state_goes_on_exactly():
    agent, rows = make_agent(), features(LINES)
    learn(agent, rows, updates=3)
    other = make_agent(seed="5")
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for each in (agent, other):
        learn(each, rows, updates=2)
    assert torch.equal(weights(agent), weights(other)) and other.learner.updates == 5


def test_weights_are_taken_without_the_optimiser():
    agent, other = make_agent(), make_agent(seed="5")
    learn(agent, features(LINES), updates=2)
    other.load_weights(agent.state_dict())
    assert torch.equal(weights(agent), weights(other)) and other.learner.updates == 0
