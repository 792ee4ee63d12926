"""What is told of solutions."""

import json

import numpy as np
import pytest

from routing.files import RoutingInstance
from routing.metrics import EXACT, GREAT_CIRCLE
from solving import answers
from solving.answers import Solution
from solving.decoding import Decoding

SQUARE = np.array([[0.0, 0], [0, 1], [1, 1], [1, 0]])


def solution(name="own", *, nodes=4, metric=EXACT, **parts):
    instance = RoutingInstance(name, "tsp", np.resize(SQUARE, (nodes, 2)), metric)
    return Solution(**{"instance": instance, "tour": np.arange(nodes), "length": 4.0, "seconds": 0.1, **parts})


def plan(tour, *, count=4):
    instance = RoutingInstance("own", "cvrp", SQUARE[:count], EXACT, np.array([0, 1, 1, 1])[:count], 3)
    return Solution(instance, np.array(tour), 4.0, 0.1)


def test_totals_average_length_reference_and_gap_over_the_same_instances():
    # 10 % above 10 and 30 % above 20, and one of length 1000 that nothing is known of.
    known = [solution(length=11.0, reference=10.0), solution(length=26.0, reference=20.0)]
    total = answers.totals([*known, solution(length=1000.0)])
    assert (total["mean_of"], total["mean_length"], total["mean_reference"]) == (2, 18.5, 15)
    assert total["mean_gap_percent"] == pytest.approx(20)
    assert total["seconds"] == pytest.approx(0.3)
    mean = answers.table([*known, solution(length=1000.0)]).splitlines()[-1]
    assert mean.startswith("mean of 2 with a reference") and "1000" not in mean


def test_totals_give_lengths_in_several_units_no_mean():
    total = answers.totals([solution(length=3.0), solution(length=1596.3, metric=GREAT_CIRCLE)])
    assert total["mean_length"] is None and total["mean_of"] == 2


def test_totals_average_all_lengths_where_nothing_is_known():
    total = answers.totals([solution(length=1.0), solution(length=3.0)])
    assert (total["mean_of"], total["mean_length"], total["mean_reference"], total["mean_gap_percent"]) == (
        *(2, 2),
        *(None, None),
    )


@pytest.mark.parametrize(("count", "row"), [(answers.MOST_SHOWN, -1), (answers.MOST_SHOWN + 1, 1)])
def test_table_has_means_first_where_there_are_many(count, row):
    assert answers.table([solution()] * count).splitlines()[row].startswith(f"mean of {count} ")


def test_lengths_of_great_circles_are_shown_in_kilometres():
    shown = answers.table([solution(metric=GREAT_CIRCLE, length=1596.34, reference=1596.34)])
    assert shown.splitlines()[1].count("1596.3 km") == 2 and shown.splitlines()[1].split()[-3] == "0.00"
    (row,) = json.loads(answers.as_json([solution(metric=GREAT_CIRCLE)]))["instances"]
    assert row["unit"] == "km"


def test_table_shows_no_negative_zero():
    assert answers.table([solution(length=10.0 - 1e-9, reference=10.0)]).splitlines()[1].split()[-3] == "0.00"


def test_tours_are_counted_as_in_the_files_that_hold_them():
    assert answers.tours([solution()]).splitlines()[1:] == ["own: 1 2 3 4"]
    assert answers.tours([plan([0, 1, 0, 2, 3])]).splitlines()[1:] == ["own: 1 | 2 3"]


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("name", ["own", "a" * 200])
def test_tours_fit_the_screen_and_show_how_they_begin_and_end(columns, name):
    lines = answers.tours([solution(name, nodes=1000)] * 2, columns=columns).splitlines()
    for line in lines[1:]:
        assert columns - 12 < len(line) <= columns
        assert ": 1 2 3 " in line and line.endswith(" 1000") and " ... " in line


def test_tours_of_many_are_not_shown():
    assert answers.tours([solution()] * answers.MOST_SHOWN)
    assert not answers.tours([solution()] * (answers.MOST_SHOWN + 1))


def told(*solutions, trained_on=20, **how):
    return answers.warnings(solutions, Decoding(**how), trained_on=trained_on)


@pytest.mark.parametrize(
    ("how", "advice"),
    [
        ({}, "--decode augment"),
        ({"method": "augment"}, "--decode sample"),
        ({"method": "sample", "samples": 7}, "--samples 70"),
    ],
)
def test_warnings_tell_of_tours_worse_than_nearest_neighbour_and_what_to_do(how, advice):
    (line,) = told(solution("bad", length=5.0, nearest=4.5), solution("good", length=4.0, nearest=4.0), **how)
    assert "1 of 2" in line and "bad (5 where that gives 4.5000)" in line and "good" not in line and advice in line


def test_warnings_name_a_few_of_many():
    (line,) = told(*[solution(f"own{row}", length=5.0, nearest=4.0) for row in range(50)])
    assert "own2 " in line and "own3" not in line and "and 47 more" in line


def test_warnings_tell_of_references_that_cannot_be():
    assert told(solution("close", length=98.0, reference=100.0)) == []
    (line,) = told(solution("odd", length=402.0, reference=1402.0))
    assert "odd" in line and "--reference" in line


def test_warnings_tell_of_sizes_far_from_those_trained_on():
    assert told(solution(nodes=60, nearest=9.0)) == []
    (line,) = told(solution(nodes=61, nearest=9.0))
    assert "own (61 nodes)" in line and "20 nodes trained on" in line and "--decode reconstruct" in line
