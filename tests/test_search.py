import math

import numpy as np
import pytest
import torch

import solve
from parts.views import View
from routing.metrics import EXACT
from routing.parsing import RoutingInstance
from routing.rules import expand_instance
from routing.solutions import check_solution
from solving.decoding import Decoding, best_tours, roll_out, static
from solving.frames import pose
from solving.patience import Patience
from solving.search import ActiveSearch, BeamSearch, Posed, _log_probs
from tests.answer_scenes import make_agent
from tests.test_reconstruction import CHECKPOINTS, CPU, Attempts, instance, plan_instance
from training.stopping import StopRequests


@pytest.fixture(scope="module")
def agents():
    return {name: solve.load_agent(CHECKPOINTS / f"{name}.pt", CPU) for name in ("tsp20", "cvrp20")}


CASES = [("tsp20", instance(24)), ("cvrp20", plan_instance(21))]


def greedy_length(agent, case: RoutingInstance) -> float:
    (tour,) = best_tours(agent.behavior, [case], Decoding())
    return case.tour_length(tour)


@pytest.mark.parametrize(("name", "case"), CASES, ids=["tsp", "cvrp"])
@pytest.mark.parametrize("width", [1, 3])
def test_beam_is_never_worse_than_greedy(agents, name, case, width):
    search = BeamSearch(agents[name].behavior, case, Decoding(method="beam", width=width))
    tour = search.run(Patience())
    check_solution(case, tour)
    assert case.tour_length(tour) <= greedy_length(agents[name], case) + 1e-9


def test_beam_that_keeps_everything_finds_the_best_of_all_tours():
    # With 5 nodes, 4 children and room for all of them, every tour from node 0 is looked at.
    agent, case = make_agent(**{"actor.pointer.latent": 0}), instance(5)
    (best,) = solve.solve(None, [case], Decoding(method="plan"))
    tour = BeamSearch(agent.behavior, case, Decoding(method="beam", width=24)).run(Patience())
    assert case.tour_length(tour) == pytest.approx(best.length)  # type: ignore[union-attr]


def test_active_search_has_the_probabilities_of_the_moves_that_it_drew(agents):
    agent, case = agents["cvrp20"], plan_instance(21)
    behavior = agent.behavior
    context, tables = static(behavior, pose([case], CPU).instance)
    generator = torch.Generator().manual_seed(0)
    found = roll_out(behavior, context=context, tables=tables, first=torch.zeros(1, 3).long(), generator=generator)
    log_probs = _log_probs(agent.task.rules, behavior.actor, tables, context, found)
    for row in range(3):
        total = 0.0
        state = agent.task.rules.reset(expand_instance(context.instance, torch.Size((1, 1))))
        for action in found[0, row, 1:]:
            view = View.of(agent.task.rules, state, agent.task.rules.action_mask(state))
            total += behavior.actor(None, tables, view).log_prob(action[None, None]).item()
            state, _ = agent.task.rules.step(state, action[None, None])
        assert log_probs[0, row].item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(("name", "case"), CASES, ids=["tsp", "cvrp"])
def test_active_search_makes_good_tours_likelier_and_leaves_the_weights_alone(agents, name, case):
    agent = agents[name]
    before = {key: part.clone() for key, part in agent.behavior.actor.state_dict().items()}
    search = ActiveSearch(agent.behavior, case, Decoding(method="active"))
    means: list[float] = []
    keep = search.keep

    def watched(tours, costs):
        means.append(float(costs.mean()))
        keep(tours, costs)

    search.keep = watched  # type: ignore[method-assign]
    tour = search.run(Attempts(31))
    check_solution(case, tour)
    assert np.mean(means[-5:]) < np.mean(means[:5])
    assert case.tour_length(tour) <= greedy_length(agent, case) * 1.01
    for key, part in agent.behavior.actor.state_dict().items():
        torch.testing.assert_close(part, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("method", Decoding.SEARCHES)
def test_searches_are_ways_to_solve(agents, method):
    (found,) = solve.solve(agents["tsp20"], [instance(12)], Decoding(method=method, seconds=0.2))
    assert found.chooser == "network" and math.isfinite(found.length)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("method", Decoding.SEARCHES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_searches_take_small_instances(agents, method, count):
    (found,) = solve.solve(agents["tsp20"], [instance(count)], Decoding(method=method, seconds=0.1))
    assert sorted(found.tour) == list(range(count))  # type: ignore[union-attr]


@pytest.mark.parametrize("method", Decoding.SEARCHES)
def test_searches_are_refused_where_the_actor_reads_latents(method):
    agent = make_agent(**{"actor.pointer.latent": 4})
    (refused,) = solve.solve(agent, [instance(9)], Decoding(method=method))
    assert "reads latents" in str(refused)


def test_beam_ends_with_the_best_so_far_when_it_is_stopped(agents):
    requests = StopRequests()
    search = BeamSearch(agents["tsp20"].behavior, instance(20), Decoding(method="beam"))
    seen = 0

    def stop() -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            requests.signal = "SIGINT"

    check_solution(instance(20), search.run(Patience(requests=requests), watch=stop))
    assert seen == 3


def test_posed_instances_are_judged_in_their_own_metric(agents):
    case = instance(12)._replace(metric=EXACT)
    looked: list[Posed] = []

    class Once(BeamSearch):
        def look(self, posed, patience, watch):
            looked.append(posed)
            tours = np.arange(12)[None, None]
            self.keep(tours, posed.judge(tours))

    search = Once(agents["tsp20"].behavior, case, Decoding(method="beam", width=1))
    search.run(Patience())
    assert len(looked) == 8 and search.lowest == pytest.approx(case.tour_length(np.arange(12)))
