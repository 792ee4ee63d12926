from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from guard import Finding, Guard

NAN, INF = math.nan, math.inf


@pytest.fixture
def guard() -> Guard:
    return Guard("cpu")


def test_guard_has_nothing_to_report_of_finite_values(guard: Guard):
    guard.watch("loss", ["reward", "mask"], torch.tensor([1.0, -3e38]))
    assert guard.findings() == []
    assert guard.report() is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_guard_names_the_kind_the_tensor_and_the_update(guard: Guard, value: float):
    guard.update = 7
    guard.watch("model loss", ["reward", "mask"], torch.tensor([1.0, value]))
    assert guard.findings() == [Finding(update=7, kind="model loss", name="mask", times=1)]
    assert guard.report() == "the first non-finite value is model loss 'mask', in update 7"


def test_guard_counts_how_often_and_keeps_the_first_update(guard: Guard):
    for update, value in enumerate([1.0, NAN, 1.0, NAN, INF]):
        guard.update = update
        guard.watch("loss", ["reward"], torch.tensor([value]))
    assert guard.findings() == [Finding(update=1, kind="loss", name="reward", times=3)]


def test_guard_puts_the_earliest_update_first_whatever_was_watched_first(guard: Guard):
    guard.watch("early in the flow", ["a"], torch.tensor([1.0]))
    guard.watch("late in the flow", ["b"], torch.tensor([NAN]))
    guard.update = 1
    guard.watch("early in the flow", ["a"], torch.tensor([NAN]))
    assert [finding.name for finding in guard.findings()] == ["b", "a"]
    assert guard.report() == "the first non-finite value is late in the flow 'b', in update 0, and 1 more after it"


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
    assert guard.report() is None


def test_watch_all_of_nothing_that_could_be_non_finite_is_silent(guard: Guard):
    guard.watch_all("replayed", {"node": torch.zeros(3, dtype=torch.int64)})
    guard.watch_all("replayed", {})
    assert guard.report() is None


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


def _refuse(fetch: str) -> Callable[..., None]:
    def refuse(*_arguments: object) -> None:
        raise AssertionError(f"Tensor.{fetch} waits for the device")

    return refuse
