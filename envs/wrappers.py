"""What lies between an environment and the agent by the user's choice: repeated actions, images, frames, limits."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
import numpy as np
from gymnasium import Space, spaces
from gymnasium.wrappers import ClipReward, FrameStackObservation, StickyAction, TimeLimit
from jaxtyping import UInt8
from PIL import Image

from config import UserError
from envs.pixels import Pixels
from envs.spaces import leaf_spaces
from envs.tasks import ACTION_MASK, BAD_INPUT, NOTICE
from settings.environment import WrapperSettings

# Red, green and blue in the brightness of a pixel (ITU-R BT.601).
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


def wrapped(env: gymnasium.Env, settings: WrapperSettings) -> gymnasium.Env:
    """The environment with all that the settings ask for, but for clipped rewards, which are for training alone.

    Raises:
        UserError: the environment does not go with one of them.
    """
    _require_no_rules(env, settings)
    if settings.sticky:
        env = StickyActions(env, settings.sticky)
    if settings.repeat > 1:
        env = RepeatedActions(env, settings.repeat)
    if settings.grey or settings.resize:
        env = Images(env, grey=settings.grey, size=settings.resize)
    if settings.stack > 1:
        env = StackedObservations(env, settings.stack)
    return TimeLimit(env, settings.time_limit) if settings.time_limit else env


def with_clipped_rewards(env: gymnasium.Env, settings: WrapperSettings) -> gymnasium.Env:
    """The environment with rewards no farther from 0 than the settings say."""
    limit = settings.reward_clip
    return ClipReward(env, -limit, limit) if limit else env


def _require_no_rules(env: gymnasium.Env, settings: WrapperSettings) -> None:
    """Check that what is done to actions and observations leaves masks as true as they were.

    Raises:
        UserError: a mask would be about another step, or rules of masks would see other observations than they know.
    """
    repeats = [key for key in settings.changed if key in ("env.sticky", "env.repeat")]
    if repeats and isinstance(env.observation_space, spaces.Dict) and ACTION_MASK in env.observation_space.spaces:
        raise UserError(f"{repeats[0]} takes actions again that the {ACTION_MASK} may not allow any more; leave it out")
    if settings.stack > 1 and getattr(env.unwrapped, "mask_rules", None) is not None:
        raise UserError("env.stack shows observations that the environment's mask_rules do not know; leave it out")


class StickyActions(StickyAction):
    """gymnasium's sticky actions, with a generator of their own and a state to resume from.

    Whatever the environment does with its seed, the same seed gives the same repetitions.
    """

    def __init__(self, env: gymnasium.Env, probability: float) -> None:
        self._random = np.random.default_rng(0)
        super().__init__(env, probability)

    @property
    def np_random(self) -> np.random.Generator:
        return self._random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self._random = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; a seed decides about its repetitions as well."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        return super().reset(seed=seed, options=options)

    def state_dict(self) -> dict[str, Any]:
        """The last action, if any, and the generator."""
        last = [] if self.last_action is None else [self.last_action]
        return {"last_action": last, "random": self._random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.last_action = state["last_action"][0] if state["last_action"] else None
        self._random.bit_generator.state = state["random"]


class RepeatedActions(gymnasium.Wrapper):
    """Every action is taken so many times, or until the episode ends. Rewards are added up.

    Of each step's information the last one's is passed on, and what any of them told the user.
    """

    def __init__(self, env: gymnasium.Env, times: int) -> None:
        super().__init__(env)
        self._times = times

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take the action until an end."""
        total, told = 0.0, dict[str, Any]()
        for _ in range(self._times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward  # type: ignore[operator]
            told |= {key: info[key] for key in (BAD_INPUT, NOTICE) if key in info}
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, {**info, **told}


class Images(gymnasium.ObservationWrapper):
    """Every image of an observation as bytes [H, W, C], in grey or scaled; the rest as it is.

    Scaling is bilinear over all the pixels that a new one covers.
    """

    def __init__(self, env: gymnasium.Env, *, grey: bool, size: tuple[int, ...]) -> None:
        """Look for images.

        Args:
            env: with images alone or in dicts and tuples.
            grey: whether to turn colours into brightness.
            size: height and width, or none.

        Raises:
            UserError: there is no image, or one whose channels are no colours.
        """
        super().__init__(env)
        self._grey, self._size, self._found = grey, size, 0
        self.observation_space = self._space_of(env.observation_space)
        if not self._found:
            asked = "env.grey" if grey else "env.resize"
            raise UserError(
                f"{asked} is for images, and there is none in the observations {env.observation_space}; leave it out"
            )

    def observation(self, observation: Any) -> Any:
        """The observation with its images seen to."""
        return self._seen(self.env.observation_space, observation)

    def _space_of(self, space: Space) -> Space:
        if isinstance(space, spaces.Dict):
            return spaces.Dict({name: self._space_of(part) for name, part in space.items()})
        if isinstance(space, spaces.Tuple):
            return spaces.Tuple([self._space_of(part) for part in space.spaces])
        pixels = Pixels.of(space)
        if pixels is None:
            return space
        self._found += 1
        height, width, channels = pixels.shape
        if self._grey and channels != 1 and channels % 3:
            raise UserError(f"env.grey is for red, green and blue, and an image has {channels} channels; leave it out")
        height, width = self._size or (height, width)
        return spaces.Box(0, 255, (height, width, channels // 3 if self._grey and channels > 1 else channels), np.uint8)

    def _seen(self, space: Space, obs: Any) -> Any:
        if isinstance(space, spaces.Dict):
            return {name: self._seen(part, obs[name]) for name, part in space.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(self._seen(part, each) for part, each in zip(space.spaces, obs, strict=True))
        pixels = Pixels.of(space)
        return obs if pixels is None else self._changed(pixels, space, np.asarray(obs))

    def _changed(self, pixels: Pixels, space: Space, value: np.ndarray) -> UInt8[np.ndarray, "H W C"]:
        if np.issubdtype(space.dtype, np.floating):
            value = pixels.scaled(value)
        if value.shape != space.shape or not ((value >= 0) & (value <= 255)).all():
            raise UserError(f"an image of shape {value.shape} is none of its space {space}")
        image = pixels.arranged(value.astype(np.uint8))
        if self._grey and image.shape[-1] > 1:
            image = np.rint(image.reshape(*image.shape[:2], -1, 3) @ BRIGHTNESS).astype(np.uint8)
        return _resized(image, *self._size) if self._size else image


def _resized(image: UInt8[np.ndarray, "h w C"], height: int, width: int) -> UInt8[np.ndarray, "H W C"]:
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, -1)


class StackedObservations(FrameStackObservation):
    """gymnasium's stacked observations, but for the mask, which is the last one's, and with a state to resume from.

    Images of any layout are stacked as [H, W, C]. An episode begins with copies of its first observation.
    """

    def __init__(self, env: gymnasium.Env, count: int) -> None:
        if any(Pixels.of(part) is not None for part in leaf_spaces(env.observation_space)):
            env = Images(env, grey=False, size=())
        super().__init__(env, count)
        self._masked = isinstance(env.observation_space, spaces.Dict) and ACTION_MASK in env.observation_space.spaces
        if self._masked:
            parts = {**self.observation_space.spaces, ACTION_MASK: env.observation_space[ACTION_MASK]}  # type: ignore
            self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        obs, info = super().reset(seed=seed, options=options)
        return self._with_last_mask(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment, and show the last observations."""
        obs, *others = super().step(action)
        return self._with_last_mask(obs), *others  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """The observations that are shown."""
        return {"shown": list(self.obs_queue)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.obs_queue = deque(state["shown"], maxlen=self.stack_size)

    def _with_last_mask(self, obs: Any) -> Any:
        return {**obs, ACTION_MASK: obs[ACTION_MASK][-1]} if self._masked else obs
