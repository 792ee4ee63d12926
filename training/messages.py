"""What a learner and its collectors send one another: facts as JSON and tensors as safetensors, neither of which runs.

From a collector come `hello`, `pieces`, `beat` and `bye`; from the learner `welcome`, `refused`, `go`, `stop`, and
empty messages that only ask whether anybody is there.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import Config, ConfigError
from settings.run import EnvironmentSettings, EvaluationSettings, LoopSettings, MachineSettings
from training.ring import Spaces

# The version of what is sent; both sides need the same.
VERSION = 1
HELLO, PIECES, BEAT, BYE = "hello", "pieces", "beat", "bye"
WELCOME, REFUSED, GO, STOP = "welcome", "refused", "go", "stop"
# What of a run's config may be another one in a collector, which reads none of it for what it plays, and how.
LOOSE = (MachineSettings, EnvironmentSettings, EvaluationSettings, LoopSettings)
STRICT = ("prefill_policy", "act", "reward_scale")
LOOSE_KEYS = ("compile", "batch_size", "batch_length")


class MessageFault(ValueError):
    """A message is none of these."""


class Message(NamedTuple):
    """A message: what it is about, its facts, and tensors by name."""

    kind: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def pack(kind: str, tensors: bytes = b"", **facts: Any) -> list[bytes]:
    """The frames of a message, with tensors that `pack_tensors` has made bytes of."""
    return [json.dumps({"kind": kind, **facts}).encode("utf-8"), tensors]


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as bytes."""
    from safetensors.torch import save

    # Copies: it takes none that share their memory, as parameters may.
    return bytes(save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}))


def unpack(frames: Sequence[bytes]) -> Message:
    """The message that the frames hold; nothing in them is run.

    Raises:
        MessageFault: they hold none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if len(frames) != 2:
        raise MessageFault(f"has {len(frames)} frames")
    try:
        facts = json.loads(frames[0])
        tensors = load(frames[1]) if frames[1] else {}
    except (ValueError, RecursionError, SafetensorError, KeyError, OverflowError, RuntimeError) as error:
        raise MessageFault(f"is none of ours ({type(error).__name__})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("kind"), str):
        raise MessageFault("does not say what it is about")
    return Message(facts.pop("kind"), facts, tensors)


def require_packages() -> None:
    """Check that what messages are made with is installed.

    Raises:
        ConfigError: it is not.
    """
    missing = [name for name in ("zmq", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'collectors need {" and ".join(missing)}: pip install -e ".[collectors]"')


def facts_of(config: Config, spaces: Spaces, *, agent: object) -> dict[str, Any]:
    """What a learner and a collector must have in common, as it comes out of JSON.

    Args:
        config: of the run.
        spaces: of all that a row has.
        agent: who acts.
    """
    loose = {section.key(field.name) for section in LOOSE for field in fields(section)} - {*STRICT}
    settings = {key: value for key, value in config.flat().items() if key not in {*loose, *LOOSE_KEYS}}
    facts = {
        "version": VERSION,
        "agent": type(agent).__name__,
        "settings": settings,
        "rows": {name: [list(shape), str(dtype)] for name, (shape, dtype) in spaces.items()},
    }
    return dict(json.loads(json.dumps(facts)))


def difference_of(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why a collector does not fit a learner, in words, if it does not.

    Args:
        ours: `facts_of` the learner.
        theirs: what a collector says of itself.
    """
    if theirs.get("version") != ours["version"]:
        return f"the learner has version {ours['version']}, the collector {theirs.get('version')}: update one of them"
    if theirs.get("agent") != ours["agent"]:
        return f"the learner trains a {ours['agent']}, and the collector is started for a {theirs.get('agent')}"
    for part, words in (
        ("settings", "the learner has {key} {mine}, the collector {other}: give both the same"),
        ("rows", "{key} is {mine} for the learner and {other} for the collector"),
    ):
        mine, other = ours[part], theirs.get(part)
        if not isinstance(other, dict):
            return f"the collector does not tell its {part}"
        for key in sorted({*mine, *other}):
            if mine.get(key) != other.get(key):
                return words.format(key=key, mine=mine.get(key, "none"), other=other.get(key, "none"))
    return None


def weights_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of modules, by one name each."""
    return {f"{part}.{name}": value for part, each in modules.items() for name, value in each.state_dict().items()}


def take_weights(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Give modules the weights that `weights_of` gave.

    Raises:
        MessageFault: they are of others.
    """
    ours = weights_of(modules)
    strange = sorted(
        name
        for name in {*ours, *weights}
        if name not in weights or name not in ours or ours[name].shape != weights[name].shape
    )
    if strange:
        raise MessageFault(f"has other weights, such as {strange[0]}")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(weights[name])
