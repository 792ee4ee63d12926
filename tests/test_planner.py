"""The player that plans in the learnt model, and the price of learning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config import UserError
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from imagining.routing_imagination import RoutingImagination
from parts.acting import Sight
from planning.planner import Planner, levelled
from routing.cvrp import CVRPRules, cvrp_instance
from routing.instances import field_test_coords, reference_lengths
from routing.pickup import PickupRules
from routing.tsp import TSPRules
from settings.planning import PlanSettings
from tests.answer_scenes import make_agent
from tests.scenes import CPU, NODES, ROUTING, Scene, costly_legs, generator, routing
from training.regret import Regret
from training.tours import Evaluation, RoutingEvaluator, doubt, evaluate

COORDS = torch.from_numpy(field_test_coords(NODES, 20)).float()


def planner(scene: Scene | None = None, **settings: Any) -> Planner:
    imagination = (scene or costly_legs(Scene())).imagination
    assert isinstance(imagination, RoutingImagination)
    return Planner(imagination, PlanSettings(**settings))


def an_environment(rules: type = TSPRules, *, envs: int = 4) -> RoutingVectorEnv:
    return RoutingVectorEnv(
        rules, num_envs=envs, num_nodes=NODES, device=CPU, generator=generator(), check_actions=True
    )


def test_planner_walks_the_shortest_tours_where_moves_cost_their_length():
    references = reference_lengths(COORDS.double().numpy())
    result = evaluate(planner(), ROUTING, Evaluation(TSPRules.instance_type(COORDS), references), device=CPU)
    assert result.lengths.double().numpy() == pytest.approx(references, rel=1e-5)


def test_planner_plans_once_where_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch):
    plans, env = planner(), an_environment()
    obs, info = env.reset()
    state, asked = plans.initial_state(4), []
    solve = plans.solver.solve

    def counted(problems: Any, **options: Any) -> Any:
        asked.append(len(problems))
        return solve(problems, **options)

    monkeypatch.setattr(plans.solver, "solve", counted)
    for _ in range(2 * (NODES + 1)):
        action, state = plans.act(Sight.of(obs, info), state, generator=None)
        obs, _, _, _, info = env.step(action)
    assert asked == [4, 4]


def test_planner_plans_anew_where_somebody_else_has_moved():
    plans, env = planner(), an_environment(envs=1)
    obs, info = env.reset()
    action, state = plans.act(Sight.of(obs, info), plans.initial_state(1), generator=None)
    elsewhere = next(node for node in range(1, NODES) if node != int(action))
    obs, _, _, _, info = env.step(torch.tensor([elsewhere]))
    for _ in range(NODES - 1):
        action, state = plans.act(Sight.of(obs, info), state, generator=None)
        # Illegal actions raise here.
        obs, _, terminated, _, info = env.step(action)
    assert bool(terminated.all())


def test_planner_replans_by_what_it_believes(monkeypatch: pytest.MonkeyPatch):
    scene = Scene(routing("stretch"), model__belief=True, imag_start="rows", imag_first="stored")
    plans, env = planner(scene), an_environment(routing("stretch").rules, envs=2)
    obs, info = env.reset()
    state = plans.initial_state(2)
    beliefs: list[Tensor] = []
    costs = plans.costs

    def seen(instance: Any, belief: Tensor | None, **options: Any) -> Any:
        assert belief is not None
        beliefs.append(belief)
        return costs(instance, belief, **options)

    monkeypatch.setattr(plans, "costs", seen)
    for _ in range(3):
        action, state = plans.act(Sight.of(obs, info), state, generator=None)
        obs, _, _, _, info = env.step(action)
    assert len(beliefs) == 3
    assert not torch.equal(beliefs[0], beliefs[2])


def an_ensemble(**changes: Any) -> Scene:
    """Three members that expect moves to cost 1, 2 and 3 whatever their length."""
    scene = Scene(model__move_heads=3, **changes)
    expecting_1_2_and_3(scene.model)
    return scene


def expecting_1_2_and_3(model: Any) -> None:
    """Let three members expect that of every move."""
    output = model.heads["reward"].output
    with torch.no_grad():
        output.weight.zero_()
        output.bias.copy_(torch.tensor([[0.0, -1.0], [0.0, -2.0], [0.0, -3.0]]))


@pytest.mark.parametrize(
    ("settings", "collecting", "expected"),
    [
        ({}, True, 2.0),
        ({"optimism": 0.5}, True, 2 - 0.5 * (2 / 3) ** 0.5),
        ({"optimism": 0.5}, False, 2.0),
        ({"pessimism": 0.5}, False, 2 + 0.5 * (2 / 3) ** 0.5),
        ({"pessimism": 0.5}, True, 2.0),
    ],
)
def test_planner_takes_moves_for_cheaper_collecting_and_for_dearer_answering(
    settings: dict[str, Any], collecting: bool, expected: float
):
    drawn = generator() if collecting else None
    costs = planner(an_ensemble(), **settings).costs(TSPRules.instance_type(COORDS[:2]), None, generator=drawn)
    assert costs == pytest.approx(expected)


def test_planner_by_thompson_sampling_follows_one_member_in_each_plan():
    plans = planner(an_ensemble(), thompson=True)
    costs = plans.costs(TSPRules.instance_type(COORDS), None, generator=generator())
    assert all(len(set(each.round(5).flatten().tolist())) == 1 for each in costs)
    assert set(costs.round().flatten().tolist()) == {1.0, 2.0, 3.0}


def test_planner_knows_what_its_members_expect_in_the_worlds_unit():
    instance, tours = TSPRules.instance_type(COORDS[:2]), torch.arange(NODES).expand(2, -1)
    imagination = an_ensemble().imagination
    assert isinstance(imagination, RoutingImagination)
    expected = Planner(imagination, PlanSettings(), reward_scale=0.5).expected_legs(instance, tours)
    assert expected is not None
    torch.testing.assert_close(expected, torch.tensor([2.0, 4.0, 6.0])[:, None, None].expand(3, 2, NODES))


def test_planner_has_no_members_to_ask_of_a_lone_head_or_a_belief():
    instance, tours = TSPRules.instance_type(COORDS[:2]), torch.arange(NODES).expand(2, -1)
    believing = Scene(
        routing("stretch"), model__belief=True, model__move_heads=2, imag_start="rows", imag_first="stored"
    )
    assert planner().expected_legs(instance, tours) is None
    assert planner(believing).expected_legs(instance, tours) is None


@pytest.mark.parametrize("report", ["validate", "test"])
def test_evaluation_of_plans_tells_spread_and_error_of_the_ensemble(report: str):
    references = reference_lengths(COORDS.double().numpy())
    evaluation = Evaluation(TSPRules.instance_type(COORDS), references)
    evaluator = RoutingEvaluator(ROUTING, validation=evaluation, test=evaluation, device=CPU, players=("plan",))
    agent = make_agent(**{"model.move_heads": 3})
    expecting_1_2_and_3(agent.model)
    values = getattr(evaluator, report)(agent).values
    tours = evaluate(agent.players["plan"], ROUTING, evaluation, device=CPU).tours
    walked = COORDS.gather(1, tours[..., None].expand(-1, -1, 2))
    legs = (walked - walked.roll(-1, 1)).norm(dim=-1)
    assert values["plan_spread"] == pytest.approx(100 * (2 / 3) ** 0.5 / float(legs.mean()), rel=1e-4)
    assert values["plan_error"] == pytest.approx(100 * float((2 - legs).abs().mean() / legs.mean()), rel=1e-4)


def test_doubt_leaves_out_where_plans_wait_at_their_depot():
    instance = cvrp_instance(torch.rand(6, 2, generator=generator()).double().numpy(), [0, 2, 3, 2, 3, 1], 6)
    task, tours = RoutingTask.of(CVRPRules, 6), torch.tensor([[0, 1, 2, 0, 3, 4, 5, 0, 0, 0]])
    scene = Scene(task, model__move_heads=3, imag_first="stored")
    expecting_1_2_and_3(scene.model)
    waiting, moving = (doubt(planner(scene), task, instance, each) for each in (tours, tours[:, :7]))
    assert waiting == pytest.approx(moving) and waiting["spread"] > 0


def test_doubt_is_told_of_no_policy_and_of_nothing_hidden():
    instance, tours = TSPRules.instance_type(COORDS), torch.arange(NODES).expand(20, -1)
    assert doubt(planner(), ROUTING, instance, tours) == {}
    blind = Scene(routing("stretch"), model__move_heads=2)
    assert doubt(planner(blind), routing("stretch"), instance, tours) == {}
    assert doubt(planner(an_ensemble()), ROUTING, instance, tours).keys() == {"spread", "error"}


def test_optimism_and_thompson_sampling_exclude_each_other():
    with pytest.raises(UserError, match=r"plan.optimism 1 .*set one of them alone"):
        PlanSettings(optimism=1.0, thompson=True)


def test_a_model_of_a_problem_without_a_solver_cannot_plan():
    assert Scene().imagination.can_plan
    assert not Scene(RoutingTask.of(PickupRules, NODES), imag_first="stored").imagination.can_plan
    assert not Scene(model__reward_latent=True).imagination.can_plan


def test_regret_is_what_was_paid_above_the_best_tours():
    env, regret = an_environment(), Regret(TSPRules)
    obs, _ = env.reset()
    best = reference_lengths(obs["coords"].double().numpy())
    returns = torch.zeros(4)
    for node in [*range(1, NODES), 0]:
        assert regret.percent() == {}
        _, reward, ended, _, _ = env.step(torch.full((4,), node))
        returns += reward
        regret.note(env, ended, returns)
    expected = 100 * (-float(returns.sum()) / best.sum() - 1)
    assert expected > 1
    assert regret.percent()["regret"] == pytest.approx(expected, rel=1e-4)
    later = Regret(TSPRules)
    later.load_state_dict(regret.state_dict())
    assert later.percent() == regret.percent()


def test_regret_without_a_solver_is_refused():
    with pytest.raises(UserError, match="log_regret takes a solver of task pickup"):
        Regret(PickupRules)


def test_planner_leaves_the_state_that_it_was_given_alone():
    plans, env = planner(), an_environment()
    obs, info = env.reset()
    state = plans.initial_state(4)
    before = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    plans.act(Sight.of(obs, info), state, generator=None)
    assert all(torch.equal(value, before[name]) for name, value in state.items() if isinstance(value, Tensor))


def test_directions_that_hardly_differ_are_averaged_in_quick_plans():
    costs = np.array([[[0.0, 1.0, 2.0], [1.004, 0.0, 3.0], [1.994, 3.0, 0.0]]])
    level = [[[0.0, 1.002, 1.997], [1.002, 0.0, 3.0], [1.997, 3.0, 0.0]]]
    assert levelled(costs) == pytest.approx(np.array(level))
    # Beside one that differs by 1 % of its costs, and stays as it is.
    directed = np.array([[0.0, 1.0, 2.0], [1.03, 0.0, 3.0], [1.97, 3.0, 0.0]])
    both = levelled(np.stack((costs[0], directed)))
    assert both[0] == pytest.approx(np.array(level[0])) and np.array_equal(both[1], directed)


def test_thorough_plans_take_costs_as_they_are(monkeypatch: pytest.MonkeyPatch):
    plans, solved = planner(), []

    def noted(problems: Any, **_: Any) -> Any:
        solved.append(problems[0].costs)
        return [np.arange(NODES)]

    monkeypatch.setattr(plans.solver, "solve", noted)
    instance = TSPRules.instance_type(COORDS[:1])
    costs = np.full((1, NODES, NODES), 1.0)
    costs[0, 0, 1] = 1.01
    for thorough in (True, False):
        plans.solved(instance, TSPRules.reset(instance), costs, thorough=thorough)
    assert solved[0][0, 1] == 1.01 and solved[1][0, 1] == solved[1][1, 0] == pytest.approx(1.005)
