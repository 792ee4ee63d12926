from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

import config
from config import Config, ConfigError
from tests.config_scenes import SECTIONS, parse, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path, SECTIONS)


def test_load_defaults_is_the_section_alone():
    path = Path(config.__file__).with_name("configs.yaml")
    assert config.load_defaults(path) == config.load(path, [], {})


@pytest.mark.parametrize(
    "text", ["defaults: {a: 1}\nb: {a: 2}\n", "b: {a: 2}\ndefaults:\n  # \n  a: 1\n", "{defaults: {a: 1}}"]
)
def test_load_defaults_finds_the_section_in_any_file(tmp_path, text: str):
    path = tmp_path / "configs.yaml"
    path.write_text(text)
    assert config.load_defaults(path) == Config({"a": 1})


def test_load_defaults_parses_no_other_section(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text("defaults:\n  a: 1\n# A comment\n  \n  b: 2\nother: [\n")
    assert config.load_defaults(path) == Config({"a": 1, "b": 2})


def test_load_defaults_refuses_a_file_without_the_section(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text("debug: {a: 1}\n")
    with pytest.raises(ConfigError, match="no section 'defaults'"):
        config.load_defaults(path)


def test_load_overlays_sections_in_order_then_overrides(path: Path) -> None:
    loaded = config.load(path, ["tsp_attn", "debug"], {"actor.schedule.final": "0.5", "seed": "7"})
    assert loaded.flat() == {
        "seed": 7,
        "steps": 10,
        "logdir": None,
        "compile": False,
        "device": "auto",
        "discount": 1,
        "imag_mask": "rules",
        "layers": (64, 64),
        "actor.entropy": 0.01,
        "actor.grad_clip": 1.0,
        "actor.schedule.warmup": 2,
        "actor.schedule.final": 0.5,
    }
    assert config.load(path, ["debug", "tsp_attn"], {}).steps == 2_000_000


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("actor.entropy", "1e-2", 0.01),
        ("actor.entropy", "-1E-3", -0.001),
        ("actor.entropy", "2", 2.0),
        ("steps", "1e6", 1_000_000),
        ("compile", "true", True),
        ("logdir", "runs/one", "runs/one"),
        ("logdir", "null", None),
        ("device", "0", "0"),
        ("device", "", ""),
        ("layers", "[128]", (128,)),
        ("layers", "[1e2, 5]", (100, 5)),
    ],
)
def test_load_reads_override_as_type_of_default(path: Path, key: str, text: str, value: object) -> None:
    found = config.load(path, [], {key: text}).flat()[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("steps", "1.5", r"command line: steps is 1.5; it takes a whole number \(default 1000\)"),
        ("steps", "true", "steps is true; it takes a whole number"),
        ("steps", "null", "steps is null; it takes a whole number"),
        ("compile", "1", "compile is 1; it takes true or false"),
        ("actor.entropy", "high", "actor.entropy is 'high'; it takes a number"),
        ("actor.entropy", ".nan", "actor.entropy is nan; it takes a number"),
        ("layers", "64", r"layers is 64; it takes a list \(default \[64, 64\]\)"),
        ("layers", "[a]", r"layers\[0\] is 'a'; it takes a whole number"),
        ("actor", "3", "actor is a section; set one of its keys, such as actor.entropy"),
        ("seed", "{a: 1}", r"seed takes a value \(default 0\), not a section"),
        ("layers", "[1", "cannot read '\\[1' as a value of layers"),
    ],
)
def test_load_refuses_override_of_another_type(path: Path, key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(path, [], {key: text})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{step: 3}", "section broken: unknown key 'step'; the nearest is 'steps'"),
        ("{actor: {entrpy: 3}}", "unknown key 'actor.entrpy'; the nearest is 'actor.entropy'"),
        ("{entropy: 3}", "unknown key 'entropy'; the nearest is 'actor.entropy'"),
        ("{steps: many}", "section broken: steps is 'many'"),
        ("{device: 0}", "device is 0; it takes a text"),
        ("{actor: 3}", "actor is a section"),
        ("{seed: {a: 1}}", "not a section"),
        ("{1: 2}", "unknown key '1'"),
        ("3", "section 'broken' of .* must be a mapping"),
    ],
)
def test_load_refuses_mistakes_in_overlay(path: Path, section: str, message: str) -> None:
    path.write_text(SECTIONS + f"\nbroken: {section}\n")
    with pytest.raises(ConfigError, match=message):
        config.load(path, ["broken"], {})


def test_load_names_nearest_section_and_key(path: Path) -> None:
    with pytest.raises(ConfigError, match="no section 'tsp_atn'; the nearest is 'tsp_attn'"):
        config.load(path, ["tsp_atn"], {})
    with pytest.raises(ConfigError, match=r"unknown key 'actor\.grad_clp'; the nearest is 'actor\.grad_clip'"):
        config.load(path, [], {"actor.grad_clp": "1"})
    with pytest.raises(ConfigError, match=r"unknown key 'seed\.a'"):
        config.load(path, [], {"seed.a": "1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults:\n  a: 1\n  a: 2\n", 'configs.yaml:3: found duplicate key "a"'),
        ("defaults:\n  a: [1\n  b: 2\n", "configs.yaml:3: expected"),
        ("- 1\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("tsp: {a: 1}\n", "has no section 'defaults'"),
        ("defaults: {items: 1}\n", "'items' cannot be a config key"),
        ("defaults: {1: 2}\n", "1 cannot be a config key"),
        ("defaults: {a: \x00}\n", "is not YAML"),
    ],
)
def test_load_reports_broken_file_in_one_line(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        config.load(path, [], {})
    assert "\n" not in str(error.value)


def test_load_reports_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        config.load(tmp_path / "none.yaml", [], {})


FAMILIES = """\
defaults: {task: tsp, steps: 1, layers: 1, actor: {entropy: 0.5, units: 8}}
gym: {steps: 2, layers: 2, actor: {units: 16}}
cartpole: {task: gym_CartPole-v1, layers: 3}
short: {steps: 4}
"""


@pytest.fixture
def families(tmp_path: Path) -> Path:
    return written(tmp_path, FAMILIES)


@pytest.mark.parametrize("names", [["cartpole"], ["gym", "cartpole"], ["cartpole", "gym"]], ids=" ".join)
def test_load_lays_the_section_of_the_tasks_family_right_above_the_defaults(families: Path, names: list[str]) -> None:
    loaded = config.load(families, names, {})
    assert loaded.flat() == {
        "task": "gym_CartPole-v1",
        "steps": 2,
        "layers": 3,
        "actor.entropy": 0.5,
        "actor.units": 16,
    }


def test_load_takes_the_family_of_a_task_on_the_command_line(families: Path) -> None:
    loaded = config.load(families, ["short"], {"task": "gym_Pendulum-v1", "actor.units": "9"})
    assert (loaded.steps, loaded.layers, loaded.actor.units) == (4, 2, 9)
    back = config.load(families, ["cartpole"], {"task": "tsp"})
    assert (back.steps, back.layers, back.actor.units) == (1, 3, 8)


def test_load_lays_a_family_only_where_the_task_is_of_it(families: Path) -> None:
    assert config.load(families, [], {}).steps == 1
    assert config.load(families, ["gym"], {}).steps == 2
    assert config.load(families, [], {"task": "gymnastics"}).steps == 1
    assert config.load(families, [], {"task": "knapsack_20"}).steps == 1


BASES = """\
defaults: {task: tsp, steps: 1, actor: {lr: 1.0, lr_final: 1.0}, critic: {units: 1}}
common: {steps: 2, actor: {lr: 2.0}}
tsp_one: {base: [common], critic: {units: 3}}
tsp_two: {base: [tsp_one], steps: 4}
tsp_three: {steps: 5, actor: {lr: 5.0}}
"""


def test_load_lays_what_a_section_builds_on_right_below_it(tmp_path: Path) -> None:
    path = written(tmp_path, BASES)
    two = {"task": "tsp", "steps": 4, "actor.lr": 2.0, "actor.lr_final": 1.0, "critic.units": 3}
    assert config.load(path, ["tsp_two"], {}).flat() == two
    assert config.load(path, ["tsp_three", "tsp_two"], {}).flat() == two
    assert config.load(path, ["tsp_two", "tsp_three"], {}).flat() == two | {"steps": 5, "actor.lr": 5.0}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{base: [missing]}", "no section 'missing'"),
        ("{base: [broken]}", "section broken builds on itself"),
        ("{base: common}", r"base 'common'; it takes a list"),
        ("{base: [[common]]}", "it takes a list"),
    ],
)
def test_load_refuses_a_base_that_is_none(tmp_path: Path, section: str, message: str) -> None:
    path = written(tmp_path, BASES + f"broken: {section}\n")
    with pytest.raises(ConfigError, match=message):
        config.load(path, ["broken"], {})


SCHEDULED = """\
defaults: {actor: {entropy: 1.0, entropy_final: 1.0}}
falling: {actor: {entropy: 2.0, entropy_final: 0.5}}
flat: {actor: {entropy: 3.0}}
ending: {actor: {entropy_final: 0.0}}
"""


@pytest.mark.parametrize(
    ("names", "overrides", "expected"),
    [
        ([], {}, (1, 1)),
        (["falling"], {}, (2, 0.5)),
        (["falling"], {"actor.entropy": "4"}, (4, 4)),
        (["falling"], {"actor.entropy": "4", "actor.entropy_final": "3"}, (4, 3)),
        (["falling"], {"actor.entropy_final": "3"}, (2, 3)),
        (["falling", "flat"], {}, (3, 3)),
        (["flat", "ending"], {}, (3, 0)),
    ],
)
def test_load_sets_the_final_entropy_with_the_first_unless_a_layer_gives_both(
    tmp_path: Path, names: list[str], overrides: dict[str, str], expected: tuple[float, float]
) -> None:
    actor = config.load(written(tmp_path, SCHEDULED), names, overrides).actor
    assert (actor.entropy, actor.entropy_final) == expected


def test_config_is_immutable_and_nested(path: Path) -> None:
    loaded = config.load(path, [], {})
    assert loaded.actor.schedule.warmup == loaded["actor"]["schedule"]["warmup"] == 50
    with pytest.raises(AttributeError, match="cannot be changed"):
        loaded.seed = 3
    with pytest.raises(TypeError):
        loaded["seed"] = 3  # type: ignore[index]
    with pytest.raises(AttributeError, match="no config key 'sed'; the nearest is 'seed'"):
        _ = loaded.sed
    loaded.to_dict()["actor"]["entropy"] = 5
    assert loaded.actor.entropy == 3e-4


def test_config_survives_pickle_and_copy(path: Path) -> None:
    loaded = config.load(path, [], {})
    assert pickle.loads(pickle.dumps(loaded)) == loaded
    assert copy.deepcopy(loaded) == loaded


def test_config_replace_changes_one_value(path: Path) -> None:
    before = config.load(path, [], {})
    after = before.replace(seed=3, **{"actor.entropy": 1, "layers": (8,)})
    assert config.difference(after, before) == {"seed": 3, "actor.entropy": 1.0, "layers": (8,)}
    assert before.seed == 0
    with pytest.raises(ConfigError, match="replace: unknown key 'sed'"):
        before.replace(sed=3)
    with pytest.raises(ConfigError, match="replace: seed is 'x'"):
        before.replace(seed="x")


def test_parse_command_line_tells_the_family_from_the_defaults(families: Path) -> None:
    command = parse(families, "--task", "gym_Pendulum-v1")
    assert command.defaults.steps == 1
    changes = {"task": "gym_Pendulum-v1", "steps": 2, "layers": 2, "actor.units": 16}
    assert config.difference(command.config, command.defaults) == changes
