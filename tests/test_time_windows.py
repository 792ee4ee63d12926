"""Time windows from files to checked plans: readers, waiting and lateness, every way to look, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import solve
from routing.files import InstanceError, RoutingInstance, read_instances
from routing.metrics import EXACT
from routing.pyvrp_reference import pyvrp_solution
from routing.solutions import IllegalSolution, check_solution, known_length, split_routes
from routing.vrptw import PACE, VRPTWRules
from routing.windows import TimeWindows
from solving.answers import Solution, as_json, table, tours
from solving.decoding import Decoding
from solving.frames import as_instance, pose
from solving.polishing import polished
from solving.times import strange_times
from tests.answer_scenes import make_agent

CPU = torch.device("cpu")
# The first 10 customers of Solomon's R101.
R101 = """R101

VEHICLE
NUMBER     CAPACITY
  25         200

CUSTOMER
CUST NO.  XCOORD.   YCOORD.    DEMAND   READY TIME  DUE DATE   SERVICE   TIME

    0      35         35          0          0        230          0
    1      41         49         10        161        171         10
    2      35         17          7         50         60         10
    3      55         45         13        116        126         10
    4      55         20         19        149        159         10
    5      15         30         26         34         44         10
    6      25         30          3         99        109         10
    7      20         50          5         81         91         10
    8      10         43          9         95        105         10
    9      55         60         16         97        107         10
   10      30         60         16        124        134         10
"""
# A depot and three customers on a line, 3, 4 and 5 away; the second opens late.
LINE = "x,y,demand,ready,due,service,capacity\n0,0,0,0,40,0,10\n3,0,1,0,10,2,\n4,0,1,9,20,1,\n5,0,1,0,30,1,\n"
VRP = """NAME : LINE
TYPE : VRPTW
DIMENSION : 4
CAPACITY : 10
SERVICE_TIME : 1
EDGE_WEIGHT_TYPE : EUC_2D
NODE_COORD_SECTION
1 0 0
2 3 0
3 4 0
4 5 0
DEMAND_SECTION
1 0
2 1
3 1
4 1
TIME_WINDOW_SECTION
1 0 40
2 0 10
3 9 20
4 0 30
DEPOT_SECTION
1
-1
EOF
"""


def file_of(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def read(folder: Path, name: str, text: str) -> RoutingInstance:
    (instance,) = read_instances(file_of(folder, name, text))
    return instance


def line(folder: Path, **changes: Any) -> RoutingInstance:
    return read(folder, "line.csv", LINE)._replace(**changes)


def lateness(instance: RoutingInstance, route: list[int]) -> float:
    """By the definition: how late a vehicle first is."""
    assert instance.windows is not None
    time, here = 0.0, instance.coords[0]
    for node in [*route, 0]:
        time += float(np.hypot(*(instance.coords[node] - here)))
        if time > instance.windows.due[node] + 1e-9:
            return time - float(instance.windows.due[node])
        time = max(time, instance.windows.ready[node]) + instance.windows.service[node]
        here = instance.coords[node]
    return 0.0


@pytest.fixture(scope="module")
def agent() -> Any:
    return make_agent(task="vrptw", **{"actor.pointer.latent": 0})


# Readers


def test_solomons_form_is_read(tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    assert (instance.problem, instance.metric, instance.capacity) == ("vrptw", EXACT, 200)
    assert instance.coords[10].tolist() == [30.0, 60.0]
    assert instance.demand is not None and instance.demand.tolist() == [0, 10, 7, 13, 19, 26, 3, 5, 9, 16, 16]
    assert instance.windows is not None
    assert instance.windows.ready[:3].tolist() == [0.0, 161.0, 50.0]
    assert instance.windows.due[:3].tolist() == [230.0, 171.0, 60.0]
    assert instance.windows.service.tolist() == [0.0] + [10.0] * 10
    # More vehicles than customers are any number of them.
    assert instance.vehicles is None


def test_columns_a_section_and_arrays_say_the_same(tmp_path):
    from_csv = line(tmp_path)
    names, *rows = (row.split(",") for row in LINE.split())
    nodes = [dict(zip(names, (float(field or 10) for field in row), strict=True)) for row in rows]
    from_json = read(tmp_path, "line.json", json.dumps(nodes))
    columns = {name: np.array([node[name] for node in nodes]) for name in names}
    arrays: dict[str, Any] = {name: columns[name] for name in ("demand", "ready", "due", "service")}
    np.savez(tmp_path / "line.npz", coords=np.stack((columns["x"], columns["y"]), -1), capacity=10, **arrays)
    (from_npz,) = read_instances(tmp_path / "line.npz")
    from_vrp = read(tmp_path, "line.vrp", VRP.replace("SERVICE_TIME : 1\n", "") + "")
    for other in (from_json, from_npz):
        assert other.windows is not None and from_csv.windows is not None
        for name in ("ready", "due", "service", "pace"):
            assert np.array_equal(getattr(from_csv.windows, name), getattr(other.windows, name))
        assert other.problem == "vrptw" and other.capacity == from_csv.capacity == 10
    assert from_vrp.windows is not None and from_csv.windows is not None
    assert from_vrp.windows.due.tolist() == from_csv.windows.due.tolist()
    assert from_vrp.windows.service.tolist() == [0.0] * 4


def test_service_and_windows_stand_in_sections(tmp_path):
    constant = read(tmp_path, "a.vrp", VRP)
    each = VRP.replace("SERVICE_TIME : 1\n", "").replace(
        "DEPOT_SECTION", "SERVICE_TIME_SECTION\n1 0\n2 5\n3 1\n4 2\nDEPOT_SECTION"
    )
    sections = read(tmp_path, "b.vrp", each.replace("VRPTW", "CVRPTW"))
    assert constant.windows is not None and sections.windows is not None
    assert constant.windows.service.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert sections.windows.service.tolist() == [0.0, 5.0, 1.0, 2.0]


def test_a_day_may_begin_at_any_hour(tmp_path):
    later = "x,y,demand,ready,due,capacity\n0,0,0,480,520,10\n3,0,1,470,490,\n4,0,1,489,500,\n"
    windows = read(tmp_path, "day.csv", later).windows
    assert windows is not None
    assert (windows.ready.tolist(), windows.due.tolist()) == ([0.0, 0.0, 9.0], [40.0, 10.0, 20.0])


def test_demands_alone_make_an_instance_of_vehicles(tmp_path):
    instance = read(tmp_path, "own.csv", "x,y,demand,capacity\n0,0,0,5\n1,1,2,5\n2,2,3,5\n")
    assert (instance.problem, instance.capacity, instance.windows) == ("cvrp", 5, None)


WRONG = {
    "closed.txt": (
        R101.replace("161        171", "171        161"),
        "customer 1 has the window 171 to 161, which closes",
    ),
    "far.txt": (R101.replace("34         44", " 3         14"), "customer 5 has to be served by 14, and the way there"),
    "home.txt": (R101.replace("230", "180"), "customer 1 lies where nobody who serves it is back before 186.232"),
    "heavy.txt": (R101.replace("26         34", "260        34"), ":15: demand 260 is above the capacity of 200"),
    "number.txt": (R101.replace("    4      55", "    5      55"), ":14: number '5' where 4 comes next"),
    "time.txt": (R101.replace("116        126", "116        x"), ":13: due date 'x'; a number from 0"),
    "short.txt": (R101.replace("124        134", "124"), ":20: has 6 values; below CUSTOMER a line"),
    "fleet.txt": (R101.replace("  25         200", "  0.5        200"), ":5: '0.5' for the vehicles; below VEHICLE"),
    "none.txt": (R101[: R101.index("    0 ")], ":7: no node stands in the table"),
    "depot.txt": (R101.replace("230          0", "230         10"), ":10: the depot has a service time of 10"),
    "late.csv": (LINE.replace("9,20,1", "25,20,1"), "customer 2 has the window 25 to 20, which closes before it opens"),
    "half.csv": (LINE.replace("due", "note"), ":1: has no column due beside"),
    "bare.csv": ("x,y,demand\n0,0,0\n1,1,1\n2,2,2\n", ":1: has no column capacity beside demand"),
    "mixed.csv": (LINE.replace("10,2,", "10,2,9"), ":3: capacity '9' beside 10; the same whole number"),
    "geo.csv": (LINE.replace("x,y", "lat,lon"), ":1: time windows beside degrees say nothing of how fast"),
    "late.vrp": (VRP.replace("3 9 20", "3 9 3"), "node 3 has the window 9 to 3, which closes before it opens"),
    "gone.vrp": (VRP.replace("4 0 30\n", ""), "TIME_WINDOW_SECTION ends after 3 nodes, and DIMENSION is 4"),
    "word.vrp": (VRP.replace("3 9 20", "3 9 x"), "time 'x'; a number from 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_windows_that_nobody_can_keep_are_one_line(name, tmp_path):
    text, message = WRONG[name]
    with pytest.raises(InstanceError) as caught:
        read_instances(file_of(tmp_path, name, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_of_windows_are_refused_by_name(tmp_path):
    path = tmp_path / "own.npz"
    parts: dict[str, Any] = {
        "coords": np.array([[0, 0], [3, 0], [4, 0.0]]),
        "demand": np.array([0, 1, 1]),
        "capacity": 5,
    }
    np.savez(path, **parts, ready=np.zeros(3))
    with pytest.raises(InstanceError, match="`ready`, `due` and `service` \\[I, N\\] for VRPTW"):
        read_instances(path)
    np.savez(path, **parts, ready=np.zeros(3), due=np.array([9, 9, 9]), pace=2)
    # 2 * 4 there, and as much back.
    with pytest.raises(InstanceError, match="customer 1 lies where nobody who serves it is back before 12"):
        read_instances(path)
    np.savez(path, **parts, ready=np.zeros(3), due=np.array([9, -9, 9]))
    with pytest.raises(InstanceError, match="due is needed with shape"):
        read_instances(path)


# The clock


def test_checker_counts_waiting_and_lateness(tmp_path):
    instance = line(tmp_path)
    # There at 3, away at 5; at 6, waiting to 9, away at 10; at 11, away at 12; home at 17.
    check_solution(instance, np.array([0, 1, 2, 3]))
    assert instance.windows is not None
    late = instance._replace(windows=instance.windows._replace(due=np.array([40.0, 10.0, 20.0, 10.9])))
    with pytest.raises(IllegalSolution, match="route 1 comes to customer 3 0.1 too late"):
        check_solution(late, np.array([0, 1, 2, 3]))
    check_solution(late, np.array([0, 3, 0, 1, 2]))
    # Two customers before it: three legs, of which each may be off.
    check_solution(late, np.array([0, 1, 2, 3]), allowed=0.03)
    home = instance._replace(windows=instance.windows._replace(due=np.array([16.9, 10.0, 20.0, 30.0])))
    with pytest.raises(IllegalSolution, match="route 1 comes to the depot 0.1 too late"):
        check_solution(home, np.array([0, 1, 2, 3]))


def test_whole_times_never_let_anybody_be_late():
    draws = np.random.default_rng(0)
    coords = draws.uniform(0, 100, (9, 2))
    ready = draws.uniform(0, 60, 9)
    ready[0] = 0
    windows = TimeWindows(ready, ready + draws.uniform(5, 90, 9), draws.uniform(0, 5, 9))
    instance = RoutingInstance("own", "vrptw", coords, EXACT, windows=windows)
    whole = instance.whole_windows()
    assert whole is not None and whole.fineness == 1000
    assert (whole.due <= whole.fineness * windows.due + 1e-3).all()
    assert (whole.ready >= whole.fineness * np.minimum(windows.ready, windows.day) - 1e-3).all()
    reached = instance.cost_matrix() <= windows.day
    assert (whole.drives >= whole.fineness * instance.cost_matrix() - 1e-3)[reached].all()
    # By less than a thousandth.
    assert (whole.drives <= whole.fineness * instance.cost_matrix() + 1)[reached].all()


def test_whole_times_stay_as_they_are(tmp_path):
    whole = line(tmp_path).whole_windows()
    assert whole is not None and whole.fineness == 1
    assert whole.drives[0].tolist() == [0, 3, 4, 5]
    assert whole.due.tolist() == [40, 10, 20, 30]


def test_rules_and_checker_agree_on_every_plan(tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    posed = pose([instance], CPU).instance
    draws = torch.Generator().manual_seed(0)
    states = VRPTWRules.reset(posed)
    visited = [0]
    legal = illegal = 0
    while not VRPTWRules.finished(states).all():
        mask = VRPTWRules.action_mask(states)
        done = visited[len(visited) - 1 - visited[::-1].index(0) :]
        for node in (~states.visited[0]).nonzero()[:, 0].tolist():
            late = lateness(instance, [*done[1:], node])
            assert bool(mask[0, node]) == (late == 0), (done, node)
            legal, illegal = legal + (late == 0), illegal + (late > 0)
        action = torch.multinomial(mask.float(), 1, generator=draws)[:, 0]
        states, _ = VRPTWRules.step(states, action)
        visited.append(int(action))
    assert legal > 5 and illegal > 5


def test_network_sees_times_as_far_as_one_gets_in_them(tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    posed, units = pose([instance], CPU)
    # Nodes lie in a square of 45, and random instances have a day of 4.6 sides; its own is longer.
    assert units.tolist() == [45.0]
    features = VRPTWRules.node_features(posed)
    torch.testing.assert_close(features[0, 1, -3:], torch.tensor([161.0, 171.0, 10.0]) / 230)
    assert instance.windows is not None
    short = instance._replace(windows=instance.windows._replace(due=np.minimum(instance.windows.due, 200.0)))
    features = VRPTWRules.node_features(pose([short], CPU).instance)
    torch.testing.assert_close(features[0, 1, -3:], torch.tensor([161.0, 171.0, 10.0]) / (4.6 * 45))


def test_random_instances_are_seen_as_in_training():
    drawn = VRPTWRules.field_instances(3, 6, seed=1)
    posed = pose(solve.random_instances(make_agent(task="vrptw"), 3, 6, 1), CPU).instance
    torch.testing.assert_close(VRPTWRules.node_features(posed), VRPTWRules.node_features(drawn).float())
    assert (posed.pace == 1000 * PACE).all()


# Answers


def test_pyvrp_finds_the_known_plan(tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    plan = pyvrp_solution(instance)
    check_solution(instance, plan)
    # By enumeration of all sets of routes.
    assert instance.tour_length(plan) == pytest.approx(_least_length(instance), rel=1e-6)


def _least_length(instance: RoutingInstance) -> float:
    """The least length of any plan, from that of every route that is in time."""
    costs, count = instance.cost_matrix(), len(instance.coords) - 1
    least = np.full(2**count, np.inf)

    def extend(route: list[int], length: float, members: int) -> None:
        if route:
            # A longer route comes no earlier to where this one is late.
            if lateness(instance, route):
                return
            least[members] = min(least[members], length + costs[route[-1], 0])
        here = route[-1] if route else 0
        for node in range(1, count + 1):
            if not members & 1 << node - 1:
                extend([*route, node], length + costs[here, node], members | 1 << node - 1)

    extend([], 0.0, 0)
    best = np.full(2**count, np.inf)
    best[0] = 0.0
    for members in range(1, 2**count):
        part = members
        while part:
            best[members] = min(best[members], least[part] + best[members ^ part])
            part = (part - 1) & members
    return float(best[-1])


WAYS = (
    *(Decoding("greedy"), Decoding("sample", samples=4), Decoding("augment"), Decoding("plan")),
    *(Decoding("beam", width=2, seconds=0.3), Decoding("active", seconds=0.3), Decoding("reconstruct", seconds=0.5)),
)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.method)
def test_every_way_gives_plans_that_are_in_time(how, agent, tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    (found,) = solve.solve(agent, [instance], how)
    assert isinstance(found, Solution), found
    check_solution(instance, found.tour)
    assert found.length == pytest.approx(instance.tour_length(found.tour))


def test_polish_goes_on_from_a_plan_and_stays_in_time(tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    alone = np.array([node for customer in range(1, 11) for node in (0, customer)])
    best, library, _ = polished(instance, alone, alone, seconds=0.2)
    check_solution(instance, best)
    assert library == "PyVRP"
    assert instance.tour_length(best) < instance.tour_length(alone)


def test_table_and_json_say_how_many_routes_and_what_is_minimised(tmp_path):
    instance = line(tmp_path)
    solution = Solution(instance, np.array([0, 1, 2, 0, 3]), 18.0, 0.1)
    assert len(split_routes(solution.tour)) == 2
    head, row = table([solution]).splitlines()[:2]
    assert head.split()[-3:] == ["routes", "chosen", "by"]
    assert row.split()[-2:] == ["2", "network"]
    assert "not the fewest of them" in tours([solution])
    (told,) = json.loads(as_json([solution]))["instances"]
    assert (told["routes"], told["minimised"]) == (2, "length")


def test_known_plans_may_drop_what_is_behind_the_first_decimal(tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    assert instance.windows is not None
    plan = pyvrp_solution(instance)
    path = tmp_path / "R101.txt"
    routes = [" ".join(map(str, route)) for route in split_routes(plan)]
    (tmp_path / "R101.sol").write_text("".join(f"Route #{n}: {r}\n" for n, r in enumerate(routes, 1)) + "Cost 1\n")
    assert known_length(path, instance) == pytest.approx(instance.tour_length(plan))
    (tmp_path / "R101.sol").write_text("Route #1: 1 2 3 4 5 6 7 8 9 10\nCost 1\n")
    assert known_length(path, instance) is None


def test_other_times_than_those_trained_on_are_one_line(tmp_path):
    instance = read(tmp_path, "R101.txt", R101)
    # In sides of 45: a day of 5.1, windows of 0.22 and service of 0.22, and up to half as much again is no news.
    assert strange_times([instance]) == []
    assert strange_times([instance._replace(windows=None)]) == []
    assert instance.windows is not None
    wide = instance._replace(windows=instance.windows._replace(ready=np.zeros(11), due=np.full(11, 450.0)))
    (told,) = strange_times([instance, wide])
    assert told.startswith("1 of 2 with other times than those trained on")
    assert "R101 (a day of 10, not 4.6, windows up to 10, not 0.2);" in told


def test_solve_answers_a_file_without_a_run(tmp_path, capsys):
    path = file_of(tmp_path, "R101.txt", R101)
    solve.main(["none", str(path), "--out", str(tmp_path / "out")])
    assert "PyVRP, no model" in capsys.readouterr().out
    assert (tmp_path / "out" / "R101.sol").read_text().startswith("Route #1:")
    assert (tmp_path / "out" / "R101.png").exists()


def test_as_instance_takes_drives_from_the_instances_own_metric(tmp_path):
    rounded = VRP.replace("2 3 0\n", "2 3.4 0\n", 1)
    instance = read(tmp_path, "a.vrp", rounded)
    drives = as_instance([instance], torch.from_numpy(instance.coords)[None]).drives
    assert drives is not None
    assert drives[0, 0].tolist() == [0, 3, 4, 5]
