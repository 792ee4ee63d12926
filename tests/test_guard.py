from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoint
import guard as guard_module
from guard import Finding, Guard, culprit, main

NAN, INF = math.nan, math.inf
ROOT = Path(guard_module.__file__).parent


@pytest.fixture
def guard() -> Guard:
    return Guard("cpu")


def test_guard_has_nothing_to_report_of_finite_values(guard: Guard):
    guard.watch("loss", ["reward", "mask"], torch.tensor([1.0, -3e38]))
    assert guard.findings() == []


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_guard_names_the_kind_the_tensor_and_the_update(guard: Guard, value: float):
    guard.update = 7
    guard.watch("model loss", ["reward", "mask"], torch.tensor([1.0, value]))
    assert guard.findings() == [Finding(update=7, kind="model loss", name="mask", times=1, last=7)]


def test_guard_counts_how_often_and_keeps_first_and_last_update(guard: Guard):
    for update, value in enumerate([1.0, NAN, 1.0, NAN, INF]):
        guard.update = update
        guard.watch("loss", ["reward"], torch.tensor([value]))
    assert guard.findings() == [Finding(update=1, kind="loss", name="reward", times=3, last=4)]


def test_guard_puts_the_earliest_update_first_whatever_was_watched_first(guard: Guard):
    guard.watch("early in the flow", ["a"], torch.tensor([1.0]))
    guard.watch("late in the flow", ["b"], torch.tensor([NAN]))
    guard.update = 1
    guard.watch("early in the flow", ["a"], torch.tensor([NAN]))
    assert [finding.name for finding in guard.findings()] == ["b", "a"]


def test_guard_tells_what_it_saw_since_an_update(guard: Guard):
    for update, names in enumerate(["ab", "b", "c", ""]):
        guard.update = update
        guard.watch("loss", ["a", "b", "c"], torch.tensor([NAN if name in names else 1.0 for name in "abc"]))
    assert [finding.name for finding in guard.findings(since=1)] == ["b", "c"]
    assert guard.findings(since=3) == []


def test_guard_keeps_the_order_of_watching_within_an_update(guard: Guard):
    guard.watch("observation", ["coords"], torch.tensor([NAN]))
    guard.watch("loss", ["mask", "reward"], torch.tensor([NAN, NAN]))
    guard.watch("gradient", ["actor"], torch.tensor([NAN]))
    assert [finding.name for finding in guard.findings()] == ["coords", "mask", "reward", "actor"]


def test_guard_keeps_kinds_apart_that_share_a_name(guard: Guard):
    guard.watch("loss", ["reward"], torch.tensor([1.0]))
    guard.watch("gradient", ["reward"], torch.tensor([NAN]))
    assert [(finding.kind, finding.times) for finding in guard.findings()] == [("gradient", 1)]


def test_watch_all_finds_a_single_bad_entry_and_passes_over_other_types(guard: Guard):
    coords = torch.zeros(3, 4, 2)
    coords[2, 1, 0] = NAN
    whole_numbers = torch.full((3,), 2**62)
    guard.watch_all("replayed", {"visited": torch.ones(3, 4, dtype=torch.bool), "node": whole_numbers, "at": coords})
    assert [(finding.kind, finding.name) for finding in guard.findings()] == [("replayed", "at")]


def test_watch_all_takes_large_finite_entries_for_what_they_are(guard: Guard):
    guard.watch_all("replayed", {"reward": torch.full((1000,), 3e38)})
    assert guard.findings() == []


def test_watch_all_of_nothing_that_could_be_non_finite_is_silent(guard: Guard):
    guard.watch_all("replayed", {"node": torch.zeros(3, dtype=torch.int64)})
    guard.watch_all("replayed", {})
    assert guard.findings() == []


def test_watching_keeps_no_graph(guard: Guard):
    values = torch.ones(2, requires_grad=True) * 2
    guard.watch("loss", ["a", "b"], values)
    guard.watch_all("replayed", {"values": values})
    kept = [counter for counters in guard._sites.values() for counter in counters]
    assert kept and not any(counter.requires_grad for counter in kept)


@pytest.mark.parametrize("fetch", ["item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"])
def test_watching_never_waits_for_the_device(guard: Guard, monkeypatch: pytest.MonkeyPatch, fetch: str):
    values = {"a": torch.tensor([NAN, 1.0]), "b": torch.ones(4)}

    def watch() -> None:
        for _ in range(2):
            guard.watch("loss", ["a", "b"], values["a"])
            guard.watch_all("replayed", values)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, fetch, _refuse(fetch))
        watch()
    assert [finding.times for finding in guard.findings()] == [2, 2]


REPORT = {
    "step": 1200,
    "update": 77,
    "verdict": "skipped actor",
    "state": [],
    "findings": [
        {"kind": "replayed", "name": "coords", "shape": [4, 7, 6, 2], "bad_share": 0.25, "min": -0.5, "max": 2.0},
        {"kind": "loss of", "name": "actor", "shape": [], "bad_share": 1.0, "min": NAN, "max": NAN},
    ],
    "seen": [{"kind": "actor gradient", "name": "actor.pointer.weight"}],
    "rows": [(3, 1207), (0, 12)],
}


def test_culprit_is_the_first_in_state_then_batch_then_what_was_seen():
    assert culprit(REPORT) == "replayed coords"
    assert culprit({**REPORT, "state": [{"kind": "state", "name": "actor.weight"}]}) == "state actor.weight"
    assert culprit({**REPORT, "findings": []}) == "actor gradient actor.pointer.weight"
    assert culprit({**REPORT, "findings": [], "seen": []}) == "of unknown origin"


@pytest.mark.run
def test_saved_report_is_printed_in_full(tmp_path: Path):
    checkpoint.save(tmp_path / "step_1.pt", REPORT)
    printed = subprocess.run(
        [sys.executable, "-m", "guard", str(tmp_path / "step_1.pt")], cwd=ROOT, capture_output=True, text=True
    )
    assert printed.returncode == 0 and printed.stderr == ""
    assert printed.stdout.splitlines() == [
        "step 1200, update 77: skipped actor",
        "  run again, replayed coords: shape (4, 7, 6, 2), 25 % not finite, the rest from -0.5 to 2",
        "  run again, loss of actor: shape (), 100 % not finite, the rest from nan to nan",
        "  seen in the update itself: actor gradient actor.pointer.weight",
        "  rows of replay (environment, column): (3, 1207), (0, 12)",
    ]


def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "garbage.pt").write_bytes(b"no report")
    checkpoint.save(tmp_path / "latest.pt", {"updates": 3})
    checkpoint.save(tmp_path / "crafted.pt", {"verdict": "fine", "step": 1, "update": 2, "state": [3], "findings": 4})
    for name, message in (
        ("garbage.pt", "is empty, truncated or not a checkpoint"),
        ("latest.pt", "is no report; those are in a run's folder guard"),
        ("crafted.pt", "is no report; those are in a run's folder guard"),
        ("missing.pt", "cannot be opened"),
    ):
        assert main([str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("guard: ") and name in line and message in line
    assert main([]) == 2
    assert "usage: python -m guard" in capsys.readouterr().err


def _refuse(fetch: str) -> Callable[..., None]:
    def refuse(*_arguments: object) -> None:
        raise AssertionError(f"Tensor.{fetch} waits for the device")

    return refuse
