"""A Dreamer that drives: from a cache to a run, to what it foresees of traffic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dreamer
from benchmarks import traffic_prediction
from benchmarks.closed_loop import DreamingDriver
from driving.candidates import FREE
from driving.features import FEATURES
from scenarios import caching
from scenarios.known_parts import KNOWN
from scenarios.parts import Needs
from tests.scenario_scenes import scenario_settings, write_logs
from tests.scenes import refusal

NEEDS = Needs(tuple(name for part in KNOWN for name in part.arrays), ())


@pytest.mark.run
def test_cache_is_learnt_from_and_traffic_foreseen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("libsumo")
    write_logs(tmp_path, "a-0-00000", "a-0-00060")
    caching.fill(scenario_settings(tmp_path), NEEDS, KNOWN, seed=0)
    cache, run = tmp_path / "cache", tmp_path / "run"
    learn = ["--configs", "drive_dreamer", "debug", "--replay", str(cache), "--steps", "0", "--updates", "4"]
    learn += ["--imag_imitation", "1", "--log_every", "2", "--eval_every", "0", "--eval_episodes", "0"]
    dreamer.main([*learn, "--actor.units", "16", "--logdir", str(run)])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    learnt = next(row for row in rows if "imitation_loss" in row)
    assert {"motion_loss", "imag_return", "actor_entropy"} <= learnt.keys()
    assert all(value == value for value in learnt.values())
    capsys.readouterr()
    picture = tmp_path / "traffic.png"
    where = ["--cache", str(cache), "--logs", str(tmp_path / "logs"), "--sets", "train", "--out", str(picture)]
    traffic_prediction.main([str(run), *where])
    lines = capsys.readouterr().out.splitlines()
    # Of each log both cars are long enough there; each has the other beside it.
    assert lines[0].startswith("train: ") and " scenarios, " in lines[0]
    # Everybody drives straight on at constant speed, and touches nobody.
    assert lines[-1] == "| constant velocity | 0.00, 0.00, 0.00 | 0.00, 0.00, 0.00 | 0.0 |"
    assert picture.stat().st_size > 1000
    # The run drives; without a line there is one thing to do.
    driver = DreamingDriver(str(run))
    obs: dict[str, np.ndarray] = {name: np.zeros(feature.shape, feature.dtype) for name, feature in FEATURES.items()}
    obs["action_mask"][-1] = True
    assert driver(obs) == FREE


def test_actor_of_candidates_is_refused_in_one_line_where_a_task_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = refusal(capsys, "--task", "gym_CartPole-v1", "--actor.type", "candidates", "--logdir", str(tmp_path / "run"))
    assert "actor.type candidates scores lines to follow, and this task has none" in line
