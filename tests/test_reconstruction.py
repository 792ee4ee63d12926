from pathlib import Path

import numpy as np
import pytest
import torch

import solve
from routing.cvrp import CVRPRules
from routing.files import RoutingInstance
from routing.instances import field_test_coords
from routing.metrics import EXACT
from routing.solutions import check_solution
from solving import polishing, reconstruction
from solving.answers import Solution
from solving.cuts import Cut, choose_apart, neighbourhood, random_insertion, sections, splice
from solving.decoding import Decoding
from solving.nearest import nearest_neighbour_tours
from solving.patience import Patience
from solving.reconstruction import solve_cuts
from solving.ways import polish
from tests.answer_scenes import make_agent
from training.stopping import StopRequests

CHECKPOINTS = Path(solve.CONFIGS).with_name("checkpoints")
CPU = torch.device("cpu")
PARTS = Decoding(method="reconstruct")
# Two passes of a tour of 12 nodes through a region: 1 2 3 and 7 8, forwards; 10 is alone.
TOUR = np.array([4, 0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11])
TWO_PIECES = Cut(np.array([1, 2, 3, 7, 8]), np.array([4, -1, 3, 2, 0]))


class Attempts(Patience):
    """Patience for so many attempts, however long they take."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    @property
    def is_over(self) -> bool:
        self.count -= 1
        return self.count < 0


def instance(count: int, seed: int = 0) -> RoutingInstance:
    return RoutingInstance("own", "tsp", np.random.default_rng(seed).random((count, 2)), EXACT)


def plan_instance(count: int) -> RoutingInstance:
    drawn = CVRPRules.field_instances(1, count, seed=5)
    return RoutingInstance("own", "cvrp", drawn.coords[0].numpy(), EXACT, drawn.demand[0].numpy(), 30)


@pytest.fixture(scope="module")
def agents():
    return {name: solve.load_agent(CHECKPOINTS / f"{name}.pt", CPU) for name in ("tsp20", "cvrp20")}


def edges(tour: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(pair) for pair in zip(tour.tolist(), np.roll(tour, -1).tolist(), strict=True)}


def test_neighbourhood_is_the_pieces_and_who_is_joined_by_the_rest():
    cut = neighbourhood(TOUR, np.array([1, 2, 3, 7, 8, 10]))
    assert cut is not None
    np.testing.assert_array_equal(cut.nodes, TWO_PIECES.nodes)
    np.testing.assert_array_equal(cut.mate, TWO_PIECES.mate)


def test_neighbourhood_finds_pieces_that_pass_the_ends_of_the_sequence():
    cut = neighbourhood(TOUR, np.array([11, 4, 0, 6, 7]))
    assert cut is not None
    np.testing.assert_array_equal(cut.nodes, [4, 0, 6, 7, 11])
    np.testing.assert_array_equal(cut.mate, [-1, 2, 1, 4, 3])


@pytest.mark.parametrize("near", [[0, 2, 6, 9], [0, 1, 2], list(range(12))], ids=["alone", "few", "all"])
def test_neighbourhood_that_leaves_nothing_to_decide_is_none(near):
    assert neighbourhood(TOUR, np.array(near)) is None


def test_splice_of_the_same_order_is_the_same_tour():
    assert edges(splice(TOUR, TWO_PIECES, np.arange(5))) == edges(TOUR)


def test_splice_turns_the_rest_where_it_is_passed_the_other_way():
    # 2 1 | 11 .. 9 backwards from 8's side | 8 7 | 6 5 | 3: worked out by hand.
    tour = splice(TOUR, TWO_PIECES, np.array([1, 0, 4, 3, 2]))
    np.testing.assert_array_equal(tour, [2, 1, 0, 4, 11, 10, 9, 8, 7, 6, 5, 3])


def test_free_legs_are_those_within_the_region():
    np.testing.assert_array_equal(TWO_PIECES.free(np.arange(5)), [True, True, False, True, False])


def test_sections_cover_a_tour_but_for_less_than_one():
    cuts = sections(TOUR, 5, offset=3)
    np.testing.assert_array_equal([cut.nodes for cut in cuts], [[2, 3, 5, 6, 7], [8, 9, 10, 11, 4]])
    np.testing.assert_array_equal(cuts[0].mate, [4, -1, -1, -1, 0])


def test_cuts_that_cross_are_not_solved_together():
    within = Cut(np.array([5, 6]), np.array([1, 0]))
    across = Cut(np.array([9, 10, 5, 6]), np.array([3, 2, 1, 0]))
    assert choose_apart([TWO_PIECES, within, across], TOUR) == [TWO_PIECES, within]


def test_random_insertion_puts_each_node_where_it_costs_least():
    coords = np.random.default_rng(3).random((9, 2))
    order = np.random.default_rng(0).permutation(9)
    tour = [int(order[0])]
    for node in order[1:]:
        legs = [
            np.linalg.norm(coords[node] - coords[here])
            + np.linalg.norm(coords[node] - coords[there])
            - np.linalg.norm(coords[here] - coords[there])
            for here, there in zip(tour, tour[1:] + tour[:1], strict=True)
        ]
        tour.insert(int(np.argmin(legs)) + 1, int(node))
    assert edges(random_insertion(coords, np.random.default_rng(0))) == edges(np.array(tour))


def test_solve_cuts_keeps_mates_together(agents):
    coords = np.random.default_rng(1).random((60, 2))
    tour = random_insertion(coords, np.random.default_rng(0))
    cuts = [neighbourhood(tour, np.argsort(np.linalg.norm(coords - coords[node], axis=-1))[:18]) for node in range(8)]
    found = [cut for cut in cuts if cut is not None]
    assert len({len(cut.nodes) for cut in found}) > 1, "there is no padding here"
    for generator in (None, torch.Generator().manual_seed(0)):
        orders = solve_cuts(
            agents["tsp20"].behavior, coords, found, random=np.random.default_rng(0), generator=generator
        )
        for cut, tried in zip(found, orders, strict=True):
            assert (np.sort(tried, axis=-1) == np.arange(len(cut.nodes))).all()
            rests = (cut.mate >= 0).sum() // 2
            assert ((~cut.free(tried)).sum(-1) == rests).all()


@pytest.mark.parametrize("offset", [0, 1])
def test_solve_cuts_finds_what_a_single_cut_finds(agents, offset):
    coords = np.random.default_rng(1).random((60, 2))
    tour = random_insertion(coords, np.random.default_rng(0))
    cuts = sections(tour, 12, offset=offset)
    # Both ends of a section are begun at, in any order.
    together = solve_cuts(agents["tsp20"].behavior, coords, cuts, random=np.random.default_rng(0))
    (alone,) = solve_cuts(agents["tsp20"].behavior, coords, cuts[1:2], random=np.random.default_rng(0))
    assert {tuple(order) for order in together[1]} == {tuple(order) for order in alone}


@pytest.mark.parametrize(("name", "case"), [("tsp20", instance(70)), ("cvrp20", plan_instance(50))])
def test_reconstruction_never_makes_a_solution_longer(agents, name, case):
    again = reconstruction.reconstruction(agents[name].behavior, case, PARTS)
    tour = begin = again.start()
    for _ in range(6):
        improved = again.improved(tour)
        check_solution(case, improved)
        assert case.tour_length(improved) <= case.tour_length(tour) * (1 + 1e-12)
        tour = improved
    assert case.tour_length(tour) < 0.99 * case.tour_length(begin)


def test_reconstruction_of_a_large_tour_is_far_better_than_the_policy_on_all_of_it(agents):
    case = RoutingInstance("own", "tsp", field_test_coords(100, 1)[0], EXACT)
    (found,) = solve.solve(agents["tsp20"], [case], Decoding())
    (parts,) = solve.solve(agents["tsp20"], [case], Decoding(method="reconstruct", seconds=0.5))
    assert isinstance(found, Solution) and isinstance(parts, Solution)
    assert parts.length is not None and found.length is not None and parts.length < 0.95 * found.length
    assert parts.chooser == "network, in parts"


@pytest.mark.parametrize("count", [3, 4, 9])
def test_reconstruction_takes_small_instances(agents, count):
    tour = reconstruction.reconstruction(agents["tsp20"].behavior, instance(count), PARTS).run(Attempts(3))
    assert sorted(tour) == list(range(count))


def test_reconstruction_is_refused_where_the_actor_reads_latents():
    with pytest.raises(solve.UserError, match="actor.pointer.latent: 0 reads none"):
        reconstruction.reconstruction(make_agent(**{"actor.pointer.latent": 4}).behavior, instance(9), PARTS)


def test_instances_that_were_not_begun_when_it_was_stopped_say_so(agents):
    requests = StopRequests()
    requests.signal = "SIGINT"
    (refused,) = solve.solve(agents["tsp20"], [instance(30)], Decoding(method="reconstruct"), requests=requests)
    assert str(refused) == "was not begun when it was stopped"


def test_sampling_ends_with_the_best_when_it_is_stopped(agents):
    requests = StopRequests()
    requests.signal = "SIGINT"
    (found,) = solve.solve(agents["tsp20"], [instance(30)], Decoding(method="sample", seconds=9.0), requests=requests)
    assert isinstance(found, Solution)


def test_large_instances_are_solved_in_parts_where_nobody_chose_a_way(agents):
    cases = [instance(61), instance(60)]
    decoding = Decoding(seconds=0.1)
    found = solve.solve(agents["tsp20"], cases, decoding, by_size=True)
    assert [each.chosen_by for each in found if isinstance(each, Solution)] == ["network, in parts", "network"]


def solution_of(case: RoutingInstance, rules: type) -> Solution:
    (tour,) = nearest_neighbour_tours(rules, [case])
    return Solution(case, tour, case.tour_length(tour), 0.0)


@pytest.mark.parametrize("metric", ["EUC_2D", EXACT, "great_circle", "GEO"])
def test_polish_of_a_tour_is_the_shortest(agents, metric):
    # Small tours are searched exactly.
    case = instance(9)._replace(metric=metric)
    if metric != EXACT:
        case = case._replace(coords=np.round(100 * case.coords) / (1 if metric == "EUC_2D" else 2))
    better = polish(solve.rules_of(agents["tsp20"]), solution_of(case, solve.rules_of(agents["tsp20"])), seconds=0.1)
    (best,) = solve.solve(None, [case], Decoding(method="plan"))
    assert isinstance(best, Solution) and best.length is not None
    assert better.length == pytest.approx(best.length) and better.chooser in ("fast-tsp, no model", "network")


def test_polish_of_a_plan_begins_with_it_and_says_so(agents, monkeypatch):
    case = plan_instance(20)
    begun = []
    whole = polishing.cheapest_plan

    def watched(*arguments, **keywords):
        begun.append(keywords["begin"])
        return whole(*arguments, **keywords)

    monkeypatch.setattr(polishing, "cheapest_plan", watched)
    rules = solve.rules_of(agents["cvrp20"])
    own = solution_of(case, rules)
    better = polish(rules, own, seconds=0.4)
    assert len(begun) == 2 and begun[0] is own.tour
    assert better.length is not None and own.length is not None and better.length < own.length
    assert better.chooser in ("network, then PyVRP", "nearest nodes, then PyVRP")


def test_polish_keeps_what_it_cannot_make_shorter(agents, monkeypatch):
    rules = solve.rules_of(agents["tsp20"])
    own = solution_of(instance(12), rules)
    monkeypatch.setattr(polishing, "_fast_tour", lambda case, seconds: np.arange(12))
    kept = polish(rules, own, seconds=0.1)
    assert kept.tour is own.tour and kept.chooser == "network"


def test_whole_legs_are_the_same_where_they_are_whole_and_small():
    case = instance(5)._replace(coords=np.array([[0, 0], [3, 4], [6, 8], [0, 8], [5, 0]], dtype=float), metric="EUC_2D")
    np.testing.assert_array_equal(polishing._whole_legs(case), case.cost_matrix())
