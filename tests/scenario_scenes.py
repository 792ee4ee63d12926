"""Scenarios made by hand, a small folder of logs, and parts of samples that take no time to build."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import config
from config import Config
from driving.scene import Log
from scenarios.logs import LogFolder
from scenarios.parts import Needs, Part, Scene, Spec
from scenarios.scenario import Scenario, token_of
from settings.scenarios import FilterSettings, ScenarioSettings
from tests.driving_scenes import crossing, log_of, straight

CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")


def scenario(agent: int = 1, frame: int = 0, **changes: Any) -> Scenario:
    """One of a car that drives 10 m/s straight on for two rows."""
    log = changes.get("log", "log-a")
    rows = changes.get("rows", 2)
    values: dict[str, Any] = {
        **{"log": log, "map": "crossing", "type": "free", "token": token_of(log, agent, frame, rows=rows)},
        **{"agent": agent, "frame": frame, "rows": rows, "speeds": (10.0, 10.0), "displacement": 5.0},
        "goal_on_road": True,
    }
    return Scenario(**{**values, **changes})


def settings(**changes: Any) -> Config:
    """The config's defaults; a double underscore reaches into a section, as a dot does."""
    return config.load(CONFIG_PATH, [], {}).replace(**{key.replace("__", "."): value for key, value in changes.items()})


def scenario_settings(folder: Path, **changes: Any) -> ScenarioSettings:
    """Of a cache in a folder, filled by this process from the logs that `write_logs` has put beside it."""
    values = {"cache__path": str(folder / "cache"), "cache__workers": 0, "logs__path": str(folder / "logs")}
    return ScenarioSettings.of(settings(**{**values, **changes}))


def filter_settings(**changes: Any) -> FilterSettings:
    return FilterSettings.of(settings(**{f"scenario_filter.{key}": value for key, value in changes.items()}))


def write_logs(folder: Path, *names: str, frames: int = 25) -> LogFolder:
    """Logs of two cars, one behind the other, on the map `crossing`."""
    logs = LogFolder(folder / "logs")
    logs.map_path("crossing").parent.mkdir(parents=True, exist_ok=True)
    crossing().save(logs.map_path("crossing"))
    for number, name in enumerate(names):
        log_named(name, frames=frames, gap=20.0 + number).save(logs.log_path(name))
    return logs


def log_named(name: str, *, frames: int, gap: float = 20.0) -> Log:
    tracks = {3: straight(0, 4.0, frames), 7: straight(gap, 6.0, frames)}
    return dataclasses.replace(log_of(tracks, road_map=crossing()), name=name)


def _speeds(scene: Scene) -> dict[str, np.ndarray]:
    rows = scene.log.find(scene.agents, np.full(len(scene.agents), scene.frame))
    return {"ego": scene.log.speed[rows][:, None].repeat(6, 1)}


def _places(scene: Scene) -> dict[str, np.ndarray]:
    rows = scene.log.find(scene.agents, np.full(len(scene.agents), scene.frame))
    return {"place": np.stack((scene.log.x[rows], scene.log.y[rows]), -1)}


def _choices(scene: Scene) -> dict[str, np.ndarray]:
    count = len(scene.agents)
    mask = np.ones((count, 3), bool)
    mask[:, 0] = False
    return {"action": np.full(count, 1 + scene.frame % 2, np.int64), "action_mask": mask}


SPEEDS = Part("speeds", 1, {"ego": Spec((6,), np.float32)}, _speeds)
PLACES = Part("places", 1, {"place": Spec((2,), np.float32)}, _places)
CHOICES = Part("choices", 1, {"action": Spec((), np.int64), "action_mask": Spec((3,), np.bool_)}, _choices)
KNOWN = (SPEEDS, PLACES, CHOICES)
NEEDS = Needs(("ego", "action_mask"), ("action",))
