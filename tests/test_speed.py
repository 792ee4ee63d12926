"""The benchmark of speed: what it times and counts, and what it prints."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import (
    collecting,
    speed,
    timing,
)
from benchmarks.flags import CONFIGS
from config import load
from dreamer import Dreamer
from guard import Guard
from imagining.behavior import ImagBehavior
from tests.benchmark_scenes import small_agent
from training.devices import make_generators
from training.setup import make_task

CPU = torch.device("cpu")


@pytest.fixture
def agent():
    return small_agent()


@pytest.fixture
def quick_speed(monkeypatch):
    monkeypatch.setattr(collecting, "ENV_SECONDS", 0.02)
    # A busy machine leaves no number of environments out.
    monkeypatch.setattr(collecting, "MOST_SECONDS", math.inf)
    monkeypatch.setattr(speed, "GUARD_PAIRS", 3)
    monkeypatch.setattr(collecting, "TENSOR_COUNTS", (2, 64))
    monkeypatch.setattr(collecting, "GYM_COUNTS", (1, 2))
    monkeypatch.setattr(timing, "PEAK_ROWS", {"cpu": 64})


def speed_report(capsys, *options):
    speed.main([*options, "--device", "cpu", "--updates", "4", "--json"])
    return json.loads(capsys.readouterr().out)


DREAMERS_PHASES = [
    "replay sample",
    "observe",
    "model",
    "start",
    "imagine",
    "reward",
    "targets",
    "worth",
    "score",
    "critic",
]


@pytest.mark.run
@pytest.mark.parametrize(
    ("options", "counts", "phases"),
    [
        (("--configs", "debug"), [2, 64], [*DREAMERS_PHASES, "reward updates", "encode"]),
        (("--configs", "tsp_critic", "debug", "--precision", "bfloat16"), [2, 64], DREAMERS_PHASES),
        (("--configs", "cartpole", "debug"), [1, 2], [*DREAMERS_PHASES, "replayed value"]),
        (("--configs", "sac", "sac_pendulum", "debug", "--agent", "sac"), [1, 2], ["replay sample", "losses"]),
        (("--configs", "sac", "tsp_sac", "debug", "--agent", "sac"), [2, 64], ["replay sample", "losses"]),
    ],
    ids=["tsp", "critic", "cartpole", "sac", "tsp_sac"],
)
def test_speed_times_every_phase_of_every_agent(options, counts, phases, capsys, quick_speed):
    report = speed_report(capsys, *options)
    assert [each["environments"] for each in report["environments"]] == counts
    assert all(each["alone"] > each["acting"] > 0 for each in report["environments"])
    update = report["update"]
    assert update["updates"] == 4 and update["seconds"]["wall"] >= update["seconds"]["processor"] / 2 > 0
    assert bool(update["imagined"]) == ("imagine" in phases)
    assert update["share"] == pytest.approx(update["flop"] / update["peak"] / update["seconds"]["processor"])
    whole = report["phases"].pop("update")
    assert {*phases, "backward and step", "the rest"} <= report["phases"].keys()
    for clock in ("wall", "processor"):
        assert sum(each[clock] for each in report["phases"].values()) == pytest.approx(whole[clock])
    assert report["guard"]["pairs"] == 3


def test_speed_prints_what_it_measured_as_tables(capsys, quick_speed, monkeypatch):
    kept: list[bool] = []
    monkeypatch.setattr("training.devices.keep_freed_memory", lambda: kept.append(True))
    roll_out = ImagBehavior._roll_out
    speed.main(["--configs", "debug", "--device", "cpu", "--updates", "4"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    figures = {row[0]: [float(cell.replace(",", "")) for cell in row[1:]] for row in rows if row[-1][0].isdigit()}
    assert len(figures["64"]) == 2 and figures["imagined decisions"] == [96.0]
    assert figures["updates per second"][0] == pytest.approx(1000 / figures["ms, wall clock"][0], rel=0.05)
    assert figures["update"][2] == 100.0
    # As a run does; and the code is as it was.
    assert kept == [True] and ImagBehavior._roll_out is roll_out


def test_speed_leaves_the_guard_out_where_it_would_take_long(capsys, quick_speed, monkeypatch):
    monkeypatch.setattr(speed, "GUARD_SECONDS", 0.0)
    assert speed_report(capsys, "--configs", "debug")["guard"] is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--updates", "²"), "--updates is '²'; it takes a whole number, at least 1"),
        (("--agent", "ppo"), "--agent is 'ppo'; it takes one of dreamer, sac"),
        (("--task", "gym_Nothing-v0"), "no environment is registered as 'Nothing-v0'"),
    ],
)
def test_speed_refuses(options, expected, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--configs", "debug", *options])
    assert expected in capsys.readouterr().err


def test_speed_leaves_out_numbers_of_environments_that_would_take_long(agent, quick_speed, monkeypatch):
    settings = load(CONFIGS, ["debug"], {})
    monkeypatch.setattr(collecting, "MOST_SECONDS", 0.0)
    assert [each.environments for each in collecting.environments(settings, agent)] == [2]


def decisions_of_an_update(name, changes, *, stops_early=True):
    settings = load(CONFIGS, [name, "debug"], changes)
    agent = Dreamer.of(make_task(settings), settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))
    _, replay = collecting.act_and_store(agent, collecting.make_env(settings, agent, settings.envs), settings)
    agent.imagination.stops_early = stops_early
    with speed.counting_decisions(agent) as counts:
        speed.update_seconds(agent, replay, 2)
    return [int(count) for count in counts], agent


def test_speed_counts_the_decisions_of_all_trajectories():
    # 4 episodes, 4 tours of each, 6 decisions.
    assert decisions_of_an_update("tsp_attn", {})[0] == [96, 96]


@pytest.mark.parametrize("stops_early", [True, False])
def test_speed_counts_no_decisions_beyond_the_last_plan(stops_early):
    counts, agent = decisions_of_an_update("cvrp_attn", {"nodes": "6"}, stops_early=stops_early)
    # 4 episodes, 4 plans of each; the horizon is a route of its own for each of 5 customers.
    assert agent.imagination.horizon == 10
    assert all(count % 16 == 0 and 6 * 16 <= count < 10 * 16 for count in counts)


def test_speed_times_what_is_compiled_as_one_phase(agent, quick_speed):
    settings = load(CONFIGS, ["debug"], {})
    agent.compiled = "kernels"
    _, replay = collecting.act_and_store(agent, collecting.make_env(settings, agent, settings.envs), settings)
    phases = speed.phase_seconds(agent, replay, 2)
    assert phases["losses"].wall > 0 and not {"reward", "targets", "worth", "score", "critic"} & phases.keys()


def test_phase_timer_counts_a_phase_within_another_once(monkeypatch):
    clock = iter([timing.Seconds(float(second), second / 2) for second in (0, 10, 13, 20)])
    monkeypatch.setattr(timing, "now", lambda device: next(clock))
    timer = timing.PhaseTimer(CPU)
    inner = timer.timed("inner", lambda: None)
    timer.timed("outer", inner)()
    assert timer.seconds == {"outer": timing.Seconds(17.0, 8.5), "inner": timing.Seconds(3.0, 1.5)}


def test_operations_of_a_product_and_its_gradient_by_hand():
    left, right = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True)
    # 2 x 2 x 3 x 5, and as many for the one gradient.
    assert timing.operations(lambda: (left @ right).sum().backward()) == 120


def test_operations_of_attention_by_hand():
    query, key, value = torch.ones(3, 1, 2, 16, 8).requires_grad_().unbind(0)
    attend = torch.nn.functional.scaled_dot_product_attention
    # Two heads; scores and their product with values: 2 x 2 x (2 x 16 x 16 x 8).
    assert timing.operations(lambda: attend(query, key, value)) == 16384
    # Scores are computed anew, and there are gradients by values, weights of values, queries and keys.
    assert timing.operations(lambda: attend(query, key, value).sum().backward()) == 16384 * 7 // 2


def test_peak_is_that_of_the_fastest_product(monkeypatch):
    # The first product prepares; the others take 2, 1, 4, 4 and 4 seconds of the processor.
    times = iter([0, 0.1, 10, 12, 20, 21, 30, 34, 40, 44, 50, 54])
    monkeypatch.setattr(timing, "now", lambda device: timing.Seconds(0.0, next(times)))
    monkeypatch.setattr(timing, "PEAK_ROWS", {"cpu": 10})
    assert timing.peak(torch.bfloat16, CPU) == 2000.0


def test_most_memory_is_in_megabytes():
    if not (status := Path("/proc/self/status")).exists():
        pytest.skip("no /proc here to compare with")
    block = torch.ones(40_000_000, device=CPU)
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert timing.most_memory(CPU)["host"] == pytest.approx(int(kilobytes) * 1.024e-3, rel=0.2)
    assert timing.most_memory(CPU)["host"] > block.nbytes / 1e6
