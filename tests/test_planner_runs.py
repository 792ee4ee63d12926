"""Runs of planner.py over logs made by hand: the whole way, gone on with, judged, and loaded to drive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoint
import planner
from driving.features import features
from scenarios.logs import LogFolder
from tests.scenario_scenes import write_logs

CPU = torch.device("cpu")
# A recording of three logs, the last two of which validate and test, and one of another map that is held out.
NAMES = ("crossing-0-00000", "crossing-0-00020", "crossing-0-00040")
UPDATES = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with logs, and with a run on them."""
    folder = tmp_path_factory.mktemp("place")
    write_logs(folder, *NAMES, frames=40)
    run(folder, "whole")
    return folder


def arguments(folder: Path, name: str) -> list[str]:
    return [
        *("--configs", "debug", "--device", "cpu", "--logdir", str(folder / name), "--split.held_out_maps", "[]"),
        *("--logs.path", str(folder / "logs"), "--cache.path", str(folder / "cache"), "--cache.workers", "0"),
        *("--log_every", "10", "--eval_every", "20", "--checkpoint_every", "10", "--checkpoint_numbered", "true"),
        *("--updates", str(UPDATES), "--schedule.warmup", "5"),
    ]


def run(folder: Path, name: str, *more: str) -> None:
    planner.main([*arguments(folder, name), *more])


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        planner.main(list(given))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("planner.py: ")
    return line


@pytest.mark.run(shapes=True)
def test_a_run_learns_and_is_judged_by_logs_that_it_has_not_learnt_from(place: Path):
    rows = read_rows(place / "whole")
    losses = [row["planner_loss"] for row in rows if "planner_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    errors = [row["valid_ade"] for row in rows if "valid_ade" in row]
    assert len(errors) == 3 and all(np.isfinite(errors))
    assert rows[-1]["step"] == UPDATES and rows[-1]["eval_min_ade"] <= rows[-1]["eval_ade"]
    # Two cars, each for 40 frames, of which the last 16 lack a whole future.
    assert rows[-1]["eval_rows"] == 2 * 24


@pytest.mark.run
def test_a_run_goes_on_exactly_from_any_checkpoint(place: Path):
    run(place, "again", "--resume", str(place / "whole" / "step_000000020.pt"))
    one, other = (checkpoint.load(place / name / checkpoint.LATEST, CPU) for name in ("whole", "again"))
    assert one["updates"] == other["updates"] == UPDATES
    for name, value in one["agent"]["planner"].items():
        assert torch.equal(value, other["agent"]["planner"][name])
    last = [read_rows(place / name)[-2:] for name in ("whole", "again")]
    for mine, theirs in zip(*last, strict=True):
        assert all(
            theirs[key] == value for key, value in mine.items() if not key.startswith(("seconds", "fps", "checkpoint"))
        )


@pytest.mark.run
def test_modes_judge_the_run_of_the_same_command(place: Path, capsys: pytest.CaptureFixture[str]):
    final = read_rows(place / "whole")[-1]
    for mode, name in (("test", "test"), ("validate", "valid")):
        capsys.readouterr()
        run(place, "whole", "--mode", mode)
        line = capsys.readouterr().out.strip()
        assert line.startswith(f"{place / 'whole'} at update {UPDATES}: 48 rows of the set {name}")
        if mode == "test":
            assert f"the best-scored {final['eval_ade']:.3g} m" in line


@pytest.mark.run
def test_what_judging_does_not_take_from_the_command_line_is_told(place: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    run(place, "whole", "--mode", "validate", "--planner.width", "32", "--planner.valid_rows", "5")
    told = capsys.readouterr()
    assert "--planner.width changes nothing" in told.err and "--updates" not in told.err
    # Of 5 rows spread over all, those at the end lack a whole future.
    assert "3 rows of the set valid" in told.out


@pytest.mark.run
def test_mode_cache_computes_what_train_then_finds(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_logs(tmp_path, *NAMES, frames=40)
    run(tmp_path, "none", "--mode", "cache")
    first = capsys.readouterr().out
    run(tmp_path, "none", "--mode", "cache")
    assert "computed 12 scenarios" in first and "nothing was computed" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.run
def test_a_loaded_planner_drives_by_the_candidate_that_it_scores_best(place: Path):
    trained = planner.load(place / "whole")
    log, road_map = LogFolder(place / "logs").open(NAMES[0])
    seen = features(log, road_map, log.ids, 3, targets=False)
    for row in range(len(log.ids)):
        obs = {name: values[row] for name, values in seen.items()}
        action, trajectory = trained.choose(obs)
        assert obs["action_mask"][action] and trajectory.shape == (16, 3)
        assert np.array_equal(trained(obs), trajectory) and np.isfinite(trajectory).all()


@pytest.mark.run
def test_other_rows_than_a_run_has_learnt_from_are_refused(place: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(place / "whole", place / "copy")
    line = refusal(capsys, *arguments(place, "copy"), "--updates", "60", "--scenario_filter.total", "4")
    assert "has learnt from 78 rows, and the cache has 39 now" in line and "another --logdir" in line


@pytest.mark.run
def test_weights_begin_a_run(place: Path):
    run(place, "tuned", "--init", str(place / "whole" / checkpoint.LATEST), "--updates", "10")
    losses = [row["planner_loss"] for row in read_rows(place / "tuned") if "planner_loss" in row]
    assert losses[0] < read_rows(place / "whole")[1]["planner_loss"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mode", "drive"], "--mode is 'drive'; choose one of cache, train, validate, test"),
        (["--mode", "test", "--init", "x.pt"], "--init goes with --mode train"),
        (["--steps", "10"], "only dreamer.py reads steps"),
        (["--configs", "tsp_attn"], "section tsp_attn is for another program: python dreamer.py --configs tsp_attn"),
        (["--planner.width", "30"], "planner.width is 30; planner.heads, 4, has to divide it without a rest"),
        (["--planner.widht", "30"], "unknown key 'planner.widht'; the nearest is 'planner.width'"),
        (["--planner.loss_scales.choice", "-1"], "planner.loss_scales.choice is -1; it must be at least 0"),
        (["--mode", "test", "--logdir", "no/run"], "no/run does not exist"),
        (["--cache.only", "true", "--cache.path", "no/cache"], "no/cache is no finished cache"),
        (["--cache.only", "true", "--cache.path", "no/cache", "--mode", "cache"], "no/cache is no finished cache"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_mistake_is_answered_in_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in refusal(capsys, *given, "--device", "cpu")


def test_the_planner_is_not_for_the_other_programs(capsys: pytest.CaptureFixture[str]):
    import dreamer

    with pytest.raises(SystemExit):
        dreamer.main(["--planner.width", "32"])
    assert "only planner.py reads planner.width" in capsys.readouterr().err
