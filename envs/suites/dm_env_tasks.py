"""An environment of the dm_env interface as one of gymnasium."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import Space, spaces
from jaxtyping import UInt8

# The key of an image that is drawn for the observation.
IMAGE_KEY = "image"
Draw = Callable[[], UInt8[np.ndarray, "H W 3"]]


class DmEnvTask(gymnasium.Env):
    """Steps a dm_env environment; a last step of discount 0 is terminated, of any other truncated."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(
        self,
        env: Any,
        *,
        reseed: Callable[[int], None],
        vector: bool = True,
        image: Draw | None = None,
        image_shape: tuple[int, ...] = (),
        draw: Draw | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Read the environment's specs.

        Args:
            env: of dm_env.
            reseed: begins its random numbers anew.
            vector: whether to show what it observes.
            image: draws an image that is shown as well; None: none is.
            image_shape: of that.
            draw: draws what a person sees; None: it cannot be drawn.
            render_mode: None or "rgb_array".
        """
        self._env, self._reseed, self._image, self._draw = env, reseed, image, draw
        self.render_mode = render_mode
        spec = env.observation_spec()
        self._plain = not isinstance(spec, dict)
        parts = {"observation": spec} if self._plain else dict(spec)
        # Some tasks have parts without a number.
        self._keys = [key for key, part in parts.items() if np.prod(part.shape, dtype=int) > 0] if vector else []
        shown = {key: _space(parts[key]) for key in self._keys}
        if image is not None:
            shown[IMAGE_KEY] = spaces.Box(0, 255, image_shape, np.uint8)
        self.observation_space = spaces.Dict(shown) if len(shown) > 1 or not self._plain else shown["observation"]
        self.action_space = _space(env.action_spec())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self._reseed(seed)
        return self._observe(self._env.reset().observation), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action."""
        step = self._env.step(action)
        terminated, truncated = (step.last() and over for over in (step.discount == 0, step.discount != 0))
        return self._observe(step.observation), float(step.reward), bool(terminated), bool(truncated), {}

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """What a person sees."""
        assert self._draw is not None, "nobody asks for a render mode where nothing can be drawn"
        return self._draw()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _observe(self, observation: Any) -> Any:
        if self._plain and self._image is None:
            return observation
        parts = {"observation": observation} if self._plain else observation
        obs = {key: parts[key] for key in self._keys}
        return obs if self._image is None else {**obs, IMAGE_KEY: self._image()}


def _space(spec: Any) -> Space:
    """The space of a spec of dm_env."""
    if hasattr(spec, "num_values"):
        return spaces.Discrete(int(spec.num_values))
    if hasattr(spec, "minimum"):
        low, high = (np.broadcast_to(bound, spec.shape).astype(spec.dtype) for bound in (spec.minimum, spec.maximum))
        return spaces.Box(low, high, dtype=spec.dtype)
    return spaces.Box(-np.inf, np.inf, spec.shape, spec.dtype)
