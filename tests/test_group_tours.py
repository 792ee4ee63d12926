import json
from typing import Any

import pytest
import torch

import grpo
from envs.routing import ATSPRules, CVRPRules, TSPInstance, tour_length
from groups.tours import TourSampler
from parts.views import View
from routing.cost_world import Costs
from routing.instances import uniform_coords
from tests.group_scenes import tour_sampler, trainer

CPU = torch.device("cpu")
NODES = 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def instance():
    return TSPInstance(coords=uniform_coords(3, NODES, generator=generator(0), device=CPU))


def play(sampler: TourSampler, instance: Any, *, tours: int = 4) -> Any:
    starts = (torch.arange(tours) * NODES // tours).expand(3, tours) if sampler.spreads else None
    return sampler.play(instance, torch.Size((3, tours)), starts, generator=generator(1))


@pytest.mark.parametrize(("first", "starts"), [("any", [0, 1, 3, 4]), ("stored", [0, 0, 0, 0])])
def test_tours_are_whole_and_earn_minus_their_length(instance, first, starts):
    samples = play(tour_sampler(imag_first=first), instance)
    action = samples.decisions.action
    assert torch.equal(action.sort(-1).values, torch.arange(NODES).expand(3, 4, NODES))
    assert torch.equal(action[..., -1], torch.tensor(starts).expand(3, 4))
    assert bool((samples.counted == 1).all())
    for tour in range(4):
        torch.testing.assert_close(-samples.reward[:, tour], tour_length(instance.coords, action[:, tour]))


def test_tours_begin_at_nodes_spread_over_an_instance():
    sampler = tour_sampler(nodes=8)
    samples = sampler.draw(2, 4, generator=generator(1), environment=generator(2))
    assert torch.equal(samples.decisions.view.first[..., 0], torch.tensor([[0, 2, 4, 6]] * 2))


def test_scores_are_those_that_the_tours_were_drawn_from(instance):
    sampler = tour_sampler()
    samples = play(sampler, instance)
    scored = sampler.score(sampler.policy, samples.decisions)
    tables, state = sampler.policy.tables(samples.decisions.nodes), samples.decisions.view
    step = View(state.action_mask[:, :, 2:3], state.first, state.current[:, :, 2:3])
    alone = sampler.policy(None, tables, step).log_prob(samples.decisions.action[:, :, 2:3])
    torch.testing.assert_close(scored.log_prob[:, :, 2:3], alone)
    # Of the last node that is open there is no choice.
    assert bool((scored.log_prob[:, :, -1].abs() < 1e-6).all()) and bool((scored.entropy[:, :, -1].abs() < 1e-6).all())


def test_an_update_makes_what_earned_more_likelier(monkeypatch):
    ours = trainer(**{"groups.prompts": 3, "groups.samples": 4})
    drawn = ours.sampler.draw(3, 4, generator=generator(1), environment=generator(2))
    monkeypatch.setattr(ours.sampler, "draw", lambda *_args, **_kwargs: drawn)

    def log_prob():
        with torch.no_grad():
            return ours.sampler.score(ours.sampler.policy, drawn.decisions).log_prob.sum(-1)

    before = log_prob()
    ours.practise(progress=0.0)
    advantage = drawn.reward - drawn.reward.mean(-1, keepdim=True)
    assert ((log_prob() - before) * advantage).sum() > 0


def test_every_parameter_of_the_pointer_learns():
    ours = trainer()
    before = {name: value.clone() for name, value in ours.sampler.weights().items()}
    ours.practise(progress=0.0)
    moved = {name: not torch.equal(value, before[name]) for name, value in ours.sampler.weights().items()}
    assert [name for name, has_moved in moved.items() if not has_moved] == []


def test_a_batch_is_learnt_from_as_often_as_asked():
    ours = trainer(**{"groups.epochs": 3})
    _, steps = ours.practise(progress=0.0)
    assert ours.learner.updates == 3 and int(steps) == 32 * 16 * NODES
    assert ours.learner.optimizers["policy"].updates == 3


def test_first_epoch_is_on_policy():
    metrics, _ = trainer(**{"groups.epochs": 1}).practise(progress=0.0)
    assert float(metrics["ratio_clip_rate"]) == 0.0


def test_reference_stays_where_the_policy_began():
    ours = trainer(**{"groups.kl": 0.1})
    first, _ = ours.practise(progress=0.0)
    before = {name: value.clone() for name, value in ours.sampler.weights(ours.reference).items()}
    later, _ = ours.practise(progress=0.0)
    assert float(first["reference_kl"]) == pytest.approx(0.0, abs=1e-6) and float(later["reference_kl"]) > 0
    assert all(torch.equal(value, before[name]) for name, value in ours.sampler.weights(ours.reference).items())


def test_drifting_costs_are_paid_move_by_move(instance, monkeypatch):
    # From 0 on, a quarter turn of the direction with every move.
    monkeypatch.setattr(Costs, "draw", lambda _costs, count, **_: torch.zeros(count, 1))
    monkeypatch.setattr(Costs, "drifted", lambda _costs, factors, _noise: (factors + 0.5) % 1)
    samples = play(tour_sampler(cost="veering", imag_first="stored"), instance)
    for tour in range(4):
        nodes = torch.nn.functional.pad(samples.decisions.action[:, tour], (1, 0))
        stops = instance.coords.gather(1, nodes[..., None].expand(-1, -1, 2))
        difference = (stops[:, 1:] - stops[:, :-1]).abs()
        along, across = difference.clone(), difference.flip(-1)
        along[:, 1::2] = across[:, 1::2]
        expected = torch.stack((5 * along[..., 0], along[..., 1]), -1).norm(dim=-1).sum(1)
        torch.testing.assert_close(-samples.reward[:, tour], expected)


def test_hidden_costs_are_paid(instance):
    samples = play(tour_sampler(cost="stretch"), instance)
    for tour in range(4):
        shortest = tour_length(instance.coords, samples.decisions.action[:, tour])
        assert bool((-samples.reward[:, tour] > shortest).all() and (-samples.reward[:, tour] < 5 * shortest).all())


def test_moves_cost_what_the_matrix_says():
    sampler = tour_sampler(task="atsp", nodes=6, **{"actor.pointer.cost_units": 4})
    instance = ATSPRules.random(3, 6, generator=generator(1), device=CPU)
    samples = sampler.play(instance, torch.Size((3, 4)), None, generator=generator(2))
    tours = samples.decisions.action
    paid = instance.costs[torch.arange(3)[:, None, None], tours.roll(1, -1), tours].sum(-1)
    torch.testing.assert_close(-samples.reward, paid)


def test_vehicles_that_wait_at_home_decide_nothing():
    sampler = tour_sampler(task="cvrp", imag_first="stored", nodes=8)
    instance = CVRPRules.random(3, 8, generator=generator(1), device=CPU)
    samples = sampler.play(instance, torch.Size((3, 4)), None, generator=generator(2))
    action = samples.decisions.action
    for tour in range(4):
        torch.testing.assert_close(-samples.reward[:, tour], tour_length(instance.coords, action[:, tour]))
    waits = (action == 0) & (torch.nn.functional.pad(action, (1, 0))[..., :-1] == 0)
    assert waits.any() and torch.equal(samples.counted, (~waits).float())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--groups.samples", "1"), "groups.samples is 1; a sample alone"),
        (("--groups.prompts", "few"), "groups.prompts is 'few'"),
        (("--groups.scale", "std"), "choose one of deviation, percentile, none"),
        (("--task", "gym_CartPole-v1"), "task is 'gym_CartPole-v1', which is not for this program"),
        (("--train_ratio", "8"), "only dreamer.py reads train_ratio"),
        (("--configs", "tsp_attn"), "python dreamer.py --configs tsp_attn"),
    ],
)
def test_grpo_refuses(options, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        grpo.main(["--configs", "debug", "--device", "cpu", "--logdir", str(tmp_path / "run"), *options])
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def train(logdir, *options):
    grpo.main(["--configs", "debug", "--device", "cpu", "--logdir", str(logdir), *options])
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


LEARNS = ("--steps", "60000", "--groups.prompts", "4", "--actor.lr", "3e-3", "--schedule.warmup", "10")


@pytest.mark.run
@pytest.mark.parametrize("section", ["grpo_tsp", "ppo_tsp", "reinforce_tsp"])
def test_each_estimator_learns_and_counts_every_decision(section, tmp_path):
    sizes = ("--valid_instances", "64", "--eval_instances", "64", "--eval_every", "20000")
    rows = train(tmp_path / "run", "--configs", section, "debug", *LEARNS, *sizes)
    gaps = [row["valid_gap"] for row in rows if "valid_gap" in row]
    assert gaps[-1] < gaps[0] / 2 and rows[-1]["eval_gap"] < gaps[0] / 2
    # 4 instances, 16 tours, 6 decisions: the 157th update passes 60,000.
    assert rows[-1]["step"] == 157 * 4 * 16 * NODES


@pytest.mark.run
def test_a_run_in_half_precision_goes_on_and_is_evaluated(tmp_path, capsys):
    options = ("--groups.prompts", "4", "--precision", "bfloat16", "--groups.kl", "0.01", "--groups.epochs", "2")
    train(tmp_path, *options, "--steps", "3000")
    rows = train(tmp_path, *options, "--steps", "6000")
    assert rows[-1]["step"] >= 6000 and all(row.get("policy_skips_max", 0) == 0 for row in rows)
    capsys.readouterr()
    grpo.main(["--evaluate", str(tmp_path), "--eval_instances", "8"])
    assert "8 instances, mean length" in capsys.readouterr().out
