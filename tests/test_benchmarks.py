from contextlib import closing
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest
import torch

from benchmarks import (
    ablations,
    collecting,
    cost_fields,
    faults,
    move_errors,
    ranks,
    sixty_numbers,
    worlds,
)
from benchmarks.flags import CONFIGS
from config import load
from dreamer import Dreamer
from envs.routing import TSPInstance, TSPRules
from guard import Guard
from routing.instances import uniform_coords
from tests.benchmark_scenes import small_agent
from training.devices import make_generators
from training.logdirs import unused_logdir
from training.setup import make_task

CPU = torch.device("cpu")
NODES = 6


@pytest.fixture
def agent():
    return small_agent()


@pytest.fixture
def instance(agent):
    return TSPInstance(coords=uniform_coords(3, NODES, generator=agent.generators["environment"], device=CPU))


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
    settings = load(CONFIGS, ["debug"], changes)
    return Dreamer.of(make_task(settings), settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))


def test_move_error_is_zero_where_the_head_gives_the_costs_and_known_where_it_is_off():
    agent = costly_agent()
    settings = load(CONFIGS, ["debug"], {})
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
        move_errors.main([shipped := str(CONFIGS.with_name("checkpoints") / "tsp20.pt")])
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


@pytest.mark.parametrize(("error", "expected"), [("squared", 0.5), ("absolute", 0.25)])
def test_move_error_is_a_root_of_squares_alone(error: str, expected: float, monkeypatch: pytest.MonkeyPatch):
    agent = costly_agent(cost="lanes", **{"model.move_error": error})
    monkeypatch.setattr(agent.model, "first_instance", lambda batch: None)
    monkeypatch.setattr(agent.model, "move_loss", lambda batch, instance, feat: torch.tensor(0.25))
    replay = Mock(sample_episodes=Mock(return_value={}))
    assert move_errors.move_error(agent, replay) == pytest.approx(expected / agent.reward_scale)


@pytest.mark.parametrize("act", ["policy", "plan"])
def test_collectors_play_as_the_run_does(act: str):
    agent, other = costly_agent(cost="lanes"), "plan" if act == "policy" else "policy"
    settings = load(CONFIGS, ["debug"], {"cost": "lanes", "act": act})
    silent = Mock(side_effect=AssertionError(f"{other} has no part in this"))
    agent.players[other] = Mock(act=silent, initial_state=silent)
    with closing(collecting.make_env(settings, agent, 2)) as env:
        _, replay = collecting.act_and_store(agent, env, settings, sequences=1)
    assert len(replay) and not silent.called


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


def test_folder_of_a_run_may_be_named_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(CONFIGS, ["debug"], {"logdir": "5"})
    assert str(unused_logdir(settings)) == "5"


@pytest.mark.parametrize(
    "arguments",
    [[], ["folder", "third"], ["folder", "--variant", "none such"], ["folder", "--seeds", "0"], ["--roo", "x"]],
)
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


def test_own_reward_of_the_ablations_is_minus_the_distance(instance: TSPInstance):
    state = TSPRules.reset(instance, torch.tensor([0, 1, 2]))
    action = torch.tensor([3, 4, 5])
    expected = -TSPRules.cost(instance, state, action)
    torch.testing.assert_close(ablations.own_reward(instance, state, action), expected)


def test_predicted_costs_of_ranks_lie_on_a_line_through_the_whole_and_a_quarter():
    whole, quarter = (
        ranks.Costs(*seconds, number=0.0, gradients=0.0, megabytes=1.0) for seconds in ((10, 100), (4, 40))
    )
    assert ranks.predicted(whole, quarter, 1) == (10, 100)
    assert ranks.predicted(whole, quarter, 2) == (6, 60)
    assert ranks.predicted(whole, quarter, 4) == (4, 40)
