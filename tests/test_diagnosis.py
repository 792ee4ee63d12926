from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import config
import dreamer
from benchmarks.faults import KINDS
from guard import Guard, GuardSettings, culprit
from training import devices, setup
from training.replay import Replay
from training.setup import make_task
from updates.diagnosis import MOST_ENTRIES, bad_tensors, diagnose
from updates.learner import Attempt

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")
CONFIGS = Path(dreamer.__file__).parent / "configs.yaml"


def batch(**bad: Tensor) -> dict[str, Tensor]:
    env = torch.tensor([[3, 3, 3], [5, 5, 5]])
    column = torch.tensor([[10, 11, 12], [7, 8, 9]])
    return {
        "image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "place": torch.ones(2, 3, 2),
        "reward": torch.zeros(2, 3),
        "is_first": torch.zeros(2, 3, dtype=torch.bool),
        "env": env,
        "column": column,
        **bad,
    }


def examine(net: nn.Module, inputs: Tensor, **arguments: Any) -> dict[str, Any]:
    def run_again() -> list[tuple[Tensor, dict[str, Tensor]]]:
        return [(net(inputs).sum(), {f"net.{name}": p for name, p in net.named_parameters()})]

    return diagnose(
        run_again, **{"modules": {"net": net}, "batch": batch(), "guard": Guard("cpu"), "update": 0, **arguments}
    )


class Root(nn.Module):
    """The square root, whose gradient at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def test_diagnosis_of_a_finite_update_finds_nothing():
    assert examine(nn.Linear(2, 2), torch.ones(1, 2)) == {"findings": [], "seen": [], "rows": []}


def test_diagnosis_names_the_first_module_and_nothing_behind_it():
    middle = nn.Linear(3, 3)
    net = nn.Sequential(nn.Linear(2, 3), middle, nn.Linear(3, 1))
    with torch.no_grad():
        middle.bias[2] = NAN
    found = examine(net, torch.ones(4, 2))["findings"]
    assert [(each["kind"], each["name"]) for each in found] == [("output of", "net.1"), ("loss of", "net")]
    assert found[0]["shape"] == [4, 3]
    assert found[0]["bad_share"] == pytest.approx(1 / 3)


def test_diagnosis_names_a_gradient_behind_a_finite_loss():
    first = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(first.weight)
    net = nn.Sequential(first, Root())
    found = examine(net, torch.ones(1, 1))["findings"]
    assert [(each["kind"], each["name"]) for each in found] == [("gradient of", "net.0.weight")]


def test_diagnosis_names_the_key_and_the_rows_in_replay():
    place = torch.ones(2, 3, 2)
    place[0, 2, 1], place[1, 0, 0] = NAN, INF
    report = examine(nn.Linear(2, 2), torch.ones(1, 2), batch=batch(place=place))
    assert [(each["kind"], each["name"]) for each in report["findings"]] == [("replayed", "place")]
    assert report["rows"] == [(3, 12), (5, 7)]


def test_diagnosis_tells_what_the_guard_saw_in_this_update():
    guard = Guard("cpu")
    guard.watch("loss", ["old"], torch.tensor([NAN]))
    guard.update = 7
    guard.watch("loss", ["a", "b", "c", "d", "e"], torch.tensor([NAN, 1.0, INF, NAN, NAN]))
    guard.watch("gradient", ["weight"], torch.tensor([NAN]))
    seen = examine(nn.Linear(2, 2), torch.ones(1, 2), guard=guard, update=7)["seen"]
    assert [each["name"] for each in seen] == ["a", "c", "d", "weight"]


def test_diagnosis_leaves_no_hooks_behind():
    net = nn.Linear(2, 2)
    examine(net, torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="broken"):
        diagnose(_raise, modules={"net": net}, batch=batch(), guard=Guard("cpu"), update=0)
    assert not net._forward_hooks


def _raise() -> Any:
    raise RuntimeError("broken")


def test_bad_tensors_tells_share_and_range_of_the_rest():
    values = torch.tensor([1.0, -2.0, NAN, INF])
    (entry,) = bad_tensors("state", {"good": torch.ones(2), "whole": torch.ones(2).int(), "bad": values})
    assert entry == {"kind": "state", "name": "bad", "shape": [4], "bad_share": 0.5, "min": -2.0, "max": 1.0}


def test_bad_tensors_names_what_is_too_large_to_be_squared():
    (entry,) = bad_tensors("replayed", {"reward": torch.tensor([1.0, 1e30]), "place": torch.tensor([1e10])})
    assert (entry["name"], entry["bad_share"]) == ("reward", 0.0)
    assert entry["max"] == pytest.approx(1e30)


def test_bad_tensors_ends_somewhere():
    assert len(bad_tensors("state", {str(i): torch.tensor([NAN]) for i in range(99)})) == MOST_ENTRIES


# The whole agent


@pytest.fixture
def agent() -> dreamer.Dreamer:
    settings = config.load(CONFIGS, ["debug"], {"model_every": "1"})
    generators = devices.make_generators(0, CPU)
    guard = Guard(CPU, GuardSettings(max_skips=100))
    return dreamer.Dreamer.of(make_task(settings), settings, device=CPU, generators=generators, guard=guard)


@pytest.fixture
def replay(agent: dreamer.Dreamer) -> Replay:
    env = setup.make_setup(config.load(CONFIGS, ["debug"], {}), CPU).make_env(agent.generators)
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()} | {"action": ((), torch.int64)}
    replay = Replay(spaces, num_envs=env.num_envs, capacity=400, device=CPU)
    reward, ended = torch.zeros(env.num_envs), torch.zeros(env.num_envs, dtype=torch.bool)
    for _ in range(30):
        action = obs["action_mask"].int().argmax(-1)
        ends = {"is_first": info["is_first"], "is_last": ended, "is_terminal": ended}
        replay.add({**obs, **ends, "reward": reward, "action": action})
        obs, reward, ended, _, info = env.step(action)
    return replay


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("model", "model.rssm"),
        ("actor", "actor.encoder.embed"),
        ("critic", "critic.nodes.embed"),
    ],
)
def test_report_names_a_module_whose_output_is_not_finite(agent: dreamer.Dreamer, replay: Replay, part: str, name: str):
    owner = agent.model if part == "model" else getattr(agent.behavior, part)
    modules = {f"{part}.{key}".rstrip("."): module for key, module in owner.named_modules()}
    chosen = next(key for key, module in modules.items() if key.startswith(name) and isinstance(module, nn.Linear))
    spoil = modules[chosen].register_forward_hook(lambda _module, _inputs, output: output * NAN)
    agent.update(replay, progress=0.0)
    spoil.remove()
    (report,) = agent.guard.reports
    first = report["findings"][0]
    assert (first["kind"], first["name"], first["bad_share"]) == ("output of", chosen, 1.0)
    assert culprit(report) == f"output of {chosen}"


def test_report_names_replayed_key_and_rows(agent: dreamer.Dreamer, replay: Replay):
    replay.rows["coords"][:, :, 1, 0] = INF
    agent.update(replay, progress=0.0)
    (report,) = agent.guard.reports
    assert culprit(report) == "replayed coords"
    assert report["rows"] and all(0 <= env < 4 and 0 <= column < 30 for env, column in report["rows"])


def test_diagnosis_changes_nothing_of_the_agent(agent: dreamer.Dreamer, replay: Replay):
    agent.update(replay, progress=0.0)
    batch = agent._sample(replay)
    draws = {name: generator.get_state() for name, generator in agent.generators.items()}
    torch.rand(3, generator=agent.generators["model"])
    now = {name: generator.get_state() for name, generator in agent.generators.items()}
    before = {name: value.clone() for name, value in agent.learner.recovery._state().items()}

    def compute() -> Any:
        return agent._losses(batch, None, with_model=True, progress=0.0, rewards=replay.rewards)

    attempt = Attempt(compute, batch, draws, torch.zeros(()))
    agent.learner._find_cause(attempt, update=1, take_back=True)
    after = agent.learner.recovery._state()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(torch.equal(value, agent.generators[name].get_state()) for name, value in now.items())
    assert all(p.grad is None or p.grad.isfinite().all() for p in agent.model.parameters())


SKIPPED_GROUPS = {
    "NaN in a gradient of the model": "model",
    "NaN in a gradient of the actor": "actor",
    "NaN in a gradient of the critic": "critic",
}


@pytest.mark.parametrize("kind", SKIPPED_GROUPS)
def test_update_skips_one_group_alone_and_bitwise(agent: dreamer.Dreamer, replay: Replay, kind: str):
    agent.update(replay, progress=0.0)
    before = {name: value.clone() for name, value in agent.learner.recovery._state().items()}
    with KINDS[kind](agent, random.Random(0)):
        agent.update(replay, progress=0.0)
    after = agent.learner.recovery._state()
    group = SKIPPED_GROUPS[kind]
    own = {
        "model": ("model.", "model optimizer."),
        "actor": ("behavior.actor.", "actor optimizer.", "behavior.scale."),
        "critic": ("behavior.critic.", "behavior.slow_critic.", "critic optimizer."),
    }
    for name, prefixes in own.items():
        changed = [key for key in before if key.startswith(prefixes) and not torch.equal(before[key], after[key])]
        assert bool(changed) == (name != group), changed
