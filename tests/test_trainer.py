from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoint
import config
import dreamer
import launch
from envs.instances import TEST_SEED, VALIDATION_SEED
from envs.routing import TSPRules, tour_length
from envs.tasks import ActionSpec, Task
from envs.vector import RoutingVectorEnv
from evaluation import Evaluation
from guard import Guard
from logger import METRICS, RunLock
from replay import Replay
from tests.scenes import decisions_in, refusal, stored_rows, without_times

CPU = torch.device("cpu")
NODES = 6
STEPS, CHECKPOINT_EVERY = 400, 200
ROOT = Path(dreamer.__file__).parent
ROUTING = Task(rules=TSPRules, actions=ActionSpec("discrete", (NODES,), masked=True), observations={})
COMMAND = ["--configs", "debug", "--steps", str(STEPS), "--checkpoint_every", str(CHECKPOINT_EVERY)]

Rows = list[dict[str, Any]]


def train(logdir: Path, *arguments: str) -> Rows:
    """A run in this process, and its metrics."""
    dreamer.main([*COMMAND, *arguments, "--logdir", str(logdir)])
    return read_metrics(logdir)


def read_metrics(logdir: Path) -> Rows:
    return [json.loads(line) for line in (logdir / METRICS).read_text().splitlines()]


def loaded(path: Path) -> dict[str, Any]:
    return checkpoint.load(path, CPU)


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = (loaded(logdir / checkpoint.LATEST)["agent"] for logdir in (one, other))
    return all(
        torch.equal(value, theirs[part][name]) for part in ("model", "behavior") for name, value in mine[part].items()
    )


def debug_agent() -> tuple[dreamer.Dreamer, dict[str, torch.Generator]]:
    generators = launch.make_generators(0, CPU)
    settings = config.load(ROOT / "configs.yaml", ["debug"], {})
    return dreamer.Dreamer(ROUTING, settings, device=CPU, generators=generators, guard=Guard("cpu")), generators


class Reference:
    """An undisturbed run."""

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.rows = train(logdir, "--checkpoint_numbered", "true")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference") / "run")


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


def test_no_update_happens_without_a_train_ratio(tmp_path: Path):
    rows = train(tmp_path, "--steps", "100", "--train_ratio", "0")
    assert "actor_loss" not in set().union(*rows)
    assert loaded(tmp_path / checkpoint.LATEST)["updates"] == 0


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


# Instances and generators


def some_instances(count: int = 8, seed: int = VALIDATION_SEED) -> Evaluation:
    return launch.make_evaluation(NODES, count, seed=seed)


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
        generator=launch.make_generators(1234, CPU)["environment"],
    )
    positions = {tuple(node) for node in env.reset()[0]["coords"].flatten(0, 1).tolist()}
    test_positions = {tuple(node) for node in some_instances(64, TEST_SEED).coords.flatten(0, 1).tolist()}
    assert len(positions) > 11_000 and len(test_positions) == 64 * NODES
    assert positions.isdisjoint(test_positions)


def test_generators_of_one_seed_are_independent():
    generators = launch.make_generators(0, CPU)
    draws = {role: tuple(torch.rand(4, generator=generator).tolist()) for role, generator in generators.items()}
    assert len(set(draws.values())) == len(launch.ROLES) == len(draws)
    again = launch.make_generators(0, CPU)
    assert all(tuple(torch.rand(4, generator=again[role]).tolist()) == draws[role] for role in draws)


# Killed, stopped and resumed


def start_process(logdir: Path) -> subprocess.Popen[bytes]:
    with (logdir.parent / f"{logdir.name}.stderr").open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "dreamer.py", *COMMAND, "--logdir", str(logdir)], cwd=ROOT, stderr=stderr
        )


def send(number: signal.Signals, process: subprocess.Popen[bytes], *, when: Callable[[], bool]) -> int:
    """Send a signal as soon as the condition holds, and return the exit status."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, "the run ended before its moment"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60)


def has_logged(logdir: Path, step: int) -> bool:
    metrics = logdir / METRICS
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def test_run_that_is_killed_three_times_ends_like_an_undisturbed_one(reference: Reference, tmp_path: Path):
    logdir = tmp_path / "run"
    latest = logdir / checkpoint.LATEST

    def before_the_first_checkpoint() -> bool:
        return has_logged(logdir, 100)

    def right_after_a_checkpoint() -> bool:
        return latest.exists()

    def some_time_later() -> bool:
        reached = has_logged(logdir, 300)
        if reached:
            time.sleep(random.uniform(0, 0.1))
        return reached

    for moment in (before_the_first_checkpoint, right_after_a_checkpoint, some_time_later):
        assert send(signal.SIGKILL, start_process(logdir), when=moment) == -signal.SIGKILL
    assert loaded(latest)["step"] in (200, 400)
    rows = train(logdir)
    assert without_times(rows) == without_times(reference.rows)
    assert same_weights(logdir, reference.logdir)


def test_sigterm_saves_and_the_same_command_goes_on(reference: Reference, tmp_path: Path):
    logdir = tmp_path / "run"
    process = start_process(logdir)
    assert send(signal.SIGTERM, process, when=lambda: has_logged(logdir, 100)) == 0
    stopped_at = loaded(logdir / checkpoint.LATEST)["step"]
    assert 100 <= stopped_at < STEPS
    stderr = (tmp_path / "run.stderr").read_text()
    assert f"stopped by SIGTERM at step {stopped_at}; saved. The same command goes on from there." in stderr
    assert "Traceback" not in stderr
    assert without_times(train(logdir)) == without_times(reference.rows)


def test_signal_handlers_are_the_callers_again_after_a_run(reference: Reference):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_run_that_has_ended_learns_nothing_more(reference: Reference, tmp_path: Path):
    logdir = tmp_path / "run"
    shutil.copytree(reference.logdir, logdir)
    rows = without_times(train(logdir))
    assert rows == without_times(reference.rows)
    assert same_weights(logdir, reference.logdir)


def test_resume_goes_on_from_the_named_checkpoint(reference: Reference, tmp_path: Path):
    start = reference.logdir / "step_000000200.pt"
    rows = train(tmp_path, "--resume", str(start))
    assert rows and all(row["step"] > 200 for row in rows)
    assert without_times(rows) == without_times([row for row in reference.rows if row["step"] > 200])
    assert rows[0]["seconds"] > loaded(start)["seconds"]


def test_init_takes_the_weights_and_nothing_else(reference: Reference, tmp_path: Path):
    latest = reference.logdir / checkpoint.LATEST
    rows = train(tmp_path, "--steps", "100", "--init", str(latest))
    assert rows[0]["step"] == 0
    (trained,) = [row for row in reference.rows if row["step"] == STEPS and "valid_gap" in row]
    assert rows[0]["valid_gap"] == trained["valid_gap"] != reference.rows[0]["valid_gap"]
    state = loaded(tmp_path / checkpoint.LATEST)
    assert state["step"] == 100
    assert state["agent"]["updates"] == state["updates"] < 20
    assert state["agent"]["optimizers"]["actor"]["updates"] == state["updates"]


def test_numbered_checkpoints_are_kept_on_request(reference: Reference, tmp_path: Path):
    names = sorted(path.name for path in reference.logdir.glob("step_*.pt"))
    assert names == ["step_000000200.pt", "step_000000400.pt"]
    train(tmp_path, "--steps", "100")
    assert not list(tmp_path.glob("step_*.pt"))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--actor.entrpy", "0.1"], "unknown key 'actor.entrpy'; the nearest is 'actor.entropy'"),
        (["--steps", "many"], "steps is 'many'; it takes a whole number"),
        (["--configs", "tsp_atn"], "no section 'tsp_atn'; the nearest is 'tsp_attn'"),
        (["--imag_mask", "guessed"], "imag_mask is 'guessed'; choose one of rules, predicted"),
        (["--imag_horizon", "10"], "baseline leave_one_out compares whole tours"),
        (["--actor.type", "transformer"], "actor.type is 'transformer'"),
        (["--task", "knapsack"], "task is 'knapsack'; choose one of tsp"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--prefill", "10"], "prefill is 10 env steps; 4 environments need 28"),
        (["--prefill_policy", "farthest"], "prefill_policy is 'farthest'; choose one of random, nearest"),
        (["--replay_capacity", "40"], "replay_capacity is 40 rows; 4 environments need 52"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--train_ratio", "-1"], "train_ratio is -1; it must be at least 0"),
        (["--nodes", "2"], "num_nodes is 2; a tour needs at least 3 nodes"),
        (["--model.rssm.blocks", "3"], "must both be multiples of 3 blocks"),
        (["--schedule.final_lr", "2"], "final_lr in [0, 1]"),
        (["--resume", "no/such/file.pt"], "no/such/file.pt cannot be opened"),
        (["--init", "no/such/file.pt"], "no/such/file.pt cannot be opened"),
        (["--resume", "a.pt", "--init", "b.pt"], "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_answered_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert message in refusal(capsys, *COMMAND, *arguments, "--logdir", str(tmp_path))
    assert not (tmp_path / METRICS).exists()


def test_checkpoint_of_another_network_is_refused(
    reference: Reference, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    latest = str(reference.logdir / checkpoint.LATEST)
    for flag in ("--init", "--resume"):
        line = refusal(capsys, *COMMAND, flag, latest, "--model.units", "24", "--logdir", str(tmp_path / flag))
        assert "does not fit this config" in line


def test_wrong_config_for_a_run_leaves_the_run_as_it_was(
    reference: Reference, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    logdir = tmp_path / "run"
    shutil.copytree(reference.logdir, logdir)
    files = [logdir / name for name in ("config.yaml", "run.json", METRICS, checkpoint.LATEST)]
    before = [file.read_bytes() for file in files]
    assert "does not fit this config" in refusal(capsys, *COMMAND, "--model.units", "24", "--logdir", str(logdir))
    assert [file.read_bytes() for file in files] == before


def test_garbage_as_checkpoint_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"no checkpoint at all")
    for flag in ("--init", "--resume"):
        assert "not a checkpoint" in refusal(capsys, *COMMAND, flag, str(garbage), "--logdir", str(tmp_path / "run"))


def test_init_in_a_logdir_with_a_run_is_refused_and_leaves_it_alone(
    reference: Reference, capsys: pytest.CaptureFixture[str]
):
    latest = str(reference.logdir / checkpoint.LATEST)
    line = refusal(capsys, *COMMAND, "--init", latest, "--logdir", str(reference.logdir))
    assert "has a run of its own" in line
    assert read_metrics(reference.logdir) == reference.rows


def test_logdir_in_use_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    lock = RunLock(tmp_path)
    try:
        assert "is in use by process" in refusal(capsys, *COMMAND, "--logdir", str(tmp_path))
    finally:
        lock.release()
    assert train(tmp_path, "--steps", "48")


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


def test_nan_that_comes_once_is_survived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plant_nan(monkeypatch, columns=range(42, 49))
    rows = train(tmp_path)
    assert "eval_gap" in rows[-1]
    assert max(row.get("actor_skips_max", 0) for row in rows) > 0
    assert finite_weights(tmp_path)
    report = loaded(next((tmp_path / "guard").glob("step_*.pt")))
    assert report["findings"][0]["name"] == "coords"
    assert (0, 42) in report["rows"]


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
