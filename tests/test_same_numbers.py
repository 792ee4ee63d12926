"""The tool that tells whether two states of the code give the same numbers."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import same_numbers
from benchmarks.same_numbers import differences

BEFORE = [{"step": 0, "seconds": 1.0, "loss": 0.5}, {"step": 10, "seconds": 2.0, "loss": math.nan, "gap": 3.0}]


def test_differences_are_none_of_the_same_numbers_at_other_times():
    after = [{**row, "seconds": 9.0, "fps": 7.0} for row in BEFORE]
    assert differences(BEFORE, after) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gap": 3.0000000001}, "gap at step 10: 3.0 before"),
        ({"loss": 1.0}, "loss at step 10"),
        ({"new": 1}, "missing"),
    ],
)
def test_differences_name_a_metric_and_where_it_begins(change, told):
    (line,) = differences(BEFORE, [BEFORE[0], {**BEFORE[1], **change}])
    assert told in line


def test_differences_tell_of_rows_that_are_not_there():
    assert differences(BEFORE, BEFORE[:1]) == ["2 rows before, 1 after"]


def test_compare_tells_by_its_status_and_leaves_out_what_it_is_told_to(tmp_path, capsys):
    for folder, gap in (("before", 3.0), ("after", 4.0)):
        (tmp_path / folder / "cartpole").mkdir(parents=True)
        row = {"step": 0, "gap": gap}
        (tmp_path / folder / "cartpole" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    folders = [str(tmp_path / "before"), str(tmp_path / "after")]
    assert same_numbers.main(["compare", *folders]) == 1
    assert "cartpole: 1 metrics differ" in capsys.readouterr().out
    assert same_numbers.main(["compare", *folders, "--except", "gap"]) == 0
    assert same_numbers.main(["compare", str(tmp_path), folders[1]]) == 2
