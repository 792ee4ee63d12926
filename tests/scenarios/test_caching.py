"""A cache that is filled: what is in it, what a second call does, and what becomes of a damaged one."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import ConfigError, UserError
from scenarios import caching, manifest
from scenarios.cache import Cache
from scenarios.logs import LogFolder
from scenarios.manifest import Entry
from scenarios.parts import Needs, Part, Scene, Spec, chosen
from scenarios.report import Report
from scenarios.samples import FLAGS, fault_of
from tests.library import ROOT
from tests.scenario_scenes import CHOICES, KNOWN, NEEDS, PLACES, SPEEDS, scenario, scenario_settings, write_logs
from training import episode_files
from training.episode_files import EpisodeList

LOGS = ("a-0-00000", "a-0-00060")
WIDER = Needs(("ego", "place"), ("action",))


def fill(folder: Path, needs: Needs = NEEDS, known: tuple[Part, ...] = KNOWN, **changes: Any) -> Report:
    return caching.fill(scenario_settings(folder, **changes), needs, known, seed=0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache by its path, but for the lock, which is empty."""
    paths = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder with two logs and their cache, of 8 scenarios with 100 samples."""
    write_logs(tmp_path, *LOGS)
    fill(tmp_path)
    return tmp_path


def first_file(folder: Path) -> Path:
    return sorted((folder / "cache").glob("*/*/*.npz"))[0]


def test_every_scenario_has_a_file_by_log_type_and_token(filled: Path):
    entries = Cache(filled / "cache").manifest()
    assert len(entries) == 8 and {entry.scenario.log for entry in entries} == set(LOGS)
    paths = {filled / "cache" / one.log / one.type / f"{one.token}.npz" for one, *_ in entries}
    assert paths == set((filled / "cache").glob("*/*/*.npz"))


def test_file_holds_the_rows_of_its_ego(filled: Path):
    entries = Cache(filled / "cache").manifest()
    (whole,) = (one for one, *_ in entries if (one.log, one.agent, one.frame) == ("a-0-00060", 7, 0))
    samples = episode_files.read(whole.path(filled / "cache"))
    assert samples["ego"].shape == (21, 6) and (samples["ego"] == 6.0).all()
    assert samples["action"].tolist() == [1 + row % 2 for row in range(21)]
    assert samples["is_first"].tolist() == [True] + [False] * 20
    assert samples["is_last"].tolist() == [False] * 20 + [True]
    assert not samples["is_terminal"].any()
    assert samples["parts"].tolist() == ["speeds:1", "choices:1"]


def test_sets_are_lists_of_files_that_replay_reads(tmp_path: Path):
    write_logs(tmp_path, *(f"a-0-{60 * number:05d}" for number in range(3)))
    fill(tmp_path)
    train = EpisodeList(tmp_path / "cache" / "train.txt")
    assert len(train.names) == 4 and {name.split("/")[0] for name in train.names} == {"a-0-00000"}
    assert train.read(0)["ego"].shape[1:] == (6,)
    for name, log in (("valid", "a-0-00060"), ("test", "a-0-00120")):
        assert {path.split("/")[0] for path in EpisodeList(tmp_path / "cache" / f"{name}.txt").names} == {log}
    assert (tmp_path / "cache" / "held_out.txt").read_text() == ""


def test_second_call_computes_nothing(filled: Path, monkeypatch: pytest.MonkeyPatch):
    before = contents(filled)
    times = {path: path.stat().st_mtime_ns for path in (filled / "cache").glob("*/*/*.npz")}
    monkeypatch.setattr(caching, "compute", None)
    report = fill(filled)
    assert (report.computed, len(report.entries)) == (0, 8)
    assert contents(filled) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("chunk", [1, 3])
def test_files_are_the_same_however_the_work_is_divided(
    chunk: int, filled: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path_factory.mktemp("other")
    write_logs(other, *LOGS)
    monkeypatch.setattr(caching, "CHUNK", chunk)
    fill(other)
    assert contents(other) == contents(filled)


def test_what_a_stopped_call_has_written_is_kept_and_completed(
    filled: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path_factory.mktemp("other")
    write_logs(other, *LOGS)
    written: list[str] = []
    write = Cache.write

    def interrupted(self: Cache, *arguments: Any) -> Entry:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append("one")
        return write(self, *arguments)

    monkeypatch.setattr(Cache, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(other)
    assert len(list((other / "cache").glob("*/*/*.npz"))) == 5
    # What a killed process leaves half-written.
    first_file(other).with_name(".0123.npz").write_bytes(b"half")
    monkeypatch.setattr(Cache, "write", write)
    assert fill(other).computed == 3
    assert contents(other) == contents(filled)


def test_damaged_file_is_computed_again(filled: Path):
    before = contents(filled)
    path = first_file(filled)
    path.write_bytes(path.read_bytes()[:-100])
    report = fill(filled)
    assert (report.computed, report.damaged) == (1, 1)
    assert contents(filled) == before


def test_damaged_table_of_a_log_costs_time_alone(filled: Path):
    before = contents(filled)
    (filled / "cache" / LOGS[0] / manifest.FILE_NAME).write_text("none\n")
    assert fill(filled).computed == 0 and contents(filled) == before


def test_force_computes_all(filled: Path):
    before = contents(filled)
    path = first_file(filled)
    path.unlink()
    assert fill(filled, cache__force=True).computed == 8
    assert contents(filled) == before


def test_clean_removes_what_is_there_and_nothing_else(filled: Path):
    cache = filled / "cache"
    stray, gone = cache / LOGS[0] / "notes.txt", cache / LOGS[1] / "free" / "0123456789abcdef.npz"
    stray.write_text("mine")
    own = gone.with_name("mine.npz")
    for path in (gone, own):
        path.write_bytes(b"of another run")
    report = fill(filled, cache__clean=True, scenario_filter__logs=[LOGS[0]])
    assert report.computed == 4
    assert stray.read_text() == "mine" and own.exists() and not gone.exists()
    assert [path.name for path in (cache / LOGS[1]).rglob("*")] == ["free", "mine.npz"]


def test_filter_that_takes_more_computes_only_what_is_new(filled: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other")
    write_logs(other, *LOGS)
    assert fill(other, scenario_filter__logs=[LOGS[0]]).computed == 4
    assert fill(other).computed == 4
    assert contents(other) == contents(filled)
    # The table tells of all that is there, whatever a filter takes.
    assert len(fill(other, scenario_filter__total=2).entries) == 2
    assert len(Cache(other / "cache").manifest()) == 8


def test_model_that_needs_more_has_that_computed(filled: Path):
    assert fill(filled, WIDER).computed == 8
    # Whoever needs less finds it there, and what it leaves out stays.
    assert fill(filled).computed == 0
    samples = episode_files.read(first_file(filled))
    assert samples["parts"].tolist() == ["speeds:1", "places:1", "choices:1"] and "place" in samples


def test_what_a_file_holds_for_another_model_stays_in_it(filled: Path):
    fill(filled, WIDER)
    before = episode_files.read(first_file(filled))["place"]
    # This one does not ask for places, and for something that is not there yet.
    assert fill(filled, NEEDS_WORTH, (*KNOWN, WORTH)).computed == 8
    after = episode_files.read(first_file(filled))
    assert after["parts"].tolist() == ["speeds:1", "places:1", "choices:1", "worth:1"]
    assert (after["place"] == before[: len(after["place"])]).all()


def test_file_of_samples_that_have_become_invalid_is_removed(filled: Path):
    fill(filled, WIDER)
    newer = dataclasses.replace(PLACES, version=2, build=_not_finite)
    report = fill(filled, WIDER, (SPEEDS, newer, CHOICES))
    assert report.invalid.total() == 2 and len(list((filled / "cache").glob("*/*/*.npz"))) == 6


def test_files_are_episodes_whatever_a_model_needs(tmp_path: Path):
    write_logs(tmp_path, "a")
    fill(tmp_path, Needs(("place",), ()), (*KNOWN, WORTH))
    episode = episode_files.read(first_file(tmp_path))
    assert episode["parts"].tolist() == ["places:1", "choices:1", "worth:1"]
    assert {"action", "action_mask", "reward", *FLAGS} <= episode.keys()


def test_new_version_of_a_part_is_computed_again(filled: Path):
    newer = dataclasses.replace(SPEEDS, version=2)
    assert fill(filled, known=(newer, PLACES, CHOICES)).computed == 8
    assert "speeds:2" in episode_files.read(first_file(filled))["parts"].tolist()


def _not_finite(scene: Scene) -> dict[str, np.ndarray]:
    values = np.zeros((len(scene.agents), 2), np.float32)
    values[scene.agents == 7] = np.nan if scene.frame == 22 else 0
    return {"place": values}


def _illegal(scene: Scene) -> dict[str, np.ndarray]:
    built = dict(CHOICES.build(scene))
    return {**built, "action": np.where(scene.agents == 3, 0, built["action"])}


@pytest.mark.parametrize(
    ("part", "needs", "invalid"),
    [
        (dataclasses.replace(PLACES, build=_not_finite), WIDER, Counter({"place is not finite": 2})),
        (dataclasses.replace(CHOICES, build=_illegal), NEEDS, Counter({"an action is illegal": 4})),
    ],
)
def test_invalid_samples_are_counted_and_have_no_file(part: Part, needs: Needs, invalid: Counter[str], tmp_path: Path):
    write_logs(tmp_path, *LOGS)
    known = tuple(part if one.name == part.name else one for one in KNOWN)
    report = fill(tmp_path, needs, known)
    count = invalid.total()
    assert report.invalid == invalid and len(report.entries) == 8 - count
    assert len(list((tmp_path / "cache").glob("*/*/*.npz"))) == 8 - count
    (why,) = invalid
    assert f"invalid, and not used: {count} scenarios, since {why}" in report.lines()
    # They are known by the table, and not tried again.
    again = fill(tmp_path, needs, known)
    assert again.computed == 0 and again.invalid == invalid
    only = fill(tmp_path, needs, known, cache__only=True)
    assert only.invalid == invalid and len(only.entries) == 8 - count


def test_fault_of_the_last_action_is_none():
    goes_on = {"action_mask": np.array([[True, False], [True, False]]), "is_terminal": np.zeros(2, bool)}
    assert fault_of({"action": np.array([0, 1]), **goes_on}) == ""
    assert fault_of({"action": np.array([1, 0]), **goes_on}) == "an action is illegal"


def _ending(scene: Scene) -> dict[str, np.ndarray]:
    """One of the egos is in contact in frame 3, the other one in frames 21 and 22."""
    touches = ((scene.agents == 3) & (scene.frame == 3)) | ((scene.agents == 7) & (scene.frame in (21, 22)))
    return {"reward": np.full(len(scene.agents), scene.frame, np.float32), "is_terminal": touches}


WORTH = Part("worth", 1, {"reward": Spec((), np.float32), "is_terminal": Spec((), np.bool_)}, _ending)
NEEDS_WORTH = Needs(("ego",), ("reward",))


def test_scenario_ends_where_its_ego_drives_no_further(tmp_path: Path):
    write_logs(tmp_path, "a")
    report = fill(tmp_path, NEEDS_WORTH, (SPEEDS, WORTH))
    kept = {(entry.scenario.agent, entry.scenario.frame): entry for entry in report.entries}
    assert {place: entry.scenario.rows for place, entry in kept.items()} == {(3, 0): 4, (3, 21): 4, (7, 0): 21}
    samples = Cache(tmp_path / "cache").read(kept[3, 0].scenario, (SPEEDS, WORTH))
    assert samples["is_terminal"].tolist() == samples["is_last"].tolist() == [False, False, False, True]
    # What was before the first row has earned nothing in this episode.
    assert samples["reward"].tolist() == [0, 1, 2, 3]
    why = "the ego touches another, or is off the road, from the beginning"
    assert report.invalid == Counter({why: 1}) and report.rows == 29
    assert "left out: 17 rows after an ego has touched another or left the road" in report.lines()
    again = fill(tmp_path, NEEDS_WORTH, (SPEEDS, WORTH))
    assert (again.computed, again.entries, again.left_out) == (0, report.entries, report.left_out)
    # A killed run has noted nothing, and what is there is found by the files alone.
    (tmp_path / "cache" / "a" / manifest.FILE_NAME).unlink()
    assert fill(tmp_path, NEEDS_WORTH, (SPEEDS, WORTH)).entries == report.entries
    assert len(fill(tmp_path, NEEDS_WORTH, (SPEEDS, WORTH), cache__only=True).entries) == 3


def test_cache_alone_needs_no_logs(filled: Path):
    shutil.rmtree(filled / "logs")
    report = fill(filled, cache__only=True, scenario_filter__logs=[LOGS[1]])
    assert len(report.entries) == 4 and report.computed == 0


def test_cache_alone_names_what_a_scenario_lacks(filled: Path):
    token = Cache(filled / "cache").manifest()[0].scenario.token
    with pytest.raises(
        UserError,
        match=rf"^scenario {token} \(.*{token}\.npz\) lacks places; remove that file, if there is one, and have it",
    ):
        fill(filled, WIDER, cache__only=True)


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_cache_alone_names_a_file_that_is_not_what_was_noted(change: str, filled: Path):
    path = first_file(filled)
    path.unlink() if change == "gone" else path.write_bytes(b"short")
    with pytest.raises(UserError, match=rf"^scenario {path.stem} .* has no file, or one that has changed since"):
        fill(filled, cache__only=True)


def test_cache_alone_needs_a_finished_cache(tmp_path: Path):
    with pytest.raises(UserError, match=r"is no finished cache: it has no manifest\.csv; run --mode cache$"):
        fill(tmp_path, cache__only=True)


def test_single_rows_lie_beside_whole_scenarios(filled: Path):
    assert fill(filled, scenario_filter__expand=True).computed == 100
    rows = fill(filled, cache__only=True, scenario_filter__expand=True)
    assert len(rows.entries) == 100 and {entry.scenario.rows for entry in rows.entries} == {1}
    assert len(fill(filled, cache__only=True).entries) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache__path": ""}, "cache.path is empty; give the folder"),
        ({"cache__only": True, "cache__force": True}, "cache.only computes nothing, and cache.force asks for it"),
        ({"cache__only": True, "cache__clean": True}, "cache.only computes nothing, and cache.clean asks for it"),
        ({"cache__profile": True, "cache__workers": 2}, "cache.profile is of one process: --cache.workers 0"),
        ({"logs__path": "", "logs__maps": []}, "logs.maps is \\[\\]; name a map to simulate"),
        ({"split__valid": 0.5, "split__test": 0.5}, "split.valid and split.test are 0.5 and 0.5; below 1 together"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        fill(tmp_path, **changes)


def test_second_process_is_kept_out(filled: Path):
    with (filled / "cache" / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being filled by another process"):
            fill(filled)


def test_folder_without_logs_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="where there are no logs, files NAME.npz"):
        fill(tmp_path)


def test_log_of_another_name_is_refused(tmp_path: Path):
    logs = write_logs(tmp_path, "one")
    logs.log_path("one").rename(logs.log_path("two"))
    with pytest.raises(UserError, match=r"two\.npz holds the log 'one'; a log's file is called like the log"):
        logs.open("two")


def test_log_without_its_map_is_refused(tmp_path: Path):
    logs = write_logs(tmp_path, "one")
    logs.map_path("crossing").unlink()
    with pytest.raises(UserError, match=r"crossing\.npz"):
        LogFolder(logs.folder).open("one")


def test_cache_that_cannot_be_written_is_one_line(tmp_path: Path):
    write_logs(tmp_path, *LOGS)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache cannot be filled \(File exists\)"):
        fill(tmp_path)


def test_part_that_nothing_builds_is_named():
    with pytest.raises(
        UserError, match="the model needs 'eg' of its samples, which nothing builds; the nearest is 'ego'"
    ):
        chosen(Needs(("eg",), ()), KNOWN)


def test_read_gives_what_is_asked_for_and_refuses_the_rest(filled: Path):
    cache = Cache(filled / "cache")
    one = cache.manifest()[0].scenario
    assert cache.read(one, (SPEEDS,)).keys() == {"ego", "is_first", "is_last", "is_terminal"}
    with pytest.raises(UserError, match=rf"^scenario {one.token} .* lacks places"):
        cache.read(one, (PLACES,))
    wider = dataclasses.replace(SPEEDS, arrays={"ego": Spec((7,), np.float32)})
    with pytest.raises(UserError, match=r"has float32 of shape \[\d+, 6\] as ego, where float32 of shape \[\d+, 7\]"):
        cache.read(one, (wider,))


@pytest.mark.parametrize(
    ("samples", "fault"),
    [
        ({"ego": np.full((2, 6), np.inf, np.float32)}, "has a number that is not finite in ego"),
        ({"ego": np.zeros((3, 6), np.float32)}, r"has float32 of shape \[3, 6\] as ego"),
        ({"ego": np.zeros((2, 6))}, r"has float64 of shape \[2, 6\] as ego"),
        ({}, "has nothing as ego"),
    ],
)
def test_read_refuses_what_no_cache_writes(samples: dict[str, np.ndarray], fault: str, tmp_path: Path):
    cache = Cache(tmp_path)
    cache.write(scenario(), samples, (SPEEDS,))
    with pytest.raises(UserError, match=fault):
        cache.read(scenario(), (SPEEDS,))


@pytest.mark.parametrize("change", ["cut", "flipped"])
def test_read_names_a_damaged_file_and_what_to_do(change: str, filled: Path):
    cache = Cache(filled / "cache")
    path, content = first_file(filled), bytearray(first_file(filled).read_bytes())
    place = len(content) // 2
    if change == "cut":
        del content[place:]
    else:
        content[place] ^= 0x55
    path.write_bytes(content)
    (one,) = (entry.scenario for entry in cache.manifest() if entry.scenario.token == path.stem)
    with pytest.raises(UserError, match=rf"^scenario {one.token} .*remove that file, if there is one, .*--mode cache"):
        cache.read(one, (SPEEDS, CHOICES))


def test_profile_tells_where_the_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_logs(tmp_path, *LOGS)
    fill(tmp_path, cache__profile=True)
    told = capsys.readouterr().err
    assert "function calls" in told and "tottime" in told
    fill(tmp_path)
    assert "function calls" not in capsys.readouterr().err


def test_read_loads_no_pickle(tmp_path: Path):
    cache, path = Cache(tmp_path), scenario().path(tmp_path)
    path.parent.mkdir(parents=True)
    np.savez(path, layout=1, parts=np.array(["speeds:1"]), ego=np.array([object()]), allow_pickle=True)
    with pytest.raises(UserError, match="holds what is no array of plain values"):
        cache.read(scenario(), (SPEEDS,))
    np.savez(path, layout=1, parts=np.array([1]), ego=np.zeros((2, 6), np.float32))
    with pytest.raises(UserError, match="has parts that are no names"):
        cache.read(scenario(), (SPEEDS,))


KILLED = """
import sys
from pathlib import Path
from scenarios import caching
from tests.scenario_scenes import KNOWN, NEEDS, scenario_settings
if __name__ == "__main__":
    caching.fill(scenario_settings(Path(sys.argv[1]), cache__workers=2), NEEDS, KNOWN, seed=0)
"""


@pytest.mark.run
def test_killed_processes_are_gone_on_from_to_the_same_files(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    names = [f"a-0-{60 * number:05d}" for number in range(12)]
    for folder in (whole, killed):
        write_logs(folder, *names, frames=100)
    assert fill(whole).computed == 120
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command, environment = [sys.executable, str(script), str(killed)], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((killed / "cache").glob("*/*/[!.]*.npz")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < fill(killed).computed < 120
    assert contents(killed) == contents(whole)
