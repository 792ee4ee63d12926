"""Compares compiled updates with those of the code as written; run as a program.

A process of its own, since the checks of shapes that tests wrap around every function cannot be compiled.

    python -m tests.compiled aot_eager tsp_attn cartpole
"""

from __future__ import annotations

import sys
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import config
import dreamer
from benchmarks import operators
from benchmarks.operators import CPU, Paper
from dreamer import Dreamer
from parts.acting import Sight
from tests.scenes import CONFIG_PATH
from updates.compiling import compile_parts

# Updates with the model and without it take turns, and each has been made once after two of them.
SMALL = {"envs": "3", "nodes": "5", "batch_length": "4", "model_every": "2", "actor.lr": "1e-3"}
HORIZON = {"imag_horizon": "2"}
# Enough latents for layers that gather weights.
MANY = {**HORIZON, "imag_tours": "64", "model.rssm.classes": "16"}
KINDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "tsp_attn": (("tsp_attn",), {}),
    "cvrp_attn": (("cvrp_attn",), {}),
    "tsp_critic": (("tsp_critic",), HORIZON),
    "cartpole": (("gym", "cartpole"), HORIZON),
    "pixelgrid": (("gym", "pixelgrid"), HORIZON),
    "half": (("gym", "cartpole"), {**HORIZON, "precision": "bfloat16"}),
}
MORE_KINDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "padded": (("tsp_attn",), {"curriculum": "[[3, 20], [5, null]]"}),
    "belief": (("tsp_few_steps", "tsp_stretch"), {}),
    "pickup_attn": (("pickup_attn",), {}),
    "switches": (("gym", "switches"), HORIZON),
    "predicted mask": (("gym", "switches"), {**HORIZON, "task": "gym_SwitchesNoRules-v0"}),
    "pendulum": (("gym", "pendulum"), HORIZON),
    "gathered": (("gym", "cartpole"), MANY),
    "gathered half": (("gym", "cartpole"), {**MANY, "precision": "bfloat16"}),
    "dynamics": (("gym", "pendulum"), {**HORIZON, "imag_gradient": "dynamics"}),
}


def make(kind: tuple[tuple[str, ...], dict[str, str]], **changes: str) -> Paper:
    """An agent of a kind that has collected some steps; the same ones each time."""
    sections, special = kind
    torch.manual_seed(0)
    settings = config.load(CONFIG_PATH, [*sections, "debug"], {**SMALL, **special, **changes})
    scene = operators.make_paper(settings, Dreamer, device=CPU)
    scene.replay.total = scene.replay.oldest = 0
    collect(scene, 3 * scene.agent.batch_length)
    return scene


def collect(scene: Paper, steps: int) -> None:
    (obs, is_first, any_first), draws = scene.sight, torch.Generator().manual_seed(1)
    state, no = scene.agent.initial_state(len(is_first)), torch.zeros_like(is_first)
    reward, ended = torch.zeros(no.shape), no
    for step in range(steps):
        action, state = scene.agent.act(Sight(obs, is_first, any_first), state, generator=scene.generators["acting"])
        flags = {"is_first": is_first, "is_last": ended, "is_terminal": ended}
        scene.replay.add({**obs, **flags, "action": action, "reward": reward, **scene.agent.memory(state)})
        if scene.env is not None:
            obs, reward, ended, _, info = scene.env.step(action)
            is_first, any_first = info["is_first"], info["any_first"]
        else:
            obs = {key: _random(value, draws) for key, value in obs.items()}
            reward, is_first, any_first = torch.rand(no.shape, generator=draws), no | (step % 5 == 4), step % 5 == 4


def _random(value: Tensor, draws: torch.Generator) -> Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, generator=draws)
    return torch.ones_like(value) if value.dtype == torch.bool else value


def updated(scene: Paper, count: int) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for _ in range(count):
        metrics |= scene.agent.update(scene.replay, progress=0.1)
    return metrics


def learnt(scene: Paper) -> Tensor:
    """All weights in a row."""
    modules = (scene.agent.model, scene.agent.behavior)
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compare(kind: tuple[tuple[str, ...], dict[str, str]], *, backend: str) -> None:
    """Fail where compiled updates differ from those of the code as written, break, or are compiled twice."""
    torch.compiler.reset()
    counters.clear()
    with patch.object(dreamer, "compile_parts", partial(compile_parts, backend=backend)):
        written, compiled = make(kind), make(kind, compile="kernels")
    assert graphs() == 0, "acting compiles nothing"
    half = written.agent.model.rssm.cell.gates.compute == torch.bfloat16
    tolerance = 5e-2 if half else 1e-3

    def require_close(ours: Tensor, theirs: Tensor, name: str) -> None:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10, msg=f"{name}: {ours} != {theirs}")

    begun = learnt(written)
    expected, found = updated(written, 2), updated(compiled, 2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not (half and "rate" in name):
            require_close(found[name], value, name)
    for module in ("model", "behavior"):
        ours, theirs = (getattr(scene.agent, module).state_dict() for scene in (compiled, written))
        for name, value in theirs.items():
            require_close(ours[name], value, name)
    # Two updates of a warm-up move weights by less than that tolerance, so it is also asked where they have moved to.
    theirs, ours = learnt(written) - begun, learnt(compiled) - begun
    assert theirs.norm() > 0 and (ours - theirs).norm() < (0.5 if half else 0.05) * theirs.norm()
    # Each of them was captured whole, and nothing of it is compiled again.
    before = graphs()
    assert before >= 3 and not counters["graph_break"]
    updated(compiled, 4)
    assert graphs() == before and not counters["graph_break"]


if __name__ == "__main__":
    for name in sys.argv[2:]:
        compare({**KINDS, **MORE_KINDS}[name], backend=sys.argv[1])
        print(name, flush=True)
