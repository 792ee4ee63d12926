from pathlib import Path

import numpy as np
import pytest
import torch

import config
from dreamer import Dreamer
from envs.routing import TSPRules
from guard import Guard
from routing.cvrp import CVRPRules
from routing.files import RoutingInstance
from routing.instances import field_test_coords
from routing.metrics import EXACT, tour_length
from routing.solutions import check_solution
from solving import decoding
from solving.decoding import Decoding, best_tours, imagined_tours, symmetric
from solving.frames import as_instance
from solving.nearest import nearest_neighbour_lengths
from system.memory import NotEnoughMemory
from training import devices, setup, tours

CPU = torch.device("cpu")
NODES = 6


def make_agent(**changes):
    settings = config.load(Path(config.__file__).with_name("configs.yaml"), ["debug"], {}).replace(**changes)
    generators = devices.make_generators(0, CPU)
    return Dreamer.of(setup.make_task(settings), settings, device=CPU, generators=generators, guard=Guard(CPU))


def instances(count, num_nodes=NODES):
    return [RoutingInstance(str(i), "tsp", nodes, EXACT) for i, nodes in enumerate(field_test_coords(num_nodes, count))]


def make_cvrp_agent(**changes):
    return make_agent(task="cvrp", imag_first="stored", **changes)


def cvrp_instances(count, num_nodes=NODES, capacity=15):
    drawn = CVRPRules.field_instances(count, num_nodes, seed=5)
    rows = zip(drawn.coords.numpy(), drawn.demand.numpy(), strict=True)
    return [RoutingInstance(str(i), "cvrp", nodes, EXACT, demand, capacity) for i, (nodes, demand) in enumerate(rows)]


def decode(agent, cases, **how):
    return best_tours(agent.behavior, cases, Decoding(**how))


def lengths(cases, tours):
    return np.array([tour_length(case.coords, tour, EXACT) for case, tour in zip(cases, tours, strict=True)])


AGENTS = [{"actor.pointer.latent": 0}, {"actor.pointer.latent": 4}, {"actor.type": "masked"}]


@pytest.mark.parametrize("changes", AGENTS, ids=["pointer", "latent", "masked"])
def test_best_tours_are_those_that_the_agent_walks(changes):
    agent, cases = make_agent(**changes), instances(12)
    coords = torch.from_numpy(np.stack([case.coords for case in cases])).float()
    found = tours.Evaluation(as_instance(cases, coords), np.ones(12))
    walked = tours.evaluate(agent, agent.task, found, device=CPU).tours.numpy()
    np.testing.assert_array_equal(np.stack(decode(agent, cases)), walked)


@pytest.mark.parametrize("method", Decoding.METHODS)
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 9])
def test_best_tours_visit_every_node_of_instances_of_any_size(method, num_nodes):
    for tour in decode(make_agent(), instances(3, num_nodes), method=method, samples=5):
        assert sorted(tour) == list(range(num_nodes))


def test_best_tours_do_not_depend_on_how_instances_are_cut_into_chunks(monkeypatch):
    agent, cases = make_agent(), instances(2, 4)
    together = decode(agent, cases, method="augment")
    monkeypatch.setattr(decoding, "WORKING_NUMBERS", 1)
    np.testing.assert_allclose(lengths(cases, decode(agent, cases, method="augment")), lengths(cases, together))


@pytest.mark.parametrize("problem", ["tsp", "cvrp"])
def test_best_tours_are_never_longer_for_looking_longer(problem):
    agent, cases = (make_agent(), instances(20, 7)) if problem == "tsp" else (make_cvrp_agent(), cvrp_instances(20))
    greedy = lengths(cases, decode(agent, cases))
    augment = lengths(cases, decode(agent, cases, method="augment"))
    assert (augment <= greedy + 1e-9).all() and (augment < greedy - 1e-6).any()
    few, many = (lengths(cases, decode(agent, cases, method="sample", samples=k)).mean() for k in (1, 64))
    assert many < few


def test_best_tours_are_drawn_by_their_seed():
    agent, cases = make_agent(), instances(6, 12)
    draws = [np.stack(decode(agent, cases, method="sample", samples=1, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


def test_best_tours_do_not_depend_on_position_and_size_of_the_instance():
    agent, (case,) = make_agent(), instances(1, 12)
    elsewhere = case._replace(coords=1e9 * case.coords - 3e8)
    np.testing.assert_array_equal(
        decode(agent, [elsewhere])[0], decode(agent, [case._replace(coords=3 * case.coords)])[0]
    )


def test_best_tours_keep_the_best_by_the_metric_of_the_instance():
    # Rounded up, legs along the first axis cost nothing more than 1, however the network sees them.
    coords = np.array([[0.0, 0], [0.2, 0], [0.4, 0], [0.6, 0], [0.8, 0], [0.8, 1]])
    case = RoutingInstance("own", "tsp", coords, "CEIL_2D")
    (tour,) = decode(make_agent(), [case], method="augment")
    assert tour_length(coords, tour, "CEIL_2D") == 7


def test_best_tours_refuse_other_sizes_for_an_actor_without_a_pointer():
    with pytest.raises(ValueError, match="has 7 nodes, and the run's actor takes 6"):
        decode(make_agent(**{"actor.type": "masked"}), instances(1, NODES + 1))


def test_best_tours_report_all_decisions():
    for method in Decoding.METHODS:
        how = Decoding(method=method, samples=3)
        seen: list[int] = []
        agent, cases = make_agent(), instances(2, 5)
        best_tours(agent.behavior, cases, how, progress=seen.append)
        assert sum(seen) == 2 * how.decisions(TSPRules, 5)


def test_symmetric_images_are_eight_and_keep_lengths():
    coords = torch.rand(1, 5, 2, dtype=torch.float64)
    images = [symmetric(coords, image) for image in range(8)]
    assert torch.equal(images[0], coords)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8
    for image in images:
        torch.testing.assert_close(torch.cdist(image, image), torch.cdist(coords, coords))
        assert ((image >= 0) & (image <= 1)).all()


def test_decoding_numbers_the_first_nodes_piece_by_piece():
    many = Decoding(method="sample", samples=10**7)
    assert many.first_nodes(TSPRules, 20, slice(9_999_998, 10_000_010)) == [19, 19]
    assert many.first_nodes(CVRPRules, 20, slice(5, 8)) == [0, 0, 0]
    some = Decoding(method="sample", samples=7)
    pieces = [node for begin in (0, 3, 6) for node in some.first_nodes(TSPRules, 5, slice(begin, begin + 3))]
    assert pieces == some.first_nodes(TSPRules, 5)


def test_best_tours_refuse_an_instance_that_memory_cannot_hold(monkeypatch):
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: 1000)
    monkeypatch.setattr(decoding, "WORKING_NUMBERS", 1000)
    with pytest.raises(NotEnoughMemory, match="has 9 nodes"):
        decode(make_agent(), instances(1, 9))


def test_nearest_neighbour_lengths_go_to_the_nearest_open_node():
    # Along a line from 0: to 1, to 3, over to -2, to 8 and home: 1 + 2 + 5 + 10 + 8.
    line = np.array([[0.0, 0], [-2, 0], [3, 0], [1, 0], [8, 0]])
    cases = [RoutingInstance(name, "tsp", coords, EXACT) for name, coords in (("a", line), ("b", 2 * line))]
    assert nearest_neighbour_lengths(TSPRules, cases).tolist() == [26, 52]


def test_nearest_neighbour_lengths_of_cvrp_come_home_only_to_load():
    # With room for two: to 1, to 3 and home, to -2, to 8 and home: 1 + 2 + 3 and 2 + 10 + 8.
    line = np.array([[0.0, 0], [-2, 0], [3, 0], [1, 0], [8, 0]])
    case = RoutingInstance("a", "cvrp", line, EXACT, np.array([0, 1, 1, 1, 1]), 2)
    assert nearest_neighbour_lengths(CVRPRules, [case]).tolist() == [26]


def test_penalties_put_plans_with_too_many_routes_behind_all_others():
    (case,) = cvrp_instances(1, 4)
    plans = np.array([[[0, 1, 2, 3, 0, 0], [0, 1, 0, 2, 3, 0], [0, 1, 0, 2, 0, 3]]])
    one, two, none = (decoding._penalties([case._replace(vehicles=most)], plans)[0] for most in (1, 2, None))
    longest = tour_length(case.coords, plans[0, 2], EXACT)
    assert one[0] == 0 and one[1] > longest and one[2] > one[1] + longest
    assert two[:2].tolist() == [0, 0] and two[2] > longest and not none.any()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_imagined_tours_expect_lengths_in_the_unit_of_the_instance(scale):
    # With the true cost in place of a learned one, imagination expects what its tour is long.
    agent = make_agent(imag_reward="simulated")
    cases = [case._replace(coords=scale * case.coords) for case in instances(3, 8)]
    imagined = [each for each in imagined_tours(agent.behavior, cases) if each is not None]
    assert [sorted(each.tour) for each in imagined] == [list(range(8))] * 3
    np.testing.assert_allclose(
        [each.length for each in imagined], lengths(cases, [e.tour for e in imagined]), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("how", "message"), [({"method": "wide"}, "choose one of greedy"), ({"samples": 0}, "at least 1")]
)
def test_decoding_refuses_what_it_cannot_do(how, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**how)


@pytest.mark.parametrize("changes", AGENTS, ids=["pointer", "latent", "masked"])
def test_best_tours_of_cvrp_are_the_plans_that_the_agent_walks(changes):
    agent, cases = make_cvrp_agent(**changes), cvrp_instances(12)
    coords = torch.from_numpy(np.stack([case.coords for case in cases])).float()
    found = tours.Evaluation(as_instance(cases, coords), np.ones(12))
    walked = tours.evaluate(agent, agent.task, found, device=CPU)
    plans = decode(agent, cases)
    for plan, case, steps in zip(plans, cases, walked.tours.numpy(), strict=True):
        check_solution(case, plan)
        np.testing.assert_array_equal(plan, steps[: len(plan)])
        assert not steps[len(plan) :].any()
    np.testing.assert_allclose(lengths(cases, plans), walked.lengths.numpy(), rtol=1e-5)
    assert len({len(plan) for plan in plans}) > 1


@pytest.mark.parametrize("method", Decoding.METHODS)
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 9])
def test_best_tours_of_cvrp_keep_the_rules_in_instances_of_any_size(method, num_nodes):
    cases = cvrp_instances(3, num_nodes)
    for case, plan in zip(cases, decode(make_cvrp_agent(), cases, method=method, samples=5), strict=True):
        check_solution(case, plan)
        assert sorted(plan[plan != 0].tolist()) == list(range(1, num_nodes))


def test_best_tours_of_cvrp_begin_with_every_customer_in_turn():
    agent, (case,) = make_cvrp_agent(), cvrp_instances(1)
    scaled = torch.from_numpy(case.coords)[None].float()
    context, tables = decoding.static(agent.behavior, as_instance([case], scaled))
    first = torch.tensor([Decoding(method="augment").first_nodes(CVRPRules, NODES)])
    plans = decoding.roll_out(agent.behavior, context=context, tables=tables, first=first, generator=None)
    assert plans[0, 1:, 1].tolist() == list(range(1, NODES))
    np.testing.assert_array_equal(decoding.without_waiting(plans[0, 0].numpy()), decode(agent, [case])[0])


def test_best_tours_of_cvrp_report_all_decisions():
    for method in Decoding.METHODS:
        how = Decoding(method=method, samples=3)
        seen: list[int] = []
        agent, cases = make_cvrp_agent(), cvrp_instances(2)
        best_tours(agent.behavior, cases, how, progress=seen.append)
        assert sum(seen) == 2 * how.decisions(CVRPRules, NODES)


def test_imagined_plans_expect_lengths_in_the_unit_of_the_instance():
    agent = make_cvrp_agent(imag_reward="simulated")
    cases = [case._replace(coords=1000 * case.coords) for case in cvrp_instances(5)]
    imagined = [each for each in imagined_tours(agent.behavior, cases) if each is not None]
    for case, each in zip(cases, imagined, strict=True):
        check_solution(case, each.tour)
    np.testing.assert_allclose(
        [each.length for each in imagined], lengths(cases, [e.tour for e in imagined]), rtol=1e-5
    )
