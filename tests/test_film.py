"""Films of episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from config import UserError
from envs.gym_tasks import make_gym
from envs.gym_vector import GymVectorEnv
from routing.instances import TEST_SEED
from tests.scripted import CPU, THREE, Scripted, ScriptedAgent, factory, gym_evaluator, report_of
from training.film import film


def test_film_writes_every_step_of_every_episode(tmp_path: Path):
    make, made = factory(*THREE)
    path = film(ScriptedAgent(), make, folder=tmp_path / "not" / "yet", device=CPU)
    assert path == tmp_path / "not" / "yet" / "episodes.gif"
    with GifImageFile(path) as gif:
        assert gif.n_frames == 4 + 2 + 7
        # 25 frames a second.
        assert gif.info["duration"] == 40
        reds = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            reds.append(int(np.asarray(gif.convert("RGB"))[4, 4, 0]))
    assert reds == [40 * time for length in (4, 2, 7) for time in range(length)]
    assert made[0].seeds[0] != made[1].seeds[0]
    assert all(env.closed for env in made)


def test_film_shows_the_first_test_episode_first(tmp_path: Path):
    make, made = factory({})
    report_of(gym_evaluator(make, eval_episodes=1))
    film(ScriptedAgent(), make, folder=tmp_path, device=CPU, episodes=1)
    assert made[0].seeds == made[1].seeds
    assert (
        GymVectorEnv(make, num_envs=1, device=CPU, seed=TEST_SEED, evaluation=True).reset()
        and made[2].seeds == made[0].seeds
    )


def test_film_of_pixels_shows_what_the_environment_draws(tmp_path: Path):
    agent = ScriptedAgent()
    agent.act = lambda _sight, state, **_: (torch.zeros(1, dtype=torch.int64), state)  # type: ignore[method-assign]
    path = film(agent, make_gym("gym_PixelGrid-v0", render_mode="rgb_array"), folder=tmp_path, device=CPU, episodes=1)
    with Image.open(path) as gif:
        assert gif.size == (64, 64)


def test_film_refuses_an_environment_that_draws_nothing(tmp_path: Path):
    make, _ = factory({"render_mode": None})
    with pytest.raises(ValueError, match="has no render_mode rgb_array, so it cannot be filmed") as error:
        film(ScriptedAgent(), make, folder=tmp_path / "film", device=CPU)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "film").exists()


def test_film_refuses_what_is_no_picture_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make, made = factory(*THREE)
    monkeypatch.setattr(Scripted, "render", lambda _self: None)
    with pytest.raises(UserError, match=r"draws object \(\), so it cannot be filmed"):
        film(ScriptedAgent(), make, folder=tmp_path, device=CPU)
    assert made[0].time == 0


def test_film_says_in_one_line_that_it_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no film can be written"):
        film(ScriptedAgent(), factory(*THREE)[0], folder=tmp_path / "file" / "film", device=CPU)
