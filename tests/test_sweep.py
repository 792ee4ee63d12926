"""Sweeps: what they vary, what becomes of their runs, and how they are stopped and gone on with."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import compare
import config
import sweep
from comparing import runs
from config import ConfigError
from sweeping.axes import Range, listed, range_of, values_of
from sweeping.plans import Grid, Template
from sweeping.runner import MOST_RESTARTS
from tests.run_scenes import COMMAND, ROOT, Reference, read_metrics, same_weights
from tests.scenes import without_times
from tests.sweep_scenes import stand_in, steps_of, until, work
from training.logdirs import claimed
from training.run_lock import RunLock

__all__ = ["stand_in"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[64, 64],[32, 32]", ["[64, 64]", "[32, 32]"]),
        ("{gravity: 9.8, mass: 1},{}", ["{gravity: 9.8, mass: 1}", "{}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        (r"tensorboard\,wandb,tensorboard", ["tensorboard,wandb", "tensorboard"]),
        (r"a\b", [r"a\b"]),
        ("", [""]),
    ],
)
def test_values_of_splits_at_commas_that_separate(text: str, values: list[str]):
    assert values_of(text) == values


def test_listed_writes_a_range_of_whole_numbers_out():
    assert listed("seeds", "2..4") == ["2", "3", "4"]
    assert listed("trips", "../log.csv") == ["../log.csv"]


@pytest.mark.parametrize("text", ["0.1..0.5", "1..9:log", "1,1", "1,,2", "3..3"])
def test_listed_refuses_what_has_no_list_of_values(text: str):
    with pytest.raises(ConfigError, match="x is"):
        listed("x", text)


def test_range_of_tells_whole_numbers_and_logarithms():
    assert range_of("x", "1e-4..1e-2:log") == Range(1e-4, 1e-2, whole=False, log=True)
    assert range_of("x", "16..64") == Range(16, 64, whole=True, log=False)
    assert range_of("x", "a..b") is None
    with pytest.raises(ConfigError, match="above 0"):
        range_of("x", "0..1:log")


def test_grid_has_every_combination_with_every_seed(tmp_path: Path):
    template = Template(("debug",), {"steps": "9"}, tmp_path)
    grid = Grid(template, {"actor.lr": ("1e-3", "1e-4"), "nodes": ("5", "6")}, seeds=("0", "1"))
    assert grid.total == 8
    names = [trial.name for trial in grid.trials]
    assert names[:3] == ["actor.lr=1e-3-nodes=5-seed0", "actor.lr=1e-3-nodes=5-seed1", "actor.lr=1e-3-nodes=6-seed0"]
    assert grid.trials[0].runs[0].arguments == (
        *("--configs", "debug", "--steps=9", "--actor.lr=1e-3", "--nodes=5", "--seed=0"),
        f"--logdir={tmp_path / names[0]}",
    )


def test_grid_gives_values_that_look_alike_folders_of_their_own(tmp_path: Path):
    grid = Grid(Template((), {}, tmp_path), {"trips": ("a/b", "a:b")}, seeds=("0",))
    assert [trial.name for trial in grid.trials] == ["trips=a_b-seed0", "trips=a_b_2-seed0"]
    assert Grid(Template((), {}, tmp_path), {}, seeds=("3",)).trials[0].name == "seed3"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs --logdir"),
        (["--logdir", "x", "--seed", "1"], "--seeds 0..4"),
        (["--logdir", "x", "--program", "solve.py"], "choose one of dreamer.py"),
        (["--logdir", "x", "--search", "grid"], "there is optuna"),
        (["--logdir", "x", "--actor.lr", "a,b"], "actor.lr is 'a'"),
        (["--logdir", "x", "--actor.entropi", "1,2"], "the nearest is 'actor.entropy'"),
        (["--logdir", "x", "--configs", "tsp_atn"], "tsp_atn"),
        (["--logdir", "x", "--program", "sac.py", "--imag_tours", "2,4"], "only dreamer.py reads imag_tours"),
        (["--logdir", "x", "--seeds", "0,-1"], "seed is -1"),
        (["--logdir", "x", "--envs", "4,0"], "envs is 0"),
        (["--logdir", "x", "--workers", "0"], "--workers is 0"),
        (["--logdir", "x", "--minimize", "valid_gap"], "add --search optuna"),
        (["--logdir", "x", "--search", "optuna", "--actor.lr", "1e-4..1e-2"], "needs --minimize METRIC"),
        (["--logdir", "x", "--search", "optuna", "--minimize", "valid_gap"], "something to vary"),
        (["--logdir", "x", "--search", "optuna", "--minimize", "g", "--actor.lr", "1e-4..-1e-2"], "LOW below HIGH"),
        (["--logdir", "x", "--search", "optuna", "--minimize", "g", "--envs", "0..4"], "envs is 0"),
        (["--logdir", "x", "--cluster", "pbs"], "choose one of slurm, local"),
        (["--logdir", "x", "--cluster_options", "timeout_min=3"], "goes with --cluster"),
        (["--logdir", "x", "--cluster", "local", "--cluster_options", "memory=3"], "submitit cannot use"),
    ],
)
def test_sweep_refuses_a_mistake_in_one_line_and_leaves_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("optuna")
    if "--cluster_options" in arguments:
        needs_submitit()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        sweep.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said in line
    assert not [*tmp_path.iterdir()]


def needs_submitit() -> None:
    # Importing it as it is would close the handlers of pytest's own logging.
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed")


@pytest.mark.run
def test_a_cluster_leaves_logging_as_it_was(tmp_path: Path):
    needs_submitit()
    program = (
        "import logging, sys; from pathlib import Path; from sweeping.jobs import Cluster\n"
        "logging.getLogger().addHandler(handler := logging.FileHandler(sys.argv[1] + '/log'))\n"
        "Cluster(1, logs=Path(sys.argv[1]), kind='local', options={}); print(handler.stream is not None)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "True\n"


VARIED = ("--steps", "30", "--seeds", "0..1", "--actor.lr", "1e-3,1e-4,1e-5", "--workers", "2")
FIRST = "actor.lr=1e-3-seed0"


def processes_of(folder: Path) -> list[int]:
    """The living processes, but this one, whose commands name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def rows_by_run(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.rglob("metrics.jsonl")}


def leftovers(folder: Path) -> list[object]:
    """Processes, locks that are held, and half-written files."""
    held = [path for path in folder.rglob(runs.LOCK) if runs.is_locked(path)]
    return [*processes_of(folder), *held, *folder.rglob("*.tmp")]


@pytest.mark.run
def test_sweep_of_which_one_run_is_killed_ends_like_an_undisturbed_one(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "disturbed"

    def kill() -> None:
        until(lambda: steps_of(folder / FIRST) >= 12)
        for process in processes_of(folder / FIRST):
            os.kill(process, signal.SIGKILL)

    assert work(folder, *VARIED, during=kill) == 0
    told = capsys.readouterr().err
    assert f"{FIRST}: killed by SIGKILL, and goes on" in told and "(6 of 6)" in told
    assert leftovers(folder) == []
    rows = rows_by_run(folder)
    assert len(rows) == 6 and rows[FIRST] == rows["actor.lr=1e-3-seed1"], "rows depend on the setting alone"
    assert all(len(text.splitlines()) == 30 for text in rows.values())
    compare.main([str(folder), "--out", str(tmp_path / "picture.png"), "--json"])
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [(group["name"], group["seeds"]) for group in groups] == [
        ("actor.lr=1e-3", [0, 1]),
        ("actor.lr=1e-4", [0, 1]),
        ("actor.lr=1e-5", [0, 1]),
    ]


@pytest.mark.run
def test_failing_run_lets_the_others_go_on_and_is_tried_again_by_the_same_command(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "sweep"
    (stand_in / f"fail-{FIRST}").touch()
    arguments = ("--steps", "8", "--actor.lr", "1e-3,1e-5")
    assert work(folder, *arguments) == 2
    _, failed, finished, last = capsys.readouterr().err.splitlines()
    assert failed.startswith(f"{FIRST}: failed, ended with status 1")
    assert finished == "actor.lr=1e-5-seed0: finished (2 of 2)"
    assert last.startswith(f"sweep.py: 1 of 2 trials failed ({FIRST}); {folder / 'logs'} has what they said")
    assert leftovers(folder) == []
    (stand_in / f"fail-{FIRST}").unlink()
    assert work(folder, *arguments) == 0


@pytest.mark.run
def test_run_that_dies_before_it_gets_any_further_is_not_started_for_ever(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (stand_in.parent / "dreamer.py").write_text("import os\nos.kill(os.getpid(), 9)")
    assert work(tmp_path / "sweep", "--steps", "8") == 2
    told = capsys.readouterr().err
    assert told.count("killed by SIGKILL, and goes on") == MOST_RESTARTS - 1
    assert "seed0: failed, ended with status -9" in told


@pytest.mark.run
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_all_runs_and_the_same_command_goes_on(
    number: signal.Signals, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "sweep"

    def stop() -> None:
        until(lambda: steps_of(folder / FIRST) >= 7)
        os.kill(os.getpid(), number)

    arguments = ("--steps", "200", "--actor.lr", "1e-3,1e-4", "--workers", "2")
    assert work(folder, *arguments, during=stop) == 0
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert leftovers(folder) == []
    reached = steps_of(folder / FIRST)
    assert 7 <= reached < 200 and int((folder / FIRST / "step").read_text()) == reached
    assert work(folder, *arguments) == 0
    assert [steps_of(folder / name) for name in (FIRST, "actor.lr=1e-4-seed0")] == [200, 200]


@pytest.mark.run
def test_second_interrupt_ends_every_run_at_once(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sweeping.runner.SHORT_GRACE", 0.3)
    folder = tmp_path / "sweep"
    (stand_in / f"hang-{FIRST}").touch()

    def interrupt_twice() -> None:
        until(lambda: steps_of(folder / FIRST) > 0 and steps_of(folder / "actor.lr=1e-4-seed0") > 0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    arguments = ("--steps", "10000", "--actor.lr", "1e-3,1e-4", "--workers", "2")
    assert work(folder, *arguments, during=interrupt_twice) == 130
    assert "stopped at once" in capsys.readouterr().err.splitlines()[-1]
    assert processes_of(folder) == []


@pytest.mark.run
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere runs outlive a sweep that is killed")
def test_runs_of_a_sweep_that_is_killed_save_and_stop(stand_in: Path, tmp_path: Path):
    folder = tmp_path / "sweep"
    begin = (
        f"import pathlib, sweeping.jobs, sweep; sweeping.jobs.ROOT = pathlib.Path({str(stand_in.parent)!r});"
        f"sweep.main(['--configs=debug', '--steps=10000', '--logdir', {str(folder)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", begin], cwd=ROOT)
    try:
        until(lambda: steps_of(folder / "seed0") >= 7)
    finally:
        process.kill()
        process.wait()
    until(lambda: not processes_of(folder / "seed0"))
    assert int((folder / "seed0" / "step").read_text()) == steps_of(folder / "seed0") < 10000
    assert (folder / "seed0" / "lock").read_text() == ""


@pytest.mark.run
def test_second_sweep_in_a_folder_is_refused(stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "sweep"
    with claimed(folder):
        assert work(folder, "--steps", "5") == 2
        assert f"{folder} is in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.run
def test_run_that_another_process_has_is_waited_for(stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "sweep"
    (folder / "seed0").mkdir(parents=True)
    lock = RunLock(folder / "seed0")

    def release() -> None:
        time.sleep(0.3)
        lock.release()

    assert work(folder, "--steps", "5", during=release) == 0
    assert "seed0 is in use by another process" in capsys.readouterr().err
    assert steps_of(folder / "seed0") == 5


@pytest.mark.run
def test_finished_runs_are_passed_over_and_longer_ones_gone_on_with(tmp_path: Path, reference: Reference):
    folder = tmp_path / "sweep"
    request = sweep.read_request([*COMMAND, "--logdir", str(folder)])
    trial = sweep.make_plan(request, folder).next()
    assert trial is not None
    (run,) = trial.runs
    shutil.copytree(reference.logdir, run.logdir)
    assert not sweep.was_finished("dreamer.py", run), "it was made under another logdir"
    config.save(sweep._command("dreamer.py", run).config, run.logdir / "config.yaml")
    assert sweep.was_finished("dreamer.py", run)
    longer = run._replace(arguments=(*run.arguments, "--steps=500"))
    assert not sweep.was_finished("dreamer.py", longer)


@pytest.mark.run
def test_search_stops_a_trial_that_is_worse_than_the_others(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    optuna = pytest.importorskip("optuna")
    folder = tmp_path / "sweep"
    drawn = ["1e-5", "2e-5", "1"]

    class Drawn(optuna.samplers.RandomSampler):  # type: ignore[name-defined, misc]
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> str:
            return drawn[trial.number]

    monkeypatch.setattr("optuna.samplers.TPESampler", lambda **_: Drawn())
    arguments = ("--steps", "40", "--actor.lr", ",".join(drawn), "--seeds", "0,1")
    search = ("--search", "optuna", "--minimize", "valid_gap", "--trials", "3", "--startup", "2")
    assert work(folder, *arguments, *search) == 0
    told = capsys.readouterr()
    assert "trial0002: pruned, stopped at step" in told.err
    assert told.out.startswith("best: trial0000, valid_gap 0.035, --actor.lr 1e-5")
    assert steps_of(folder / "trial0002-seed0") < 40 and not (folder / "trial0002-seed1").exists()
    assert steps_of(folder / "trial0001-seed1") == 40
    assert leftovers(folder) == []


@pytest.mark.run
def test_stand_in_of_a_cluster_runs_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    needs_submitit()
    folder = tmp_path / "sweep"
    cluster = ("--cluster", "local", "--cluster_options", "timeout_min=5")
    assert work(folder, "--steps", "60", "--eval_every", "0", "--eval_instances", "2", *cluster) == 0
    assert "seed0: finished (1 of 1)" in capsys.readouterr().err
    assert read_metrics(folder / "seed0")[-1]["step"] == 60


@pytest.mark.slow
def test_sweep_of_the_dreamer_with_one_run_killed_ends_like_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = (*COMMAND[2:], "--seeds", "0..1", "--actor.lr", "1e-3,3e-4,1e-4", "--workers", "2")

    def kill() -> None:
        until(lambda: '"step": 300,' in rows_by_run(tmp_path / "disturbed").get(FIRST, ""))
        for process in processes_of(tmp_path / "disturbed" / FIRST):
            os.kill(process, signal.SIGKILL)

    assert work(tmp_path / "undisturbed", *arguments) == 0
    assert work(tmp_path / "disturbed", *arguments, during=kill) == 0
    assert "killed by SIGKILL" in capsys.readouterr().err
    names = sorted(rows_by_run(tmp_path / "undisturbed"))
    assert len(names) == 6 and sorted(rows_by_run(tmp_path / "disturbed")) == names
    for name in names:
        one, other = (tmp_path / folder / name for folder in ("undisturbed", "disturbed"))
        assert without_times(read_metrics(one)) == without_times(read_metrics(other)) and same_weights(one, other)
