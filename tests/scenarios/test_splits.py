"""Sets by whole logs: the last ones in time, and maps that are held out."""

from __future__ import annotations

from typing import Any

import pytest

from config import UserError
from scenarios.manifest import Entry
from scenarios.splits import log_sets, split
from settings.scenarios import SplitSettings
from tests.scenario_scenes import scenario, settings

TEN = [f"town-0-{60 * number:05d}" for number in range(10)]


def split_settings(**changes: Any) -> SplitSettings:
    values = {"split.valid": 0.1, "split.test": 0.2, **{f"split.{key}": value for key, value in changes.items()}}
    return SplitSettings.of(settings(**values))


def test_last_logs_of_a_recording_test_and_those_before_them_validate():
    sets = log_sets([(log, "town") for log in reversed(TEN)], split_settings())
    assert [sets[log] for log in TEN] == ["train"] * 7 + ["valid"] + ["test"] * 2


def test_every_recording_is_split_by_itself():
    other = [f"town-1-{60 * number:05d}" for number in range(10)]
    sets = log_sets([(log, "town") for log in TEN + other], split_settings())
    assert [sets[log] for log in other] == [sets[log] for log in TEN]


def test_logs_of_others_are_split_by_their_names():
    logs = ["monday", "tuesday", "wednesday", "thursday", "friday"]
    sets = log_sets([(log, "town") for log in logs], split_settings(valid=0.2))
    assert [log for log in sorted(logs) if sets[log] != "train"] == ["tuesday", "wednesday"]
    assert sets["wednesday"] == "test" and sets["tuesday"] == "valid"


def test_map_that_is_held_out_is_a_set_of_its_own():
    sets = log_sets([("a-0-00000", "a"), *((log, "town") for log in TEN)], split_settings(held_out_maps=["a"]))
    assert sets["a-0-00000"] == "held_out" and list(sets.values()).count("held_out") == 1


@pytest.mark.parametrize(("count", "expected"), [(1, "t"), (2, "tt"), (3, "tvT"), (4, "ttvT"), (5, "tttvT")])
def test_few_logs_leave_one_for_each_set_where_there_are_three(count: int, expected: str):
    sets = log_sets([(log, "town") for log in TEN[:count]], split_settings())
    names = {"train": "t", "valid": "v", "test": "T"}
    assert "".join(names[sets[log]] for log in TEN[:count]) == expected


def test_no_share_is_no_log():
    assert set(log_sets([(log, "town") for log in TEN], split_settings(valid=0, test=0)).values()) == {"train"}


def test_no_log_is_in_two_sets():
    entries = [Entry(scenario(agent, log=log, map="town")) for agent in range(3) for log in TEN]
    sets = split(entries, split_settings())
    logs = [{entry.scenario.log for entry in part} for part in sets]
    assert [len(part) for part in sets] == [21, 3, 6, 0]
    assert sum(map(len, logs)) == len(set().union(*logs)) == 10


def test_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="no log is left to train on"):
        split([Entry(scenario(map="town"))], split_settings(held_out_maps=["town"]))
