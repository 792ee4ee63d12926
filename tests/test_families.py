"""Keys that only one family of tasks reads."""

from __future__ import annotations

import pytest

from config import ConfigError, parse_command_line
from settings.command_line import SHARED_SECTIONS
from settings.families import GYM_KEYS, ROUTING_KEYS, require_read
from settings.files import read_sections
from settings.mapping import Config
from tests.scenes import CONFIG_PATH

CARTPOLE = "gym_CartPole-v1"
NAMES = [name for name in read_sections(CONFIG_PATH) if name not in SHARED_SECTIONS]


def refusal(*argv: str) -> str | None:
    """How a command line is refused; None where it is not."""
    command = parse_command_line(argv, config_path=CONFIG_PATH, description="", entry_keys={})
    try:
        require_read(command.config.task, command.given)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "argv",
    [
        ["--imag_start", "rows"],
        ["--imag_penalty", "2"],
        ["--critic.latent", "true"],
        ["--critic.share", "0.5"],
        ["--reward_updates", "2"],
        ["--imag_generated", "0.1"],
        ["--model.reward_latent", "true"],
        ["--valid_instances", "20"],
        ["--actor.pointer.latent", "8"],
        ["--cost", "lanes"],
        # The value makes no difference: who gives the key expects something of it.
        ["--cost", "euclidean"],
    ],
    ids=" ".join,
)
def test_gymnasium_task_refuses_what_routing_alone_reads(argv: list[str]):
    line = f"command line: {argv[0][2:]} is for routing, and {CARTPOLE} does not read it: leave it out"
    assert refusal("--task", CARTPOLE, *argv) == line
    assert refusal("--task", "tsp", *argv) is None


@pytest.mark.parametrize("argv", [["--valid_episodes", "3"], ["--env_timeout", "3"]], ids=" ".join)
def test_routing_refuses_what_gymnasium_environments_alone_read(argv: list[str]):
    line = f"command line: {argv[0][2:]} is for gymnasium environments, and tsp does not read it: leave it out"
    assert refusal(*argv) == line
    assert refusal("--task", CARTPOLE, *argv) is None


def test_section_of_the_other_family_is_refused_by_its_name():
    line = refusal("--configs", "tsp_attn", "--task", CARTPOLE)
    assert line is not None
    assert line.startswith("section tsp_attn: ") and f"is for routing, and {CARTPOLE} does not read it" in line


@pytest.mark.parametrize("name", NAMES)
def test_section_sets_nothing_that_its_task_does_not_read(name: str):
    assert refusal("--configs", name) is None


@pytest.mark.parametrize("key", [*ROUTING_KEYS, *GYM_KEYS])
def test_key_of_a_family_exists(key: str):
    flat = Config(read_sections(CONFIG_PATH)["defaults"].values).flat()
    assert any(each == key or each.startswith(f"{key}.") for each in flat)
