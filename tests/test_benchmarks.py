import json
import sys

import gymnasium
import numpy as np
import pytest
import torch

import compare
from benchmarks import ablations, cost_fields, faults, move_errors, policy_gradient, sac_peer, sac_speed, speed, worlds
from config import load
from dreamer import Dreamer
from envs.routing import TSPInstance, tour_length
from guard import Guard
from imagining.behavior import ImagBehavior
from routing.costs import Costs
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


@pytest.mark.parametrize("options", [(), ("--baseline", "critic", "--imag_start", "replay", "--imag_first", "stored")])
def test_speed_prints_both_tables_and_leaves_the_code_as_it_was(options, capsys, monkeypatch):
    monkeypatch.setattr(speed, "ENV_SECONDS", 0.02)
    monkeypatch.setattr(speed, "GUARD_PAIRS", 3)
    roll_out = ImagBehavior._roll_out
    speed.main(["--configs", "debug", "--device", "cpu", "--updates", "4", *options])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    figures = {row[0]: float(row[1].replace(",", "")) for row in rows if row[0] not in ("what", "phase")}
    for name in ("env steps, 64 environments", "env steps, 4096 environments", "updates"):
        assert figures[name] > 0
    for phase in ("model", "reward updates", "imagine", "score", "critic", "backward and step"):
        assert figures[phase] > 0
    parts = list(figures)[list(figures).index("replay sample") : -1]
    assert sum(figures[part] for part in parts) == pytest.approx(figures["update"], abs=0.1)
    assert ImagBehavior._roll_out is roll_out


def test_speed_refuses_a_task_that_is_no_routing(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--task", "gym_CartPole-v1", "--configs", "debug"])
    assert "task is 'gym_CartPole-v1'; the parts are those of routing: tsp" in capsys.readouterr().err


def test_speed_imagined_decisions_counts_all_trajectories(agent):
    settings = load(speed.CONFIGS, ["debug"], {})
    _, replay = speed.act_and_store(agent, speed.make_env(settings, agent, settings.envs), settings)
    # 4 episodes, 4 tours of each, 6 decisions.
    assert speed.imagined_decisions(agent, replay) == 96


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
    _, replay = speed.act_and_store(agent, speed.make_env(settings, agent, 8), settings)
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
