from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import checkpoint
import config
import dreamer
from envs.routing import TSPRules, tour_length
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from guard import Guard
from parts.acting import Sight
from routing.instances import TEST_SEED, VALIDATION_SEED
from tests.run_scenes import (
    CHECKPOINT_EVERY,
    CPU,
    NODES,
    ROOT,
    STEPS,
    Reference,
    loaded,
    train,
)
from tests.scenes import decisions_in, stored_rows, without_times
from training import devices, setup
from training.replay import Replay
from training.tours import Evaluation

ROUTING = RoutingTask.of(TSPRules, NODES)


def debug_agent() -> tuple[dreamer.Dreamer, dict[str, torch.Generator]]:
    generators = devices.make_generators(0, CPU)
    settings = config.load(ROOT / "configs.yaml", ["debug"], {})
    return dreamer.Dreamer.of(ROUTING, settings, device=CPU, generators=generators, guard=Guard("cpu")), generators


# What a run logs


def test_same_seed_gives_the_same_metrics(reference: Reference, tmp_path: Path):
    assert without_times(train(tmp_path)) == without_times(reference.rows)


def test_another_seed_gives_other_metrics(reference: Reference, tmp_path: Path):
    other = train(tmp_path, "--steps", "100", "--seed", "1")
    assert other[0]["step"] == reference.rows[0]["step"] == 0
    assert other[0]["valid_gap"] != reference.rows[0]["valid_gap"]


CONTRACT = {
    "train_return",
    "eval_return",
    "model_loss",
    "mask_loss",
    "actor_grad_norm",
    "actor_entropy",
    "value_min",
    "target_min",
    "target_clip_rate",
    "imag_mask_step_0",
    "miss_rate",
    "env_miss_rate",
    "fps",
    "valid_gap",
    "eval_gap",
}


def test_run_logs_the_scalars_of_the_contract(reference: Reference):
    assert set().union(*reference.rows) >= CONTRACT


def test_rows_are_flat_and_finite_and_ordered(reference: Reference):
    for row in reference.rows:
        assert {"step", "seconds"} < row.keys()
        assert all(isinstance(value, (int, float)) for value in row.values())
    for name in ("step", "seconds"):
        values = [row[name] for row in reference.rows]
        assert values == sorted(values)
    assert [row["step"] for row in reference.rows if "valid_gap" in row] == [0, 200, 400]
    assert [row["step"] for row in reference.rows if "fps" in row] == [100, 200, 300, 400]


def test_log_after_a_checkpoint_tells_what_it_took(reference: Reference):
    (row,) = [row for row in reference.rows if "checkpoint_seconds" in row]
    assert row["step"] == CHECKPOINT_EVERY + 100 and 0 < row["checkpoint_seconds"] < row["seconds"]
    # The numbered checkpoint is the same once more.
    (chunk,) = (reference.logdir / "replay").glob("000000000000-*")
    written = (reference.logdir / f"step_{CHECKPOINT_EVERY:09d}.pt").stat().st_size + chunk.stat().st_size
    assert row["checkpoint_megabytes"] == pytest.approx(written / 1e6, rel=1e-3)


def test_test_set_is_evaluated_once_at_the_end(reference: Reference):
    assert [row["step"] for row in reference.rows if "eval_gap" in row] == [STEPS]
    assert "eval_gap" in reference.rows[-1]


def test_no_action_was_illegal(reference: Reference):
    misses = [row[name] for row in reference.rows for name in ("miss_rate", "env_miss_rate") if name in row]
    assert len(misses) == 8
    assert set(misses) == {0.0}


# Env steps


SPACES = {
    "coords": ((NODES, 2), torch.float32),
    "visited": ((NODES,), torch.bool),
    "current_node": ((), torch.int64),
    "action_mask": ((NODES,), torch.bool),
    "action": ((), torch.int64),
}


def test_env_steps_count_decisions_and_no_resets(reference: Reference):
    state, rows = stored_rows(reference.logdir, SPACES)
    assert state["step"] == decisions_in(state, rows) == STEPS
    assert int(rows["is_first"].sum()) > 4 * 10


def test_replay_holds_whole_tours_with_the_rewards_of_their_moves(reference: Reference):
    _, rows = stored_rows(reference.logdir, SPACES)
    episodes = rows["action"].shape[1] // (NODES + 1)
    whole = {key: value[:, : episodes * (NODES + 1)].unflatten(1, (episodes, -1)) for key, value in rows.items()}
    assert whole["is_first"][:, :, 0].all() and not whole["is_first"][:, :, 1:].any()
    assert whole["is_last"][:, :, -1].all() and not whole["is_last"][:, :, :-1].any()
    assert torch.equal(whole["is_last"], whole["is_terminal"])
    assert (whole["reward"][:, :, 0] == 0).all()
    tours = whole["current_node"][:, :, :-1].flatten(0, 1)
    lengths = tour_length(whole["coords"][:, :, 0].flatten(0, 1), tours)
    torch.testing.assert_close(-whole["reward"].sum(-1).flatten(), lengths)
    assert torch.equal(whole["action"][:, :, :-1], whole["current_node"][:, :, 1:])


def test_updates_follow_the_train_ratio(reference: Reference):
    # 8 replayed rows per env step after the prefill of 48, in batches of 4 episodes of 7 rows.
    assert loaded(reference.logdir / checkpoint.LATEST)["updates"] == pytest.approx((STEPS - 48) * 8 / 28, abs=2)


@pytest.mark.run
def test_no_update_happens_without_a_train_ratio(tmp_path: Path):
    rows = train(tmp_path, "--steps", "100", "--train_ratio", "0")
    assert "actor_loss" not in set().union(*rows)
    assert loaded(tmp_path / checkpoint.LATEST)["updates"] == 0


@pytest.mark.run
@pytest.mark.parametrize("policy", ["random", "nearest"])
def test_prefill_follows_its_policy(tmp_path: Path, policy: str):
    train(tmp_path, "--steps", "96", "--prefill", "96", "--prefill_policy", policy)
    _, rows = stored_rows(tmp_path, SPACES)
    position = torch.take_along_dim(rows["coords"], rows["current_node"][..., None, None], 2)
    distance = (rows["coords"] - position).norm(dim=-1).masked_fill(~rows["action_mask"], torch.inf)
    decided = ~rows["is_last"]
    nearest = distance.argmin(-1) == rows["action"]
    assert rows["action_mask"].gather(-1, rows["action"][..., None]).squeeze(-1)[decided].all()
    assert bool(nearest[decided].all()) == (policy == "nearest")


@pytest.mark.run
def test_agent_acts_from_the_first_row_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Also during the prefill, whose last episodes it takes over."""
    begins: list[Tensor] = []
    act = dreamer.Dreamer.act

    def noting(agent: dreamer.Dreamer, sight: Sight, *arguments: Any, **options: Any) -> Any:
        if options["generator"] is not None:
            begins.append(sight.is_first.clone())
        return act(agent, sight, *arguments, **options)

    monkeypatch.setattr(dreamer.Dreamer, "act", noting)
    train(tmp_path, "--steps", "96", "--prefill", "60", "--train_ratio", "0")
    _, rows = stored_rows(tmp_path, SPACES)
    assert torch.stack(begins, 1).equal(rows["is_first"])


# Instances and generators


def some_instances(count: int = 8, seed: int = VALIDATION_SEED) -> Evaluation:
    return setup.make_evaluation(NODES, count, seed=seed)


def test_test_set_is_the_fields_and_validation_another():
    field = np.random.RandomState(1234).uniform(size=(10000, NODES, 2))
    assert np.allclose(some_instances(8, TEST_SEED).coords.numpy(), field[:8])
    own = np.random.RandomState(4321).uniform(size=(8, NODES, 2))
    assert np.allclose(some_instances(8).coords.numpy(), own)


def test_seed_1234_trains_on_no_test_instance():
    env = RoutingVectorEnv(
        TSPRules,
        num_envs=2000,
        num_nodes=NODES,
        device=CPU,
        generator=devices.make_generators(1234, CPU)["environment"],
    )
    positions = {tuple(node) for node in env.reset()[0]["coords"].flatten(0, 1).tolist()}
    test_positions = {tuple(node) for node in some_instances(64, TEST_SEED).coords.flatten(0, 1).tolist()}
    assert len(positions) > 11_000 and len(test_positions) == 64 * NODES
    assert positions.isdisjoint(test_positions)


def test_generators_of_one_seed_are_independent():
    generators = devices.make_generators(0, CPU)
    draws = {role: tuple(torch.rand(4, generator=generator).tolist()) for role, generator in generators.items()}
    assert len(set(draws.values())) == len(devices.ROLES) == len(draws)
    again = devices.make_generators(0, CPU)
    assert all(tuple(torch.rand(4, generator=again[role]).tolist()) == draws[role] for role in draws)


# Not a number


def plant_nan(monkeypatch: pytest.MonkeyPatch, *, columns: range) -> None:
    """Let a coordinate be NaN in the columns of replay."""
    add = Replay.add

    def add_with_nan(self: Replay, row: dict[str, torch.Tensor]) -> None:
        coords = row["coords"].clone()
        if self.total in columns:
            coords[0, 0, 0] = torch.nan
        add(self, {**row, "coords": coords})

    monkeypatch.setattr(Replay, "add", add_with_nan)


def finite_weights(logdir: Path) -> bool:
    agent = loaded(logdir / checkpoint.LATEST)["agent"]
    values = [value for part in ("model", "behavior") for value in agent[part].values() if value.is_floating_point()]
    assert values
    return all(bool(value.isfinite().all()) for value in values)


@pytest.mark.run
def test_nan_that_comes_once_is_survived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plant_nan(monkeypatch, columns=range(42, 49))
    rows = train(tmp_path, "--steps", "220", "--checkpoint_every", "110")
    assert "eval_gap" in rows[-1]
    assert max(row.get("actor_skips_max", 0) for row in rows) > 0
    assert finite_weights(tmp_path)
    report = loaded(next((tmp_path / "guard").glob("step_*.pt")))
    assert report["findings"][0]["name"] == "coords"
    assert (0, 42) in report["rows"]


@pytest.mark.run
def test_report_that_cannot_be_written_stops_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plant_nan(monkeypatch, columns=range(42, 49))
    save = checkpoint.save

    def full(path: Path, state: Any, **options: Any) -> None:
        if path.parent.name == "guard":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, state, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    rows = train(tmp_path, "--steps", "220", "--checkpoint_every", "110")
    assert "eval_gap" in rows[-1]
    assert "cannot be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.run
def test_checkpoint_that_a_full_disk_does_not_take_leaves_its_room_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    save = checkpoint.save

    def full(path: Path, state: Any, **options: Any) -> None:
        if path.name == checkpoint.LATEST and state["step"] == STEPS:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, state, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(SystemExit):
        train(tmp_path)
    named = {chunk["name"] for chunk in loaded(tmp_path / checkpoint.LATEST)["replay"]["chunks"]}
    assert {path.name for path in (tmp_path / "replay").iterdir()} == named and named


@pytest.mark.run
def test_nan_everywhere_stops_the_run_and_leaves_finite_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plant_nan(monkeypatch, columns=range(10**9))
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, "--envs", "1", "--prefill", "14", "--guard.max_skips", "2", "--guard.max_rollbacks", "1")
    assert stopped.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "1 returns to the last good state have not helped; not finite: replayed coords" in last_line
    state = loaded(tmp_path / checkpoint.LATEST)
    assert f"stopped at step {state['step']}. {tmp_path / checkpoint.LATEST} holds the last good state" in last_line
    assert finite_weights(tmp_path)
    agent, _ = debug_agent()
    agent.load_state_dict(state["agent"])


@pytest.mark.run
def test_one_emergency_after_another_leaves_the_last_regular_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    train(tmp_path, "--steps", "200")
    plant_nan(monkeypatch, columns=range(10**9))
    fragile = ["--guard.max_skips", "1", "--guard.max_rollbacks", "0"]
    regular = loaded(tmp_path / checkpoint.LATEST)["step"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            train(tmp_path, "--steps", "400", *fragile)
        assert loaded(tmp_path / checkpoint.PREVIOUS)["step"] == regular == 200
        assert loaded(tmp_path / checkpoint.LATEST)["emergency"]
