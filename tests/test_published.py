"""Released figures beside a run's own."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import compare
import config
from comparing import published
from comparing.runs import CONFIG_FILE
from config import Config, ConfigError
from envs.suites.atari import Atari
from training.logger import Logger

SWINGUP = "dmc_cartpole_swingup"


def write(
    logdir: Path, returns: dict[int, float], *, seed: int = 0, task: str = SWINGUP, repeat: int = 2, kwargs: str = ""
) -> Path:
    """A run with the returns of training episodes by the env step that they ended at."""
    logdir.mkdir(parents=True)
    settings = {"seed": seed, "logdir": str(logdir), "task": task, "env": {"repeat": repeat, "kwargs": kwargs}}
    config.save(Config(settings), logdir / CONFIG_FILE)
    logger = Logger(logdir)
    for step, value in returns.items():
        logger.scalars(step, step / 60, {"train_return": value})
    logger.close()
    return logdir


def loaded(path: Path) -> compare.Run:
    (run,) = compare.load([str(path)], {})
    return run


def test_scores_are_those_that_were_released():
    scores = published.scores_of("dmc_proprio", SWINGUP)
    at = scores.steps.tolist().index(50_000)
    assert (scores.seeds, scores.mean[at], scores.std[at]) == (5, 321.6, 71.3)


def test_every_suite_has_scores_in_rising_steps():
    for suite, task in zip(published.SUITES, ("atari_pong", SWINGUP, SWINGUP), strict=True):
        steps = published.scores_of(suite, task).steps
        assert len(steps) >= 5 and (steps[1:] > steps[:-1]).all()


def test_score_at_a_mark_is_of_the_last_tenth_before_it_in_simulator_steps(tmp_path):
    # With 2 simulator steps for each decision, 10,000 of them are 5,000 decisions, and the last tenth begins at 4,500.
    run = loaded(write(tmp_path / "a", {4400: 1000.0, 4600: 10.0, 5000: 20.0, 5100: 1000.0}))
    assert published.score_at(run, 1e4) == 15.0
    assert published.score_at(run, 2.5e4) is None


def test_curve_has_means_at_simulator_steps(tmp_path):
    run = loaded(write(tmp_path / "a", {step: float(step) for step in range(10, 5001, 10)}))
    curve = published.curve_of(run)
    assert curve is not None and len(curve.steps) == published.BINS
    # The first of 50 parts has steps 10 to 100: 55 on average, and twice that in the simulator.
    assert (curve.steps[0], curve.values[0]) == (110.0, 55.0)


@pytest.mark.parametrize(("kwargs", "frames"), [("", 4), ("{frames: 2}", 2)])
def test_decision_of_atari_is_as_many_frames_as_its_suite_takes(kwargs, frames, tmp_path):
    run = loaded(write(tmp_path / "a", {1: 1.0}, task="atari_pong", repeat=1, kwargs=kwargs))
    assert published.simulator_steps(run) == frames
    assert inspect.signature(Atari.make).parameters["frames"].default == published.FRAMES


def test_compare_prints_released_figures_beside_each_group(tmp_path, capsys):
    for seed in range(2):
        write(tmp_path / f"run-seed{seed}", {4800: 50.0 + 10 * seed, 5000: 50.0 + 10 * seed}, seed=seed)
    picture = tmp_path / "a.png"
    compare.main([f"{tmp_path}/run-*", "--published", "dmc_proprio", "--out", str(picture)])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("| 10,000 ")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["10,000", "62.8 ± 11.3", "55.0 ± 5.0"]
    assert published.SOURCE in printed and picture.stat().st_size > 10_000


def test_released_figures_are_told_to_programs_too(tmp_path, capsys):
    write(tmp_path / "run", {5000: 50.0})
    compare.main([f"{tmp_path}/run", "--published", "dmc_vision", "--json", "--out", str(tmp_path / "a.png")])
    told = json.loads(capsys.readouterr().out)["published"]
    assert (told["suite"], told["task"], told["steps"][0], told["mean"][0]) == ("dmc_vision", SWINGUP, 10_000, 116.5)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["gym_CartPole-v1"], "dmc_proprio has no figures of gym_CartPole-v1; it has those of dmc_acrobot_swingup"),
        ([SWINGUP, "dmc_walker_walk"], "draws one task, and these runs have dmc_cartpole_swingup, dmc_walker_walk"),
    ],
)
def test_runs_without_released_figures_are_refused_in_one_line(tasks, message, tmp_path, capsys):
    for task in tasks:
        write(tmp_path / task, {5000: 50.0}, task=task)
    with pytest.raises(SystemExit):
        compare.main([f"{tmp_path}/*", "--published", "dmc_proprio", "--out", str(tmp_path / "a.png")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_task_of_a_run_without_config_is_not_known(tmp_path):
    run = loaded(write(tmp_path / "a", {1: 1.0}))._replace(config=None)
    with pytest.raises(ConfigError, match="goes by the task in config.yaml"):
        published.task_of([run])
