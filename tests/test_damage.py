"""Runs whose files were damaged, or are whole and hold what no run has written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import config
import dreamer
from checkpoint import CheckpointError
from comparing.runs import METRICS
from tests.run_scenes import COMMAND, CPU, STEPS, Reference, loaded, same_weights, train
from tests.scenes import refusal, without_times
from training.resuming import RUN, require

State = dict[str, Any]


@pytest.fixture
def logdir(reference: Reference, tmp_path: Path) -> Path:
    """A copy of a run that has ended, with the checkpoints of step 400 and, before it, of step 200."""
    copy = Path(shutil.copytree(reference.logdir, tmp_path / "run"))
    shutil.copy(copy / "step_000000200.pt", copy / checkpoint.PREVIOUS)
    return copy


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_middle, Path.unlink])
def test_damaged_chunk_gives_way_to_the_checkpoint_before_it_and_its_chunks(
    damage: Callable[[Path], None], reference: Reference, logdir: Path, capsys: pytest.CaptureFixture[str]
):
    newest = sorted((logdir / "replay").iterdir())[-1]
    damage(newest)
    rows = train(logdir)
    assert f"Going on from {logdir / checkpoint.PREVIOUS}" in capsys.readouterr().err
    assert without_times(rows) == without_times(reference.rows)
    assert same_weights(logdir, reference.logdir)


def test_chunk_that_both_checkpoints_need_is_named_when_it_is_damaged(logdir: Path, capsys: pytest.CaptureFixture[str]):
    oldest = min((logdir / "replay").iterdir())
    flip_middle(oldest)
    before = [(logdir / name).read_bytes() for name in (METRICS, checkpoint.LATEST, checkpoint.PREVIOUS)]
    line = refusal(capsys, *COMMAND, "--logdir", str(logdir))
    assert str(oldest) in line and "--init" in line
    assert [(logdir / name).read_bytes() for name in (METRICS, checkpoint.LATEST, checkpoint.PREVIOUS)] == before


def cut_at_a_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))


@pytest.mark.run
@pytest.mark.parametrize("damage", [Path.unlink, cut_at_a_line, lambda path: path.write_bytes(b"\xff\x00: [")])
def test_damaged_config_is_restored_from_the_checkpoint(
    damage: Callable[[Path], None], logdir: Path, capsys: pytest.CaptureFixture[str]
):
    saved = config.read(logdir / "config.yaml")
    damage(logdir / "config.yaml")
    dreamer.main(["--evaluate", str(logdir)])
    assert "copy in the checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(logdir, "--cost", "lanes")
    assert "cannot go on with lanes" in capsys.readouterr().err
    train(logdir, "--checkpoint_numbered", "true")
    assert config.read(logdir / "config.yaml").replace(logdir="") == saved.replace(logdir="")


def setting(*names: str, to: Any) -> Callable[[State], None]:
    """A change of one entry of a nested state."""

    def change(state: State) -> None:
        target: Any = state
        for name in names[:-1]:
            target = target[name]
        target[names[-1]] = to

    return change


def without(*names: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        target: Any = state
        for name in names[:-1]:
            target = target[name]
        del target[names[-1]]

    return change


def chunks(**entries: Any) -> Callable[[State], None]:
    return lambda state: state["replay"]["chunks"][-1].update(entries)


# What no run's checkpoint holds.
WRONG_KIND: dict[str, Callable[[State], None]] = {
    "no agent": without("agent"),
    "no replay": without("replay"),
    "no step": without("step"),
    "agent None": setting("agent", to=None),
    "replay None": setting("replay", to=None),
    "env None": setting("env", to=None),
    "logger text": setting("logger", to="here"),
    "negative step": setting("step", to=-400),
    "step a float": setting("step", to=200.5),
    "step true": setting("step", to=True),
    "updates text": setting("updates", to="many"),
    "nothing will ever be paid": setting("updates_owed", to=math.inf),
    "owes no number": setting("updates_owed", to=math.nan),
    "negative seconds": setting("seconds", to=-1.0),
    "total negative": setting("replay", "saved_totals", to=[-5, -1]),
    "length zero": setting("replay", "length", to=0),
    "chunks None": setting("replay", "chunks", to=None),
    "chunk elsewhere": chunks(name="../latest.pt"),
    "row None": setting("row", to=None),
    "generators None": setting("generators", to=None),
}
# What this run's checkpoint cannot hold.
WRONG_HERE: dict[str, Callable[[State], None]] = {
    "env empty": setting("env", to={}),
    "total without end": setting("replay", "saved_totals", to=[0, 10**15]),
    "total of other rows": setting("replay", "saved_totals", to=[0, 7]),
    "no chunks": setting("replay", "chunks", to=[]),
    "chunk without end": chunks(stop=10**15),
    "chunk backwards": chunks(start=10**6),
    "row empty": setting("row", to={}),
    "row of another shape": setting("row", "reward", to=torch.zeros(7)),
    "row of another type": setting("row", "is_first", to=torch.zeros(4)),
    "episode_return of another shape": setting("episode_return", to=torch.zeros(2)),
    "acting of another shape": setting("acting", "deter", to=torch.zeros(1)),
    "env of another shape": setting("env", "ended", to=torch.zeros(9, dtype=torch.bool)),
    "generator of another size": setting("generators", "model", to=torch.zeros(3, dtype=torch.uint8)),
    "model None": setting("agent", "model", to=None),
    "optimizers empty": setting("agent", "optimizers", to={}),
    "moments of another shape": lambda state: state["agent"]["optimizers"]["model"]["adam"]["state"][0].update(
        exp_avg=torch.zeros(3)
    ),
}


@pytest.mark.parametrize("kind", WRONG_KIND)
def test_checkpoint_with_an_entry_of_another_kind_is_refused(kind: str, reference: Reference):
    path = reference.logdir / checkpoint.LATEST
    state = loaded(path)
    require(state, RUN, path)
    WRONG_KIND[kind](state)
    with pytest.raises(CheckpointError, match=str(path)) as refused:
        require(state, RUN, path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["agent None", *WRONG_HERE])
def test_checkpoint_with_wrong_content_is_refused_in_one_line(
    kind: str, logdir: Path, capsys: pytest.CaptureFixture[str]
):
    state = loaded(logdir / checkpoint.LATEST)
    (WRONG_KIND | WRONG_HERE)[kind](state)
    (logdir / checkpoint.PREVIOUS).unlink()
    checkpoint.save(logdir / checkpoint.LATEST, state, keep_before=False)
    before = (logdir / METRICS).read_bytes()
    assert refusal(capsys, *COMMAND, "--steps", str(STEPS + 100), "--logdir", str(logdir))
    assert (logdir / METRICS).read_bytes() == before


def test_checkpoint_without_a_state_is_refused(tmp_path: Path):
    for content in (None, [1], {1: 2}, torch.zeros(2)):
        torch.save({"format": 1, "state": content}, tmp_path / "latest.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
            checkpoint.load(tmp_path / "latest.pt", CPU)


@pytest.mark.run
def test_debt_without_end_is_paid_by_one_step_at_most(logdir: Path):
    state = loaded(logdir / "step_000000200.pt")
    checkpoint.save(logdir / "owing.pt", {**state, "updates_owed": 1e15})
    train(logdir, "--resume", str(logdir / "owing.pt"), "--steps", "208")
    assert loaded(logdir / checkpoint.LATEST)["updates"] < state["updates"] + 10


def break_weights(state: State) -> None:
    next(iter(state["agent"]["model"].values())).view(-1)[0] = math.nan


def test_weights_that_are_not_finite_give_way_to_the_checkpoint_before_them(
    reference: Reference, logdir: Path, capsys: pytest.CaptureFixture[str]
):
    state = loaded(logdir / checkpoint.LATEST)
    break_weights(state)
    checkpoint.save(logdir / checkpoint.LATEST, state, keep_before=False)
    rows = train(logdir)
    assert "not finite" in capsys.readouterr().err
    assert without_times(rows) == without_times(reference.rows)


def test_init_with_weights_that_are_not_finite_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    state = loaded(logdir / checkpoint.LATEST)
    break_weights(state)
    checkpoint.save(tmp_path / "broken.pt", state)
    line = refusal(capsys, *COMMAND, "--init", str(tmp_path / "broken.pt"), "--logdir", str(tmp_path / "new"))
    assert "broken.pt" in line and "not finite" in line


def loads_or_says_why(path: Path, state: State) -> bool:
    try:
        found = checkpoint.load(path, CPU)
    except CheckpointError as error:
        return str(path) in str(error)
    return found.keys() == state.keys() and found["weights"].equal(state["weights"])


def test_every_flipped_byte_of_a_checkpoint_is_noticed_or_harmless(tmp_path: Path):
    path = tmp_path / "latest.pt"
    state = {"weights": torch.ones(3), "step": 7}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 0xFF
        path.write_bytes(content)
        assert loads_or_says_why(path, state), position
