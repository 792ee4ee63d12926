from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import checkpoint
from comparing.runs import METRICS
from config import ConfigError
from tests.run_scenes import (
    COMMAND,
    Reference,
    read_metrics,
    train,
)
from tests.scenes import refusal
from training import setup
from training.logdirs import claimed
from training.run_lock import RunLock


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--actor.entrpy", "0.1"], "unknown key 'actor.entrpy'; the nearest is 'actor.entropy'"),
        (["--steps", "many"], "steps is 'many'; it takes a whole number"),
        (["--configs", "tsp_atn"], "no section 'tsp_atn'; the nearest is 'tsp_attn'"),
        (["--configs", "sac_pendulum"], "python sac.py --configs sac_pendulum"),
        (["--lr", "1"], "unknown key 'lr'; the nearest are 'model.lr', 'actor.lr', 'critic.lr'"),
        (["--sac.lr", "1"], "only sac.py reads sac.lr"),
        (["--imag_mask", "guessed"], "imag_mask is 'guessed'; choose one of rules, predicted"),
        (["--imag_horizon", "10"], "baseline leave_one_out compares whole tours"),
        (["--actor.type", "transformer"], "actor.type is 'transformer'"),
        (["--task", "knapsack"], "task is 'knapsack'; choose one of tsp"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--seed", "99999999999999999999"], "seed is 1e+20; it must be between 0 and 9.22337e+18"),
        (["--cost", "./own.py:toll"], "cost names './own.py:toll', which cannot be loaded"),
        (["--imag_reward", "math:pi"], "imag_reward names 'math:pi', which is float and no function"),
        (["--prefill", "10"], "prefill is 10; 4 environments need more for whole episodes of 7 rows"),
        (["--prefill_policy", "farthest"], "prefill_policy is 'farthest'; choose one of random, nearest"),
        (["--replay_capacity", "40"], "whole episodes of 7 rows each: add --replay_capacity 52"),
        (
            ["--replay_capacity", "1" + 16 * "0", "--steps", "1" + 16 * "0"],
            "rows of replay do not fit into memory; lower replay_capacity",
        ),
        (["--nodes", "200"], "add --prefill 804 --replay_capacity 1604"),
        (["--critic.bins", "-1"], "critic.bins is -1; it must be at least 3"),
        (["--critic.units", "1e18"], "the networks do not fit into memory"),
        (["--threads", "1e18"], "threads is 1e+18; it must be between 1 and 4096"),
        (["--eval_instances", "1e18"], "eval_instances is 1e+18; it must be between 1 and 1e+06"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--train_ratio", "-1"], "train_ratio is -1; it must be at least 0"),
        (["--nodes", "2"], "num_nodes is 2; a tour needs at least 3 nodes"),
        (["--model.rssm.blocks", "3"], "must both be multiples of 3 blocks"),
        (["--schedule.final_lr", "2"], "schedule.final_lr is 2; it must be between 0 and 1"),
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


@pytest.mark.run
@pytest.mark.parametrize("key", ["cost", "imag_reward"])
def test_error_in_a_function_of_the_users_own_keeps_its_traceback(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The function works for the 16 moves that are tried before the run.
    (tmp_path / f"own_{key}.py").write_text(
        "def own(*arguments):\n"
        "    if len(arguments) == 3 and len(arguments[0]) == 16:\n"
        "        return (arguments[0] - arguments[1]).norm(dim=-1)\n"
        "    raise ValueError('my own')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="my own"):
        train(tmp_path / "run", f"--{key}", f"own_{key}:own")


@pytest.mark.parametrize(("key", "value"), [("nodes", "7"), ("model.units", "24"), ("critic.layers", "1")])
def test_another_config_on_a_used_logdir_is_refused_before_references_are_sought(
    key: str,
    value: str,
    reference: Reference,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(setup, "make_evaluation", lambda *_args, **_named: pytest.fail("references were sought"))
    line = refusal(capsys, *COMMAND, f"--{key}", value, "--logdir", str(reference.logdir))
    assert f"{key} " in line and value in line


def test_failed_start_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(*_args: object, **_named: object) -> None:
        raise ConfigError("no references")

    monkeypatch.setattr(setup, "make_evaluation", fail)
    there = tmp_path / "there"
    there.mkdir()
    for logdir in (tmp_path / "new" / "run", there):
        assert "no references" in refusal(capsys, *COMMAND, "--logdir", str(logdir))
    assert list(tmp_path.iterdir()) == [there]


def test_logdir_that_is_deleted_meanwhile_keeps_the_error_that_it_led_to(tmp_path: Path):
    def fail() -> None:
        with claimed(tmp_path / "new" / "run"):
            shutil.rmtree(tmp_path / "new")
            raise ConfigError("of the run")

    with pytest.raises(ConfigError, match="of the run"):
        fail()


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


@pytest.mark.run
@pytest.mark.parametrize("maker", ["benchmarks/sac_peer.py", "sac.py", None])
def test_logdir_with_a_run_of_another_program_is_refused_and_left_alone(
    maker: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (log := tmp_path / METRICS).write_text('{"step": 100000, "eval_return": 1.0}\n')
    if maker:
        (tmp_path / "run.json").write_text(json.dumps({"program": maker}))
    line = refusal(capsys, *COMMAND, "--logdir", str(tmp_path))
    assert f"holds a run of {maker or 'another program'}, which would be lost" in line
    assert "eval_return" in log.read_text() and not (tmp_path / "config.yaml").exists()
    # A run of the same program that made no checkpoint begins anew.
    (tmp_path / "run.json").write_text(json.dumps({"program": "dreamer.py"}))
    assert train(tmp_path, "--steps", "48")[0]["step"] < 100000


@pytest.mark.run
def test_logdir_in_use_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    lock = RunLock(tmp_path)
    try:
        assert "is in use by process" in refusal(capsys, *COMMAND, "--logdir", str(tmp_path))
    finally:
        lock.release()
    assert train(tmp_path, "--steps", "48")


@pytest.mark.parametrize(
    ("key", "value"),
    [("reward_scale", "0.5"), ("cost", "lanes"), ("task", "cvrp"), ("nodes", "7"), ("envs", "3")],
)
def test_run_of_another_task_is_refused_before_it_is_touched(
    key: str, value: str, reference: Reference, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    logdir = tmp_path / "run"
    shutil.copytree(reference.logdir, logdir)
    before = (logdir / "config.yaml").read_bytes()
    more = ["--imag_first", "stored", "--prefill", "96"] if key == "task" else []
    line = refusal(capsys, *COMMAND, f"--{key}", value, *more, "--logdir", str(logdir))
    assert f"has {key} " in line and "give another --logdir" in line
    assert (logdir / "config.yaml").read_bytes() == before


def test_resume_into_another_run_is_refused_and_leaves_it_alone(
    reference: Reference, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    train(tmp_path, "--steps", "100", "--seed", "5")
    rows = read_metrics(tmp_path)
    start = str(reference.logdir / checkpoint.LATEST)
    assert "has a run of its own" in refusal(capsys, *COMMAND, "--resume", start, "--logdir", str(tmp_path))
    assert read_metrics(tmp_path) == rows
