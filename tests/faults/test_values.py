"""Numbers that go wrong while a run learns: it survives them, or says why it cannot."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import checkpoint
from benchmarks.faults import KINDS, LASTING, PASSING, injecting, is_finite
from dreamer import Dreamer
from envs.tasks import RoutingTask
from guard import main as print_reports
from networks import TSPPointerActor
from parts import actors
from tests.faults.conftest import GUARDED, Outcome, Runner
from tests.scenes import without_times
from training.replay import Replay

# As short as two faults and what follows them allow: of its 14 updates, the faults come to the third and the seventh.
SHORT = ("--steps", "100")
# When a fault comes, as shares of that run, whose first half is prefill.
MOMENTS = (0.6, 0.75)
# These leave every loss and gradient finite, so that nothing needs to be skipped.
HARMLESS = ("a replayed reward of -2.2e6", "rows without a legal action", "NaN in the noise of the latents")


def at_update(number: int, change: Callable[[Dreamer, Replay], None]) -> Any:
    """A patch under which `change` happens right before an update."""
    update = Dreamer.update

    def with_change(agent: Dreamer, replay: Replay, *, progress: float) -> dict[str, Tensor]:
        if agent.learner.updates == number:
            with torch.no_grad():
                change(agent, replay)
        return update(agent, replay, progress=progress)

    return patch.object(Dreamer, "update", with_change)


def train_with_two(kind: str, runner: Runner, routing: list[str]) -> Outcome:
    """A run in which a fault comes at both moments."""
    with injecting([(moment, kind) for moment in MOMENTS], random.Random(0)) as came:
        run = runner.train(*routing, *SHORT)
    assert came[kind] == 2
    return run


@pytest.mark.parametrize("kind", PASSING)
def test_passing_fault_costs_single_updates(kind: str, runner, routing: list[str]):
    run = train_with_two(kind, runner, routing)
    if not GUARDED:
        return
    skips = sum(run.last(f"{group}_skips_max") for group in ("model", "actor", "critic"))
    assert (skips == 0) == (kind in HARMLESS)
    assert run.last("rollbacks_max") == 0
    assert len(run.reports()) == (0 if kind in HARMLESS else 2)


@pytest.mark.parametrize("kind", LASTING)
def test_lasting_fault_costs_a_return_to_the_last_good_state(kind: str, runner, routing: list[str]):
    run = train_with_two(kind, runner, routing)
    if not GUARDED:
        return
    assert run.last("rollbacks_max") == 2
    assert "back to the last good state" in run.text
    assert len(run.reports()) == 2


def test_same_faults_twice_give_the_same_metrics(runner, routing: list[str], tmp_path: Path):
    planned = [(0.4 + 0.02 * index, kind) for index, kind in enumerate(KINDS)]
    both = []
    for name in ("one", "other"):
        runner.logdir = tmp_path / name
        with injecting(planned, random.Random(0)):
            run = runner.train(*routing, "--guard.max_rollbacks", "20")
        both.append(without_times(run.rows))
    assert both[0] == both[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_coordinate_that_stays_in_replay_is_skipped_until_it_is_overwritten(
    value: float, runner, routing: list[str]
):
    def corrupt(_agent: Dreamer, replay: Replay) -> None:
        replay.rows["coords"][0, 7:14, 2] = value

    with at_update(2, corrupt):
        run = runner.train(*routing, "--guard.max_skips", "20")
    assert run.last("model_skips_max") > 0
    assert run.last("rollbacks_max") == 0


def fill_with_nan(_agent: Dreamer, replay: Replay) -> None:
    replay.rows["coords"].fill_(math.nan)


def test_replay_full_of_nan_stops_the_run_with_cause_and_remedy(runner, routing: list[str], capsys):
    with at_update(6, fill_with_nan):
        line = runner.refused(*routing)
    latest = runner.logdir / checkpoint.LATEST
    assert "times in a row, and 2 returns to the last good state have not helped" in line
    assert "not finite: replayed coords" in line and f"--init {latest}" in line
    assert is_finite(runner.logdir)
    report = sorted(map(str, (runner.logdir / "guard").glob("*.pt")))[0]
    assert print_reports([report]) == 0
    text = capsys.readouterr().out
    assert "replayed coords: shape (4, 7, 6, 2)" in text and "rows of replay" in text


def test_run_that_has_stopped_goes_on_from_its_last_good_state(runner, routing: list[str]):
    with at_update(6, fill_with_nan):
        runner.refused(*routing)
    latest = runner.logdir / checkpoint.LATEST
    runner.logdir = runner.logdir.with_name("next")
    run = runner.train(*routing, "--init", str(latest))
    assert "final evaluation: " in run.text and is_finite(run.logdir)


def test_checkpoint_of_a_broken_state_holds_the_last_good_one(runner, routing: list[str]):
    saved = []
    state_dict = Dreamer.state_dict

    def of_broken_state(agent: Dreamer) -> dict[str, Any]:
        if agent.learner.updates:
            with torch.no_grad():
                next(agent.behavior.actor.parameters()).fill_(math.nan)
        saved.append(agent.learner.updates)
        return state_dict(agent)

    with patch.object(Dreamer, "state_dict", of_broken_state):
        runner.train(*routing)
    assert len(saved) == 4


@pytest.mark.parametrize("size", [150.0, 1e4])
def test_logits_far_apart_are_survived(size: float, runner, cartpole: list[str]):
    def widen(agent: Dreamer, _replay: Replay) -> None:
        bias = [p for name, p in agent.behavior.actor.named_parameters() if name.endswith("bias")][-1]
        assert bias.shape == (2,)
        bias.copy_(torch.tensor([size, -size]))

    with at_update(2, widen):
        run = runner.train(*cartpole)
    assert run.last("actor_entropy_share") < 1
    assert run.last("rollbacks_max") == 0


def test_entropy_driven_to_zero_is_survived_and_warned_of(runner, cartpole: list[str]):
    def collapse(agent: Dreamer, _replay: Replay) -> None:
        bias = [p for name, p in agent.behavior.actor.named_parameters() if name.endswith("bias")][-1]
        bias.copy_(torch.tensor([60.0, -60.0]))

    with at_update(2, collapse):
        run = runner.train(*cartpole, "--actor.entropy", "0", "--actor.entropy_final", "0", "--actor.unimix", "0")
    assert run.last("actor_entropy_share") < 1e-3
    assert "warning: actor_entropy_share is" in run.text and "below 0.001" in run.text


@pytest.mark.slow
def test_value_explosion_is_warned_of_while_everything_is_finite(runner):
    run = runner.train(
        *("--steps", "400", "--train_ratio", "24", "--imag_start", "replay", "--imag_first", "stored"),
        *("--imag_horizon", "15", "--imag_tours", "1", "--baseline", "critic", "--imag_mask", "predicted"),
        *("--imag_penalty", "2", "--target_clip", "none", "--model_every", "4", "--critic.lr", "3e-3"),
        *("--critic.slow_scale", "0"),
    )
    first = next(row for row in run.rows if row.get("value_outside_rate", 0.0) > 0.1)
    assert all(value is not None for row in run.rows for value in row.values() if row["step"] <= first["step"])
    assert "warning: value_outside_rate is" in run.text
    assert run.last("critic_skips_max") == 0


def saturate(agent: Dreamer, replay: Replay) -> None:
    """Let all scores of the pointer be about -50, where its tanh is flat to the last bit and the policy uniform."""
    actor = agent.behavior.actor
    assert isinstance(actor, TSPPointerActor) and isinstance(agent.task, RoutingTask)
    last: Any = actor.encoder.layers[-1]
    last.hidden_norm.scale.mul_(0.02)
    last.hidden_norm.shift.fill_(1.0)
    actor.pointer.weight.zero_()
    actor.direct_to.weight.copy_(-actor.direct_from.weight)
    instance, _ = agent.task.rules.restore({key: value[:, 0] for key, value in agent._sample(replay).items()})
    size = actor.encode(agent.task.rules.node_features(instance)).direct.abs().mean()
    for layer in (actor.direct_from, actor.direct_to):
        layer.weight.mul_((FAR_OUT / size).sqrt())


FAR_OUT = 50.0
SATURATED = [
    *("--steps", "600", "--schedule.decay_from", "1", "--actor.pointer.latent", "0"),
    *("--actor.entropy", "0", "--actor.entropy_final", "0"),
]


def test_saturated_pointer_stays_so_without_the_penalty(runner, routing: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(actors, "SATURATION_PENALTY", 0.0)
    with at_update(2, saturate):
        run = runner.train(*routing, *SATURATED, "--steps", "150")
    assert [row["actor_grad_norm_max"] for row in run.rows if row["step"] >= 100 and "actor_grad_norm_max" in row] == [
        0.0
    ] * 2
    assert run.last("actor_saturation") == 1.0
    assert run.last("actor_entropy_share") == pytest.approx(1.0)


def test_saturated_pointer_is_warned_of_and_learns_again(runner, routing: list[str]):
    with at_update(2, saturate):
        run = runner.train(*routing, *SATURATED)
    assert "warning: actor_saturation is" in run.text
    assert run.last("actor_saturation") < 0.5
    assert run.last("actor_entropy_share") < 0.99
