"""The sections that programs read: where each key stands, what it may hold, and which keys go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import pytest

import config
from config import Config, ConfigError
from settings.dreamer import DreamerSettings, ModelSettings
from settings.groups import SamplingSettings
from settings.imitation import ImitationSettings
from settings.run import RunSettings
from settings.sac import SACSettings
from settings.scenarios import ScenarioSettings
from settings.sections import Between, Count, GradientLimit, LearningRate, Section, Share
from tests.scenes import debug_config

CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")
ROOTS = (RunSettings, DreamerSettings, SACSettings, SamplingSettings, ScenarioSettings, ImitationSettings)


@dataclass(frozen=True)
class Inner(Section):
    PLACE = "outer.inner"

    share: Share = 0.5
    name: Literal["one", "two"] = "one"
    flag: bool = False


@dataclass(frozen=True)
class Outer(Section):
    RENAMED: ClassVar = {"size": "outer.units"}

    size: Count
    steps: Annotated[int, Between(0, 9)]
    rate: LearningRate
    limit: GradientLimit
    inner: Inner


VALUES: dict[str, Any] = {
    "steps": 3,
    "rate": 1.0,
    "limit": 2.0,
    "outer": {"units": 4, "inner": {"share": 0.25, "name": "two", "flag": True}},
}


def test_section_is_read_from_its_place():
    expected = Outer(size=4, steps=3, rate=1.0, limit=2.0, inner=Inner(share=0.25, name="two", flag=True))
    assert Outer.of(Config(VALUES)) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("outer.units", 0, "outer.units is 0; it must be at least 1"),
        ("steps", 10, "steps is 10; it must be between 0 and 9"),
        ("steps", -1, "steps is -1; it must be between 0 and 9"),
        ("rate", 0.0, "rate is 0; it must be above 0"),
        ("rate", float("inf"), "rate is inf; it must be finite"),
        ("limit", 0.0, "limit is 0; it must be above 0"),
        ("outer.inner.share", 1.5, "outer.inner.share is 1.5; it must be between 0 and 1"),
        ("outer.inner.name", "three", "outer.inner.name is 'three'; choose one of one, two"),
    ],
)
def test_section_refuses_what_its_type_excludes(key: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Outer.of(Config(VALUES).replace(**{key: value}))


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("steps", 9), ("limit", float("inf"))])
def test_section_accepts_the_bounds_themselves(key: str, value: Any):
    assert getattr(Outer.of(Config(VALUES).replace(**{key: value})), key) == value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("share", "half", "'half'; it takes a number"),
        ("share", True, "true; it takes"),
        ("flag", 1, "1; it takes true"),
    ],
)
def test_section_refuses_values_of_another_type(field: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=f"outer.inner.{field} is {message}"):
        Inner(**{field: value})


def keys_of(section: type[Section]) -> Iterator[str]:
    hints = get_type_hints(section)
    for field in fields(section):
        hint = hints[field.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            yield from keys_of(hint)
        else:
            yield section.key(field.name)


def test_every_key_of_configs_yaml_has_a_place_in_a_section():
    read = {key for root in ROOTS for key in keys_of(root)}
    assert read == set(config.load(CONFIG_PATH, [], {}).flat())


REFUSED: list[tuple[type[Section], str, Any, str]] = [
    (RunSettings, "threads", 0, "between 1 and 4096"),
    (RunSettings, "steps", 0, "at least 1"),
    (RunSettings, "prefill", -1, "at least 0"),
    (RunSettings, "guard.max_skips", 0, "at least 1"),
    (RunSettings, "env_timeout", -1.0, "at least 0"),
    (RunSettings, "prefill_policy", "farthest", "choose one of random, nearest"),
    (RunSettings, "context", "map", "choose one of none, dynamics_map"),
    (DreamerSettings, "batch_length", 1, "at least 2"),
    (DreamerSettings, "model.rssm.cell", "lstm", "choose one of block, joint, dense"),
    (DreamerSettings, "model.rssm.unimix", 1.5, "between 0 and 1"),
    (DreamerSettings, "model.layers", 1001, "between 1 and 1000"),
    (DreamerSettings, "model.lr", 0.0, "above 0"),
    (DreamerSettings, "schedule.final_lr", -0.1, "between 0 and 1"),
    (DreamerSettings, "model.current_pos", "nod", "choose one of coords, node"),
    (DreamerSettings, "actor.type", "transformer", "choose one of tsp_pointer, masked"),
    (DreamerSettings, "actor.pointer.clip", 0.0, "at least 0.001"),
    (DreamerSettings, "actor.advantage_scale", "median", "choose one of percentile"),
    (DreamerSettings, "critic.bins", 2, "at least 3"),
    (DreamerSettings, "critic.grad_clip", -1.0, "above 0"),
    (DreamerSettings, "schedule.decay_from", 2.0, "between 0 and 1"),
    (DreamerSettings, "schedule.warmup", -1, "at least 0"),
    (DreamerSettings, "optimizer.algorithm", "sgd", "choose one of adam, laprop"),
    (DreamerSettings, "optimizer.agc", -1.0, "at least 0"),
    (DreamerSettings, "imag_penalty", -1.0, "at least 0"),
    (DreamerSettings, "imag_generated", 0.0, "above 0 and at most 1"),
    (DreamerSettings, "imag_nodes", [200, 20], "give the least and the largest number of nodes, such as"),
    (DreamerSettings, "imag_nodes", [20, 200], "needs imag_start: generated, imag_generated: 1.0 and imag_horizon"),
    (SACSettings, "sac.critic", "huber", "choose one of mse, symlog_disc"),
    (SACSettings, "sac.initial_alpha.mse", 0.0, "between 1e-06 and 1e\\+06"),
    (SACSettings, "sac.tau", 2.0, "between 0 and 1"),
]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"), REFUSED, ids=[f"{key}={value}" for _, key, value, _ in REFUSED]
)
def test_section_of_a_program_refuses_its_key_by_name(section: type[Section], key: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=rf"^{key} (is )?{value!r}?.*{message}".replace("'", "'?")):
        section.of(debug_config(**{key: value}))


def test_dreamer_needs_rewards_as_they_are_where_it_simulates_them():
    with pytest.raises(ConfigError, match="reward_scale is 0.5; imag_reward simulated needs it at 1"):
        DreamerSettings.of(debug_config(reward_scale=0.5, imag_reward="simulated"))


@pytest.mark.parametrize("cost", ["euclidean", "lanes"])
def test_run_needs_rewards_as_they_are_where_it_learns_from_a_log(cost: str):
    RunSettings.of(debug_config(trips="trips.csv", cost=cost))
    with pytest.raises(ConfigError, match=r"^reward_scale is 0.5; a log of trips is learnt as it is.* needs it at 1$"):
        RunSettings.of(debug_config(trips="trips.csv", cost=cost, reward_scale=0.5))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"plan.optimism": 0.5}, "plan.optimism is 0.5, .*or set plan.optimism: 0$"),
        ({"plan.thompson": True}, "plan.thompson is true, .*or set plan.thompson: false$"),
        (
            {"plan.thompson": True, "plan.pessimism": 1.0},
            "plan.pessimism is 1 and plan.thompson is true, .*or set plan.pessimism: 0 and plan.thompson: false$",
        ),
    ],
)
def test_dreamer_needs_an_ensemble_where_plans_go_by_its_spread(wanted: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        DreamerSettings.of(debug_config(**wanted))
    assert DreamerSettings.of(debug_config(**wanted, **{"model.move_heads": 2})).model.move_heads == 2


def test_dreamer_needs_a_reward_head_where_rewards_are_learned():
    with pytest.raises(ConfigError, match="model.loss_scales.reward above 0"):
        DreamerSettings.of(debug_config(**{"model.loss_scales.reward": 0.0}))


def test_a_misspelt_key_is_seen_by_name():
    settings = ModelSettings.of(debug_config())
    with pytest.raises(AttributeError, match="detr"):
        _ = settings.rssm.detr  # type: ignore[attr-defined]
