"""The benchmark of rows without a line: it finds the faults that it is about, and none in the planner."""

from __future__ import annotations

import numpy as np

import config
import planner
from benchmarks.reference_lines import Bad, batches, count_bad, made_up
from settings.imitation import ImitationSettings


def test_faulty_decoders_fail_where_the_planner_does_not():
    settings = ImitationSettings.of(config.load(planner.CONFIGS, ["planner", "debug"], {}))
    ours, as_written, order_mended = count_bad(made_up(200, seed=1), 8, settings, share=0.3, seed=1).values()
    assert set(ours) == {Bad(False, False, False)}
    # A row without a line poisons others where the mask is in another order, and gradients even where it is not.
    assert sum(bad.output and bad.loss and bad.gradient for bad in as_written) > 4
    assert not any(bad.output or bad.loss for bad in order_mended)
    assert sum(bad.gradient for bad in order_mended) > 4


def test_batches_have_as_many_rows_without_a_line_as_are_asked_for():
    rows = made_up(200, seed=1)
    for share in (0.0, 0.5, 1.0):
        drawn = [batch["lines_valid"].any((1, 2)) for batch in batches(rows, 200, share=share, seed=2)]
        assert abs(1 - np.mean(drawn) - share) < 0.05


def test_made_up_rows_are_some_with_lines_and_some_without():
    rows = made_up(200, seed=1)
    lines = rows["lines_valid"].any(-1).sum(-1)
    assert set(lines) == {0, 1, 2, 3}
    assert rows["action_mask"][range(200), rows["action"]].all()
