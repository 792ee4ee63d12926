import os

import numpy as np
import pytest

from routing.files import RoutingInstance
from routing.pyvrp_reference import pyvrp_solution
from routing.solutions import (
    IllegalSolution,
    check_solution,
    join_routes,
    known_length,
    route_counts,
    split_routes,
    write_solution,
)

SQUARE = np.array([[0.0, 0], [0, 3], [4, 3], [4, 0]])
TSP = RoutingInstance("own", "tsp", SQUARE, "EUC_2D")
CVRP = TSP._replace(problem="cvrp", demand=np.array([0, 2, 2, 1]), capacity=3, reference=99.0)


def refusal(instance, tour) -> str | None:
    """What is said against a solution; None where it is taken."""
    try:
        check_solution(instance, np.array(tour))
    except IllegalSolution as error:
        return str(error)
    return None


@pytest.mark.parametrize("tour", [[0, 1, 2, 3], [2, 3, 0, 1]])
def test_check_solution_takes_tours_from_any_node(tour):
    assert refusal(TSP, tour) is None


@pytest.mark.parametrize("tour", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, 3, 0]])
def test_check_solution_refuses_tours_that_do_not_visit_each_node_once(tour):
    with pytest.raises(IllegalSolution, match="exactly once"):
        check_solution(TSP, np.array(tour))


@pytest.mark.parametrize(
    ("routes", "fault"),
    [
        ([0, 1, 0, 2, 3], None),
        ([0, 1, 2, 0, 3], "route 1 carries 4, above 3"),
        ([0, 1, 0, 2], "exactly once"),
        ([0, 1, 0, 2, 3, 0, 1], "exactly once"),
        ([1, 0, 2, 3], "does not begin at the depot"),
        ([0, 1, 0, 0, 2, 3], "route 2 is empty"),
        ([0, 1, 0, 2, 3, 0], "route 3 is empty"),
    ],
)
def test_check_solution_holds_routes_to_the_rules(routes, fault):
    if fault is None:
        check_solution(CVRP, np.array(routes))
    else:
        with pytest.raises(IllegalSolution, match=fault):
            check_solution(CVRP, np.array(routes))


def test_route_counts_do_not_count_waiting_at_the_depot():
    tours = np.array([[0, 1, 0, 2, 3, 0], [0, 1, 2, 3, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 2, 0, 3]])
    assert route_counts(tours).tolist() == [2, 1, 0, 3]


def test_pyvrp_solution_uses_no_more_vehicles_than_there_are():
    # By way of the depot, two routes are as short as one.
    case = CVRP._replace(coords=np.array([[0.0, 0], [0, 3], [0, -3], [1, 0]]), capacity=5, vehicles=1)
    assert len(split_routes(pyvrp_solution(case, iterations=50))) == 1


def test_join_routes_is_the_inverse_of_split_routes():
    flat = np.array([0, 1, 0, 2, 3])
    assert [route.tolist() for route in split_routes(flat)] == [[1], [2, 3]]
    assert join_routes([[1], [2, 3]]).tolist() == flat.tolist()
    assert join_routes([]).tolist() == [0]


def test_write_solution_writes_what_known_length_reads(tmp_path):
    # 3 + 4 + 3 + 4 around the square; to the near corner and back, 6, and around the other three, 3 + 4 + 5.
    write_solution(tmp_path / "own.opt.tour", TSP, np.array([3, 2, 1, 0]))
    assert known_length(tmp_path / "own.tsp", TSP) == 14
    write_solution(tmp_path / "own.sol", CVRP, np.array([0, 1, 0, 2, 3]))
    assert (tmp_path / "own.sol").read_text() == "Route #1: 1\nRoute #2: 2 3\nCost: 18\n"
    assert known_length(tmp_path / "own.vrp", CVRP) == 18


@pytest.mark.parametrize("content", ["", "Route #1: 1 2 3\nCost 5", "Route #1: one", "Route", "Route #1: 9 9"])
def test_known_length_does_without_a_solution_that_cannot_be_used(content, tmp_path, caplog):
    (tmp_path / "own.sol").write_text(content)
    assert known_length(tmp_path / "own.vrp", CVRP) == 99
    assert "is no solution of" in caplog.text


def test_known_length_does_not_wait_for_a_pipe(tmp_path, caplog):
    os.mkfifo(tmp_path / "own.sol")
    assert known_length(tmp_path / "own.vrp", CVRP) == 99
    assert "FIFO" in caplog.text


def test_known_length_is_none_where_nothing_is_known(tmp_path):
    assert known_length(tmp_path / "own.tsp", TSP) is None


@pytest.mark.parametrize("instance", [TSP, CVRP], ids=["tsp", "cvrp"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_pyvrp_solution_keeps_the_rules_and_is_optimal_where_that_is_plain(instance, count, tmp_path):
    demand = None if instance.demand is None else instance.demand[:count]
    part = instance._replace(coords=SQUARE[:count], demand=demand)
    solution = pyvrp_solution(part, iterations=50)
    check_solution(part, solution)
    write_solution(tmp_path / "own.sol", part, solution)
    if count == 4:
        best = {"tsp": 14, "cvrp": 18}[instance.problem]
        path = tmp_path / ("own.opt.tour" if demand is None else "own.sol")
        write_solution(path, part, solution)
        assert known_length(tmp_path / "own.tsp", part) == best
