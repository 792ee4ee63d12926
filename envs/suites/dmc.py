"""The DeepMind Control Suite: continuous control of simulated bodies, from their joints or from a camera."""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Sequence
from typing import ClassVar

import gymnasium

from config import UserError
from envs.suites.dm_env_tasks import DmEnvTask
from envs.suites.suite import Suite

# The variable by which MuJoCo is told how to draw, and what draws without a screen: the library of each.
GL_VARIABLE = "MUJOCO_GL"
GL_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
# As published, the camera that follows the body; every other domain's is the first.
CAMERAS = {"quadruped": 2}
FILM_SIZE = (240, 320)


def choose_gl() -> str | None:
    """How MuJoCo draws in this process: as MUJOCO_GL says, or else by EGL or OSMesa, where Linux has one of them."""
    if GL_VARIABLE not in os.environ and sys.platform == "linux":
        found = [name for name, library in GL_LIBRARIES.items() if ctypes.util.find_library(library)]
        if found:
            os.environ[GL_VARIABLE] = found[0]
    return os.environ.get(GL_VARIABLE)


class DMC(Suite):
    """Tasks are called by domain and task: walker_walk, ball_in_cup_catch."""

    EXTRA: ClassVar = "dmc"
    PACKAGES: ClassVar = ("dm_control",)

    def tasks(self) -> list[str]:
        """All tasks of the suite."""
        choose_gl()
        from dm_control import suite

        return [f"{domain}_{task}" for domain, task in suite.ALL_TASKS]

    def make(
        self,
        name: str,
        *,
        render_mode: str | None = None,
        proprio: bool = True,
        vision: bool = False,
        size: Sequence[int] = (64, 64),
        camera: int | None = None,
    ) -> gymnasium.Env:
        """The environment of a task.

        Args:
            name: of the task.
            render_mode: None or "rgb_array".
            proprio: whether joints and the like are observed.
            vision: whether an image is.
            size: height and width of that.
            camera: its number; None: as published.

        Raises:
            UserError: nothing would be observed, or nothing can draw the image.
        """
        if not proprio and not vision:
            raise UserError("env.kwargs has proprio: false, and nothing else is observed: add vision: true")
        gl = choose_gl()
        if gl is None and (vision or render_mode) and sys.platform == "linux" and "DISPLAY" not in os.environ:
            raise UserError("images need EGL or OSMesa here: install libegl1 or libosmesa6, or leave images out")
        from dm_control import suite

        domain, task = next(pair for pair in suite.ALL_TASKS if "_".join(pair) == name)
        env = suite.load(domain, task)
        number = CAMERAS.get(domain, 0) if camera is None else camera
        height, width = size
        return DmEnvTask(
            env,
            reseed=env.task.random.seed,
            vector=proprio,
            image=(lambda: env.physics.render(height, width, camera_id=number)) if vision else None,
            image_shape=(height, width, 3),
            draw=lambda: env.physics.render(*FILM_SIZE, camera_id=number),
            render_mode=render_mode,
        )
