"""What lies between an environment and the agent by the user's choice, against values worked out by hand."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import config
from config import ConfigError, UserError
from envs.gym_tasks import make_gym
from envs.spaces import observation_keys
from envs.tasks import NOTICE
from envs.wrappers import with_clipped_rewards, wrapped
from settings.environment import WrapperSettings, holds_text
from settings.families import require_read
from settings.run import RunSettings
from tests.gym_scenes import MODES, Scripted, through_file, times
from tests.test_configs import CONFIG_PATH


class Counting(gymnasium.Env):
    """Shows the steps so far and the last action, and an image of that brightness; rewards 10 a step."""

    observation_space = spaces.Dict(
        step=spaces.Box(0, 100, (2,)), eye=spaces.Box(0, 255, (3, 20, 40), np.uint8), action_mask=spaces.MultiBinary(4)
    )
    action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        self.step_number, self.last = 0, 0
        return self.observe(), {}

    def step(self, action):
        self.step_number, self.last = self.step_number + 1, int(action)
        info = {NOTICE: ("topic", f"step {self.step_number}")} if self.step_number == 2 else {}
        return self.observe(), 10.0, self.step_number == 7, False, info

    def observe(self):
        eye = np.zeros((3, 20, 40), np.uint8) + np.array([self.step_number, 100, 200], np.uint8)[:, None, None]
        mask = np.arange(4) <= self.step_number
        return {"step": np.array([self.step_number, self.last], np.float32), "eye": eye, "action_mask": mask}


class Unmasked(Counting):
    observation_space = spaces.Dict(
        {key: space for key, space in Counting.observation_space.items() if key != "action_mask"}
    )

    def observe(self):
        return {key: value for key, value in super().observe().items() if key != "action_mask"}


def test_wrapped_leaves_an_environment_as_it_is_without_settings():
    env = Counting()
    assert wrapped(env, WrapperSettings()) is env and with_clipped_rewards(env, WrapperSettings()) is env


def test_repeated_actions_add_rewards_and_stop_at_the_end():
    env: Any = wrapped(Unmasked(), WrapperSettings(repeat=3))
    env.reset()
    steps = [env.step(1) for _ in range(3)]
    assert [obs["step"][0] for obs, *_ in steps] == [3, 6, 7]
    assert [reward for _, reward, *_ in steps] == [30, 30, 10]
    assert [terminated for *_, terminated, _, _ in steps] == [False, False, True]
    # What the second of three steps told is passed on.
    assert [info.get(NOTICE) for *_, info in steps] == [("topic", "step 2"), None, None]


def test_images_are_scaled_to_any_size_whatever_their_layout():
    env: Any = wrapped(Counting(), WrapperSettings(resize=(32, 48)))
    assert observation_keys(env.observation_space)["eye"].shape == (32, 48, 3)
    env.reset()
    eye = env.step(3)[0]["eye"]
    assert eye in env.observation_space["eye"]
    np.testing.assert_array_equal(eye, np.zeros((32, 48, 3), np.uint8) + np.array([1, 100, 200], np.uint8))


def test_images_are_scaled_by_the_mean_of_the_pixels_that_a_new_one_covers():
    class Striped(gymnasium.Env):
        observation_space = spaces.Box(0, 1, (32, 64, 1))
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.tile([[0.0], [1.0]], (32, 32, 1)).astype(np.float32), {}

    image, _ = wrapped(Striped(), WrapperSettings(resize=(16, 16))).reset()
    assert image.shape == (16, 16, 1) and (abs(image[1:-1, 1:-1].astype(int) - 128) <= 1).all()


def test_grey_images_hold_the_brightness():
    env: Any = wrapped(Counting(), WrapperSettings(grey=True))
    eye = env.reset()[0]["eye"]
    # 0.299 * 0 + 0.587 * 100 + 0.114 * 200
    np.testing.assert_array_equal(eye, np.full((20, 40, 1), 82, np.uint8))


def test_stacked_observations_end_with_the_last_and_keep_its_mask():
    env: Any = wrapped(Counting(), WrapperSettings(stack=3))
    obs, _ = env.reset()
    assert obs["step"][:, 0].tolist() == [0, 0, 0]
    env.step(1)
    obs, *_ = env.step(2)
    assert obs["step"].tolist() == [[0, 0], [1, 1], [2, 2]] and obs["action_mask"].tolist() == [1, 1, 1, 0]
    assert obs in env.observation_space
    keys = observation_keys(env.observation_space)
    assert (keys["eye"].kind, keys["eye"].shape, keys["step"].shape) == ("image", (32, 48, 9), (6,))


def test_sticky_actions_follow_from_the_seed_alone():
    def actions(seed):
        env: Any = wrapped(Unmasked(), WrapperSettings(sticky=0.5))
        env.reset(seed=seed)
        return [env.step(action)[0]["step"][1] for action in (1, 2, 3, 1, 2, 3)]

    assert actions(1) == actions(1) and len({tuple(actions(seed)) for seed in range(8)}) > 1
    assert all(actions(seed)[0] == 1 for seed in range(4))
    repeated = np.mean([[taken != asked for taken, asked in zip(actions(seed), (1, 2, 3) * 2, strict=True)][1:]
                        for seed in range(200)])  # fmt: skip
    assert 0.35 < repeated < 0.65


def test_time_limit_truncates_after_so_many_decisions():
    env: Any = wrapped(Unmasked(), WrapperSettings(repeat=2, time_limit=2))
    env.reset()
    assert [env.step(0)[2:4] for _ in range(2)] == [(False, False), (False, True)]


@pytest.mark.parametrize(("limit", "reward"), [(1.0, 1.0), (20.0, 10.0)])
def test_clipped_rewards_are_for_training_alone(limit, reward):
    settings = WrapperSettings(reward_clip=limit)
    env, evaluated = with_clipped_rewards(Counting(), settings), wrapped(Counting(), settings)
    env.reset(), evaluated.reset()
    assert env.step(0)[1] == reward and evaluated.step(0)[1] == 10


def test_make_gym_clips_rewards_where_it_is_for_training():
    settings = WrapperSettings(reward_clip=0.5)
    rewards = []
    for training in (True, False):
        env: Any = make_gym("gym_CartPole-v1", settings=settings, training=training)()
        env.reset(seed=0)
        rewards.append(env.step(0)[1])
        env.close()
    assert rewards == [0.5, 1.0]


def test_make_gym_gives_the_environment_its_arguments():
    env: Any = make_gym("gym_CartPole-v1", settings=WrapperSettings(kwargs="{sutton_barto_reward: true}"))()
    assert env.unwrapped._sutton_barto_reward
    env.close()


class Wrapped(Scripted):
    """A `Scripted` that can be resumed, with numbers that go on from where they were."""

    mask_rules: Any = None

    def step(self, action):
        obs, reward, *others = super().step(0 if action == 9 else action)
        return obs, reward, *others

    def state_dict(self):
        return {"seed": self.seed, "time": self.time}

    def load_state_dict(self, state):
        self.seed, self.time = state["seed"], state["time"]


@MODES
def test_wrappers_are_resumed_in_mid_episode(vector_env, processes, tmp_path):
    settings = WrapperSettings(sticky=0.5, repeat=2, stack=2, time_limit=20)

    def make():
        return wrapped(Wrapped(length=99), settings)

    env = vector_env(make, num_envs=2, processes=processes)
    env.reset()
    for action in (1, 2, 3):
        env.step(torch.tensor([action, action + 1]))
    saved = through_file(env.state_dict(), tmp_path)
    resumed = vector_env(make, num_envs=2, processes=processes)
    assert not resumed.load_state_dict(saved).any()
    for action in (4, 5, 6, 7):
        (obs, reward, *_), (obs_again, reward_again, *_) = (
            each.step(torch.tensor([action, action - 1])) for each in (env, resumed)
        )
        assert obs["observation"].equal(obs_again["observation"]) and reward.equal(reward_again)
    assert len({tuple(row) for row in obs["observation"].tolist()}) == 2 and times(obs) != [0, 0]


@MODES
@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        (Scripted, WrapperSettings(resize=(32, 32)), "env.resize is for images, and there is none in .* leave it out"),
        (Scripted, WrapperSettings(stack=2), "env.stack shows observations that .* mask_rules do not know"),
        (Counting, WrapperSettings(repeat=2), "env.repeat takes actions again that the action_mask may not allow"),
        (Counting, WrapperSettings(sticky=0.1), "env.sticky takes actions again"),
    ],
)
def test_vector_env_refuses_wrappers_that_do_not_go_with_an_environment(vector_env, env, settings, message, processes):
    with pytest.raises(UserError, match=message) as refusal:
        vector_env(lambda: wrapped(env(), settings), processes=processes)
    assert "\n" not in str(refusal.value) and "cannot be made" not in str(refusal.value)


def test_images_refuse_channels_that_are_no_colours():
    class Depth(gymnasium.Env):
        observation_space = spaces.Box(0, 255, (32, 32, 4), np.uint8)

    with pytest.raises(UserError, match="env.grey is for red, green and blue, and an image has 4 channels"):
        wrapped(Depth(), WrapperSettings(grey=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kwargs": "[1]"}, r"env.kwargs is '\[1\]'; it takes a mapping of names to values"),
        ({"kwargs": "{1: 2}"}, "env.kwargs has the name 1; arguments are called by words"),
        ({"kwargs": "{a: "}, "cannot read '{a: ' as a value of env.kwargs"),
        ({"kwargs": "{render_mode: human}"}, "env.kwargs has render_mode, which this program chooses itself"),
        ({"resize": (64,)}, r"env.resize is \[64\]; it takes height and width, such as \[64, 64\]"),
        ({"resize": (64, 8)}, "env.resize is 8; it must be between 16 and 4096"),
        ({"repeat": 0}, "env.repeat is 0; it must be at least 1"),
        ({"sticky": 1.0}, "env.sticky is 1; it must be between 0 and 0.999"),
    ],
)
def test_wrapper_settings_refuse_what_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        WrapperSettings(**values)


def test_wrappers_are_refused_in_routing():
    command = config.parse_command_line(["--env.repeat", "2"], config_path=CONFIG_PATH, description="", entry_keys={})
    with pytest.raises(ConfigError, match="env.repeat is for gymnasium environments, and tsp does not read it"):
        require_read("tsp", command.given)
    for task in ("gym_CartPole-v1", "dmc_walker_walk"):
        require_read(task, command.given)


def test_clipped_rewards_need_environments_of_their_own_for_evaluations():
    chosen = {"task": "gym_CartPole-v1", "env.reward_clip": "1"}
    RunSettings.of(config.load(CONFIG_PATH, [], chosen))
    with pytest.raises(ConfigError, match="env.reward_clip is for training alone, and needs eval_env: own"):
        RunSettings.of(config.load(CONFIG_PATH, [], {**chosen, "eval_env": "training"}))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", False),
        ("{a: 1, b: [true, {c: 2.5}]}", False),
        ("{a: x.xml}", True),
        ("{a: [{b: 'm:f'}]}", True),
        ("{", True),
    ],
)
def test_arguments_of_an_environment_may_name_code_where_they_hold_texts(text, holds):
    assert holds_text(text) == holds
