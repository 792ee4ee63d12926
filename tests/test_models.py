from __future__ import annotations

import pytest
from torch import nn

from envs.tasks import Task
from imagining.behavior import make_actor
from networks import MaskedActor, TSPPointerActor
from settings.dreamer import ActorSettings
from tests.scenes import (
    ROUTING,
    SCRIPTED,
    Scene,
    debug_config,
)


@pytest.mark.parametrize(("actor_type", "expected"), [("tsp_pointer", TSPPointerActor), ("masked", MaskedActor)])
def test_make_actor_builds_every_type(actor_type: str, expected: type):
    assert (
        type(make_actor(ROUTING, Scene().imagination, ActorSettings.of(debug_config(**{"actor.type": actor_type}))))
        is expected
    )


def test_make_actor_refuses_a_pointer_where_there_are_no_nodes():
    with pytest.raises(ValueError, match="this task has none; choose masked"):
        make_actor(SCRIPTED, Scene(SCRIPTED).imagination, ActorSettings.of(debug_config()))


def norms(module: nn.Module) -> set[type]:
    return {type(part) for part in module.modules()} & {nn.RMSNorm, nn.LayerNorm}


@pytest.mark.parametrize("task", [ROUTING, SCRIPTED], ids=["routing", "vectors"])
@pytest.mark.parametrize(("norm", "expected"), [("rms", nn.RMSNorm), ("layer", nn.LayerNorm)])
def test_norm_is_the_same_everywhere(task: Task, norm: str, expected: type):
    scene = Scene(task, model__norm=norm)
    parts = scene.model, scene.behavior.actor, scene.behavior.critic, scene.behavior.slow_critic
    assert all(norms(part) == {expected} for part in parts)


def test_published_initialisation_leaves_no_bias():
    for initialisation, expected in (("torch", False), ("published", True)):
        scene = Scene(SCRIPTED, model__initialisation=initialisation)
        layers = [
            layer
            for part in (scene.model, scene.behavior.actor, scene.behavior.critic)
            for layer in part.modules()
            if isinstance(layer, nn.Linear) and layer.bias is not None and layer.weight.any()
        ]
        assert layers
        assert all(not layer.bias.any() for layer in layers) == expected
