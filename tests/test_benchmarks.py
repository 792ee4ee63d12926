import json
import math
import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import compare
from benchmarks import (
    ablations,
    collecting,
    cost_fields,
    faults,
    move_errors,
    policy_gradient,
    sac_peer,
    sac_speed,
    sixty_numbers,
    speed,
    timing,
    worlds,
)
from config import load
from dreamer import Dreamer
from envs.routing import TSPInstance, tour_length
from guard import Guard
from imagining.behavior import ImagBehavior
from routing.cost_world import Costs
from routing.instances import uniform_coords
from training.devices import make_generators
from training.logdirs import unused_logdir
from training.logger import Logger
from training.setup import make_task

CPU = torch.device("cpu")
NODES = 6


@pytest.fixture
def agent():
    settings = load(policy_gradient.CONFIGS, ["debug"], {"actor.pointer.latent": "0"})
    return Dreamer.of(make_task(settings), settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))


@pytest.fixture
def instance(agent):
    return TSPInstance(coords=uniform_coords(3, NODES, generator=agent.generators["environment"], device=CPU))


def train(logdir, *options):
    policy_gradient.main(["--configs", "debug", "--device", "cpu", "--logdir", str(logdir), *options])
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def roll_out(agent, instance, *, first="any"):
    return policy_gradient.roll_out(agent, instance, tours=4, first=first, generator=agent.generators["acting"])


@pytest.mark.parametrize(("first", "starts"), [("any", [0, 1, 3, 4]), ("stored", [0, 0, 0, 0])])
def test_policy_gradient_roll_out_makes_whole_tours_of_their_true_length(agent, instance, first, starts):
    rollout = roll_out(agent, instance, first=first)
    nodes = torch.arange(NODES).expand(3, 4, NODES)
    assert torch.equal(rollout.action.sort(-1).values, nodes)
    assert torch.equal(rollout.action[..., -1], torch.tensor(starts).expand(3, 4))
    for tour in range(4):
        expected = tour_length(instance.coords, rollout.action[:, tour])
        torch.testing.assert_close(rollout.tour_length[:, tour], expected)


def test_policy_gradient_update_makes_short_tours_likelier(agent, instance):
    # Warm-up makes the first step tiny, and one step in the gradient's direction is all that is looked at.
    def log_probs():
        actor = agent.behavior.actor
        tables = actor.encode(agent.task.rules.node_features(instance))
        return actor(None, tables, rollout.view).log_prob(rollout.action).sum(-1)

    rollout = roll_out(agent, instance)
    before = log_probs()
    policy_gradient.update(agent, instance, rollout, progress=0.0)
    advantage = rollout.tour_length.mean(-1, keepdim=True) - rollout.tour_length
    assert ((log_probs() - before) * advantage).sum() > 0


def test_clipped_gain_by_hand():
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).log().requires_grad_()
    gain = policy_gradient.clipped_gain(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), clip=0.2)
    assert gain.tolist() == pytest.approx([1.2, -1.5, 0.5, -0.8, 2.2])
    (gradient,) = torch.autograd.grad(gain.sum(), log_ratio)
    assert gradient.tolist() == pytest.approx([0.0, -1.5, 0.5, 0.0, 2.2])


def test_policy_gradient_learns_from_a_batch_as_often_as_it_is_told(agent, instance):
    rollout = roll_out(agent, instance)
    policy_gradient.update(agent, instance, rollout, progress=0.0, epochs=3)
    assert agent.learner.optimizers["actor"].updates == 3


@pytest.mark.run
def test_policy_gradient_learns_and_counts_every_decision(tmp_path):
    options = ["--steps", "60000", "--instances", "4", "--actor.lr", "3e-3", "--schedule.warmup", "10"]
    rows = train(tmp_path / "run", *options, "--valid_instances", "64", "--eval_instances", "64")
    gaps = [row["valid_gap"] for row in rows if "valid_gap" in row]
    assert len(gaps) == policy_gradient.EVALUATIONS + 1
    assert gaps[-1] < gaps[0] / 2
    assert rows[-1]["eval_gap"] < gaps[0] / 2
    # 4 instances, 16 tours, 6 decisions: the 157th update passes 60,000.
    assert rows[-1]["step"] == 157 * 4 * 16 * NODES


@pytest.mark.run
def test_policy_gradient_ends_after_its_minutes(tmp_path):
    rows = train(tmp_path / "run", "--minutes", "0.01")
    assert 0.6 <= rows[-1]["seconds"] < 5
    assert rows[-1]["step"] % (32 * 16 * NODES) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--tours", "1"), "--tours is '1'"),
        (("--instances", "few"), "--instances is 'few'"),
        (("--minutes", "nan"), "--minutes is 'nan'"),
        (("--actor.type", "masked"), "actor.type is 'masked'"),
    ],
)
def test_policy_gradient_refuses(options, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *options)
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_policy_gradient_refuses_the_folder_of_another_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        train(tmp_path)
    assert "no run yet" in capsys.readouterr().err


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
    settings = load(speed.CONFIGS, ["debug"], {})
    monkeypatch.setattr(collecting, "MOST_SECONDS", 0.0)
    assert [each.environments for each in collecting.environments(settings, agent)] == [2]


def decisions_of_an_update(name, changes, *, stops_early=True):
    settings = load(speed.CONFIGS, [name, "debug"], changes)
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
    settings = load(speed.CONFIGS, ["debug"], {})
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


def test_sixty_numbers_pays_the_number_chosen_and_ends_by_time():
    env = gymnasium.make("SixtyNumbers-v0").unwrapped
    env.reset(seed=0)
    steps = [env.step(np.int64(number % 6)) for number in range(sixty_numbers.EPISODE)]
    for number, (obs, reward, *_) in enumerate(steps):
        assert reward == obs[number % 6]
    assert [truncated for *_, truncated, _ in steps] == [False] * (sixty_numbers.EPISODE - 1) + [True]
    assert len({reward for _, reward, *_ in steps}) == sixty_numbers.EPISODE


def test_worlds_prints_what_tours_cost_that_know_too_little(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    worlds.main(["--instances", "4", "--nodes", "6"])
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {row[0].strip("`"): row[1:] for row in table[2:]}
    assert rows["euclidean"][1:] == ["0.0", "0.0", "-"]
    assert float(rows["lanes"][1]) > float(rows["lanes"][2]) >= 0
    # On average over its direction, a stretch makes all moves dearer alike.
    assert float(rows["stretch"][3]) == pytest.approx(float(rows["stretch"][1]), abs=1.0)


def costly_agent(**changes):
    settings = load(policy_gradient.CONFIGS, ["debug"], changes)
    return Dreamer.of(make_task(settings), settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))


def test_move_error_is_zero_where_the_head_gives_the_costs_and_known_where_it_is_off():
    agent = costly_agent()
    settings = load(speed.CONFIGS, ["debug"], {})
    _, replay = collecting.act_and_store(agent, collecting.make_env(settings, agent, 8), settings)
    output = agent.model.heads["reward"].output
    for offset in (0.0, 0.25):
        with torch.no_grad():
            output.weight.zero_()
            output.bias.copy_(torch.tensor([-1.0, offset]))
        assert move_errors.move_error(agent, replay) == pytest.approx(offset, abs=1e-5)


def test_move_errors_of_a_run(reference, capsys, monkeypatch):
    monkeypatch.setattr(move_errors, "EPISODES", 8)
    move_errors.main([str(reference.logdir)])
    (_, _, row) = capsys.readouterr().out.splitlines()
    name, replayed, fresh = [cell.strip() for cell in row.split("|")[1:-1]]
    assert name == str(reference.logdir) and 0 < float(replayed) < 1 and 0 < float(fresh) < 1
    with pytest.raises(SystemExit):
        move_errors.main([shipped := str(speed.CONFIGS.with_name("checkpoints") / "tsp20.pt")])
    assert f"{shipped} is no folder of a run, whose replay is needed" in capsys.readouterr().err


def test_move_errors_tell_the_maps_of_a_run_from_fresh_ones(reference, monkeypatch):
    monkeypatch.setattr(move_errors, "EPISODES", 8)
    maps = []
    monkeypatch.setattr(move_errors, "move_error", lambda _agent, replay: maps.append(replay.rows["coords"][..., 0, 0]))
    move_errors.errors(reference.logdir)
    # Rows that were not filled are 0.
    lived, fresh = ({*part.flatten().tolist()} - {0.0} for part in maps)
    assert len(lived) > 40 and len(fresh) > 8 and not lived & fresh


def test_move_errors_scales_the_rewards_of_fresh_episodes_as_the_run_did(reference, monkeypatch):
    monkeypatch.setattr(move_errors, "EPISODES", 8)
    load_run, seen, scales = move_errors.loading.load_run, [], iter((1.0, 10.0))
    monkeypatch.setattr(move_errors, "move_error", lambda _, replay: seen.append(float(replay.rows["reward"].sum())))

    def load_scaled(*arguments, **options):
        run = load_run(*arguments, **options)
        assert isinstance(run.agent, Dreamer)
        run.agent.reward_scale = next(scales)
        return run

    monkeypatch.setattr(move_errors.loading, "load_run", load_scaled)
    for _ in range(2):
        move_errors.errors(reference.logdir)
    lived, fresh, lived_again, fresh_scaled = seen
    assert fresh < 0 and lived_again == lived
    assert fresh_scaled == pytest.approx(10 * fresh, rel=1e-5)


def test_cost_fields_of_fixed_costs_stand_beside_the_true_ones(tmp_path):
    agent = costly_agent(cost="lanes")
    with torch.no_grad():
        true, learnt = cost_fields.fields(agent, agent.task.rules.costs)
    # Level moves cost their length; upward ones less in the left half than in the right; the head starts at zero.
    torch.testing.assert_close(true[0], torch.ones_like(true[0]))
    assert (true[1, 0] < 0.5).all() and (true[1, -1] > 1.5).all()
    assert learnt.abs().max() == 0
    assert [path.name for path in cost_fields.draw(agent, tmp_path)] == ["field.png"]
    assert (tmp_path / "field.png").stat().st_size > 0


def test_cost_fields_of_hidden_costs_show_belief_and_tours(tmp_path):
    believing = {"model.belief": "true", "imag_start": "rows", "imag_first": "stored"}
    paths = cost_fields.draw(costly_agent(cost="stretch", **believing), tmp_path)
    assert [path.name for path in paths] == ["belief.png", "tours.png"]
    assert all(path.stat().st_size > 0 for path in paths)
    with pytest.raises(ValueError, match="keeps no belief"):
        cost_fields.draw(costly_agent(cost="stretch"), tmp_path)
    with pytest.raises(ValueError, match="veering change within an episode"):
        cost_fields.draw(costly_agent(cost="veering", **believing), tmp_path)


def test_cost_fields_of_streets_are_seconds_from_their_middle(tmp_path):
    agent = costly_agent(cost="streets", streets="helsinki")
    costs = agent.task.rules.costs
    true, learnt = cost_fields.seconds_from_the_middle(agent, costs)
    middle = int((costs.coords - costs.coords.mean(0)).norm(dim=-1).argmin())
    torch.testing.assert_close(true, costs.unit * costs.tables[0, middle])
    # The head starts at zero.
    assert learnt.abs().max() == 0
    assert [path.name for path in cost_fields.draw(agent, tmp_path)] == ["seconds.png"]
    assert (tmp_path / "seconds.png").stat().st_size > 0


def test_cost_fields_of_a_hidden_hour_are_refused(tmp_path):
    with pytest.raises(ValueError, match="costs of rush depend on a hidden hour"):
        cost_fields.draw(costly_agent(cost="rush", streets="helsinki"), tmp_path)


def test_policy_gradient_pays_costs_that_drift_after_every_move(instance, monkeypatch):
    agent = costly_agent(cost="veering", **{"actor.pointer.latent": "0"})
    # From 0 on, a quarter turn of the direction with every move.
    monkeypatch.setattr(Costs, "draw", lambda _costs, count, **_: torch.zeros(count, 1))
    monkeypatch.setattr(Costs, "drifted", lambda _costs, factors, _noise: (factors + 0.5) % 1)
    rollout = roll_out(agent, instance, first="stored")
    for tour in range(4):
        nodes = torch.nn.functional.pad(rollout.action[:, tour], (1, 0))
        stops = instance.coords.gather(1, nodes[..., None].expand(-1, -1, 2))
        difference = (stops[:, 1:] - stops[:, :-1]).abs()
        along, across = difference.clone(), difference.flip(-1)
        along[:, 1::2] = across[:, 1::2]
        expected = torch.stack((5 * along[..., 0], along[..., 1]), -1).norm(dim=-1).sum(1)
        torch.testing.assert_close(rollout.tour_length[:, tour], expected)


def test_policy_gradient_pays_hidden_costs(instance):
    agent = costly_agent(cost="stretch", **{"actor.pointer.latent": "0"})
    rollout = roll_out(agent, instance)
    shortest = torch.stack([tour_length(instance.coords, rollout.action[:, tour]) for tour in range(4)], 1)
    assert (rollout.tour_length > shortest).all() and (rollout.tour_length < 5 * shortest).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sac_speed_compares_with_a_peer(capsys):
    pytest.importorskip("stable_baselines3")
    sac_speed.main(["--rounds", "1"])
    table = capsys.readouterr().out
    assert "| ours |" in table and "| stable-baselines3 |" in table and "ratio: " in table


def test_sac_speed_refuses_a_number_of_rounds_that_is_none(capsys):
    with pytest.raises(SystemExit):
        sac_speed.main(["--rounds", "0"])
    assert "--rounds is '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--context", "dynamics_map"), "context is 'dynamics_map'; choose one of none"),
        (("--sac.critic", "symlog_disc"), "sac.critic is 'symlog_disc'; choose one of mse"),
        (("--rounds", "²"), "--rounds is '²'; it takes a whole number, at least 1"),
    ],
)
def test_sac_speed_refuses_an_unequal_contest(options, expected, capsys):
    with pytest.raises(SystemExit):
        sac_speed.main(list(options))
    assert capsys.readouterr().err.splitlines() == [f"sac_speed: {expected}"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sac_peer_logs_a_run_that_compare_can_read(tmp_path, capsys):
    pytest.importorskip("stable_baselines3")
    short = ["--steps", "600", "--prefill", "300", "--eval_every", "300", "--valid_episodes", "1"]
    sac_peer.main(["--configs", "sac_pendulum", *short, "--eval_episodes", "2", "--logdir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "valid_return" in row] == [300, 600]
    assert rows[-1]["step"] == 600 and -2000 < rows[-1]["eval_return"] < 0
    # Episodes of 200 steps: one has ended by 300, and two more by 600.
    assert [row["step"] for row in rows if "train_return" in row] == [300, 600]
    compare.main([str(tmp_path), "--at-steps", "600", "--out", str(tmp_path / "a.png")])
    assert "600" in capsys.readouterr().out


class Walk(gymnasium.Env):
    """Three steps to an episode; the reward counts all steps ever made."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(self.steps), False, self.steps % 3 == 0, {}


class Idler:
    """Stands for a peer: it steps its environment and learns nothing."""

    num_timesteps = 0

    def __init__(self, env):
        self.env = env

    def learn(self, steps, *, reset_num_timesteps):
        if not self.num_timesteps:
            self.env.reset()
        for _ in range(steps):
            self.num_timesteps += 1
            *_, terminated, truncated, _ = self.env.step(np.zeros(1))
            if terminated or truncated:
                self.env.reset()

    def predict(self, obs, *, deterministic):
        return np.zeros(1), None


def test_sac_peer_train_return_is_that_of_the_episodes_since_the_last_row(tmp_path):
    short = {"steps": "9", "eval_every": "2", "valid_episodes": "1", "eval_episodes": "1"}
    settings = load(sac_peer.CONFIGS, ["sac_pendulum"], short)
    env = sac_peer.Returns(Walk())
    logger = Logger(tmp_path)
    sac_peer.train(settings, logger, peer=Idler(env), env=env, other=Walk())
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Episodes end at 3, 6 and 9, with 1 + 2 + 3, 4 + 5 + 6 and 7 + 8 + 9.
    told = [(row["step"], row.get("train_return")) for row in rows if "valid_return" in row]
    assert told == [(2, None), (4, 6.0), (6, 15.0), (8, None), (9, 24.0)]
    assert not any("train_return" in row and row["train_return"] is None for row in rows)


def test_sac_peer_writes_nothing_where_a_package_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum", "--logdir", str(tmp_path / "run")])
    assert "stable-baselines3 is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--reward_scale", "0.1"), "reward_scale is 0.1; choose one of 1.0"),
        (("--context", "dynamics_map"), "context is 'dynamics_map'; choose one of none"),
        (("--valid_episodes", "0"), "valid_episodes is 0; it must be at least 1"),
        (("--eval_every", "0"), "eval_every is 0; it must be at least 1"),
        (("--replay_capacity", "0"), "replay_capacity is 0; it must be at least 1"),
        (("--sac.tau", "7"), "sac.tau is 7; it must be between 0 and 1"),
        (("--sac.critic", "symlog_disc"), "sac.critic is 'symlog_disc'; choose one of mse"),
        (("--envs", "8"), "envs is 8; choose one of 1"),
    ],
)
def test_sac_peer_refuses_what_it_does_not_do(options, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum", "--logdir", str(tmp_path / "run"), *options])
    assert capsys.readouterr().err.splitlines() == [f"sac_peer: {expected}"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_sac_peer_names_a_folder_that_cannot_be_written_to(below, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sac_peer, "make_peer", lambda config, env: None)
    (file := tmp_path / "file").write_text("something")
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum", "--logdir", str(file / below)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sac_peer: logdir {file / below} cannot be written to (")


def test_sac_peer_refuses_to_run_without_a_folder(capsys):
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum"])
    assert "name a folder that has no run yet" in capsys.readouterr().err


def test_sac_peer_refuses_actions_that_are_no_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sac_peer.main(["--task", "gym_CartPole-v1", "--logdir", str(tmp_path / "run")])
    assert "gym_CartPole-v1 has actions Discrete(2)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folder_of_a_run_may_be_named_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(speed.CONFIGS, ["debug"], {"logdir": "5"})
    assert str(unused_logdir(settings)) == "5"


@pytest.mark.parametrize("arguments", [[], ["folder", "no such variant"], ["folder", "base", "third"], ["--roo", "x"]])
def test_ablations_refuses_what_it_does_not_know(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        ablations.parse(arguments)
    assert stopped.value.code == 2 and "ablations: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--faults", "x"], ["--faults"], ["--faults", "0"], ["--seed", "-1"], ["--seed", "x"]]
)
def test_soak_refuses_a_mistake_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        faults.main(["soak", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"faults: {arguments[0]} ")
