from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compare
import config
from comparing import curves
from comparing.runs import CONFIG_FILE, Series
from config import Config, ConfigError
from training.logger import Logger
from training.run_facts import save_run_facts

ROOT = Path(compare.__file__).parent


def write_run(logdir: Path, gaps: list[float], *, seed: int, rate: float = 1.0) -> Path:
    """A finished run with a gap after every 100 env steps, which take a minute."""
    logdir.mkdir(parents=True)
    config.save(Config({"seed": seed, "logdir": str(logdir), "actor": {"rate": rate}}), logdir / CONFIG_FILE)
    logger = Logger(logdir)
    for index, gap in enumerate(gaps):
        values = {"train_return": -gap / 10, "model_skips_max": index, "rollbacks_max": 0}
        logger.scalars(100 * index, 60.0 * index, {"valid_gap": gap, "valid_return": -gap, **values})
    logger.scalars(100 * (len(gaps) - 1), 60.0 * (len(gaps) - 1), {"eval_gap": gaps[-1] + 1})
    logger.close()
    return logdir


def write_foreign(logdir: Path, metrics: dict[str, list[float]]) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(logdir)) as writer:
        for name, values in metrics.items():
            for step, value in enumerate(values):
                writer.add_scalar(name, value, step)
    return logdir


def series(steps: list[float], values: list[float]) -> Series:
    return Series(np.array(steps), np.array(steps) / 100, np.array(values))


def loaded(*paths: Path) -> list[compare.Run]:
    return compare.load([str(path) for path in paths], {})


@pytest.fixture
def six(tmp_path):
    """Three seeds of two agents."""
    for seed in range(3):
        write_run(tmp_path / "logdir" / f"slow-seed{seed}", [100.0, 12.0, 6.0 + seed], seed=seed)
        write_run(tmp_path / "logdir" / f"fast-seed{seed}", [100.0, 5.0 + seed, 2.0], seed=seed, rate=2.0)
    return tmp_path / "logdir"


def row_of(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_compare_prints_the_table_by_hand(six, tmp_path, capsys):
    compare.main([f"{six}/*", "--gaps", "6,0.5", "--at-steps", "100", "--out", str(tmp_path / "a.png")])
    table = capsys.readouterr().out
    assert row_of(table, "  ") == ["fast", "slow"]
    assert row_of(table, "seeds") == ["0, 1, 2", "0, 1, 2"]
    assert row_of(table, "runs") == ["3 finished", "3 finished"]
    assert row_of(table, "actor.rate") == ["2.0", "1.0"]
    assert row_of(table, "last gap, %") == ["2.00", "7.00 [6.00 to 8.00]"]
    assert row_of(table, "test gap, %") == ["3.00", "8.00 [7.00 to 9.00]"]
    assert row_of(table, "gap at 100 env steps, %") == ["6.00 [5.00 to 7.00]", "12.00"]
    # Seeds 0 and 1 of the fast agent are there after 100 steps, its seed 2 after 200; of the slow one only seed 0 is.
    assert row_of(table, "env steps to gap 6 %") == ["133 [100 to 200]", "200 (1 of 3)"]
    assert row_of(table, "minutes to gap 0.5 %") == ["-", "-"]
    assert row_of(table, "skipped updates") == ["2", "2"]


def test_compare_json_is_one_object_and_nothing_else(six, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    compare.main([f"{six}/*", str(tmp_path / "empty"), "--json", "--out", str(tmp_path / "a.png")])
    told = json.loads(capsys.readouterr().out)
    fast, slow = told["groups"]
    assert (fast["name"], fast["seeds"], slow["name"]) == ("fast", [0, 1, 2], "slow")
    assert slow["quantities"]["last gap, %"] == {"iqm": 7.0, "low": 6.0, "high": 8.0, "values": [6.0, 7.0, 8.0]}
    assert told["config_differences"] == {"actor.rate": {"fast": "2.0", "slow": "1.0"}}
    assert told["left_out"] == {str(tmp_path / "empty"): "has neither metrics.jsonl nor event files"}


def test_compare_names_what_it_leaves_out_and_goes_on(six, tmp_path, capsys):
    broken = six / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text("{{{\n")
    compare.main([f"{six}/*", str(tmp_path / "none"), "--out", str(tmp_path / "a.png")])
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"compare.py: {broken} is left out: metrics.jsonl: 1 of 1 lines left out, the first is line 1",
        f"compare.py: {tmp_path}/none is left out: does not exist",
    ]
    assert row_of(out, "  ") == ["fast", "slow"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare"),
        (["none"], "no run is left to compare"),
        (["--group", "dreamer"], "--group is 'dreamer'; write NAME=PATH"),
        (["six", "--group", "fast=logdir/slow*"], "another group is called fast already"),
        (["six", "--out", "a.txt"], "--out is a.txt; its suffix must be one of"),
        (["six", "--out", "none/a.png"], "No such file or directory: 'none/a.png'"),
    ],
)
def test_compare_refuses_in_one_line(six, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(six) if argument == "six" else argument for argument in arguments])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert last.startswith("compare.py: ") and message in last


@pytest.mark.parametrize("out", ["none/a.png", "a.txt"])
def test_compare_prints_the_table_though_there_is_no_picture(six, tmp_path, capsys, out):
    with pytest.raises(SystemExit):
        compare.main([str(six), "--out", str(tmp_path / out)])
    told, error = capsys.readouterr()
    assert row_of(told, "last gap, %") == ["2.00", "7.00 [6.00 to 8.00]"]
    assert "Picture:" not in told and out in error


@pytest.mark.parametrize("out", ["none/a.png", "a.txt"])
def test_compare_prints_json_though_there_is_no_picture(six, tmp_path, capsys, out):
    with pytest.raises(SystemExit):
        compare.main([str(six), "--json", "--out", str(tmp_path / out)])
    text, error = capsys.readouterr()
    told = json.loads(text)
    assert len(told["groups"]) == 2 and told["picture"] is None
    assert "there is no picture" in told["notes"][-1] and out in told["notes"][-1]
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--gaps", "5;2"], ["--bands", "nan"], ["--phases", "0"]])
def test_compare_refuses_numbers_that_are_none(capsys, arguments):
    with pytest.raises(SystemExit):
        compare.main(["logdir", *arguments])
    assert f"argument {arguments[0]}: {arguments[1]!r} is no" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.run
def test_compare_six_runs_take_seconds_and_no_torch(six, tmp_path):
    """Processor time, since the clock on the wall tells how busy the machine is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys, compare; compare.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, f"{six}/*", "--out", str(tmp_path / "a.png")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_load_takes_each_run_once(six):
    assert len(loaded(six, six / "fast-seed0", Path(f"{six}/fast*"))) == 6


def test_load_takes_brackets_in_a_folder_as_they_stand(tmp_path):
    assert len(loaded(write_run(tmp_path / "a[1]", [1.0], seed=0))) == 1


def test_group_runs_goes_by_config_whatever_the_names(tmp_path):
    first = write_run(tmp_path / "base", [1.0], seed=0)
    second = write_run(tmp_path / "again", [1.0], seed=1)
    other = write_run(tmp_path / "base-seed1", [1.0], seed=1, rate=2.0)
    groups = compare.group_runs(loaded(first, second, other))
    assert [(group.name, group.seeds) for group in groups] == [("base = again", [0, 1]), ("base", [1])]


def test_group_runs_gives_every_group_a_name_of_its_own(tmp_path):
    runs = [write_run(tmp_path / f"a-seed{seed}", [1.0], seed=seed, rate=seed) for seed in range(3)]
    assert [group.name for group in compare.group_runs(loaded(*runs))] == ["a", "a (2)", "a (3)"]


def with_config(logdir: Path, seed: int, **settings: object) -> Path:
    write_run(logdir, [1.0], seed=seed)
    whole = {"seed": seed, "logdir": str(logdir), "task": "tsp", "lr": 1.0, **settings}
    config.save(Config(whole), logdir / CONFIG_FILE)
    return logdir


def test_group_runs_takes_a_config_from_before_a_key_came_as_equal(tmp_path, capsys):
    old = with_config(tmp_path / "a-seed0", 0)
    new = with_config(tmp_path / "a-seed1", 1, tau=0.5)
    groups = compare.group_runs(loaded(old, new))
    assert [(group.name, group.seeds) for group in groups] == [("a", [0, 1])]
    assert compare.config_differences(groups) == {}
    compare.main([str(old), str(new), "--out", str(tmp_path / "a.png")])
    assert "Note: not compared where a run's config lacks them, being older perhaps: tau." in capsys.readouterr().out


def test_group_runs_still_tells_values_of_the_new_key_apart(tmp_path):
    old = [with_config(tmp_path / f"base-seed{seed}", seed) for seed in range(2)]
    new = with_config(tmp_path / "base-seed2", 2, tau=0.5)
    other = with_config(tmp_path / "tau-seed0", 0, tau=0.9)
    groups = compare.group_runs(loaded(*old, other, new))
    assert [(group.name, group.seeds) for group in groups] == [("base", [0, 1, 2]), ("tau", [0])]
    assert compare.config_differences(groups) == {"tau": {"base": "0.5", "tau": "0.9"}}


def test_group_runs_keeps_a_run_apart_that_fits_several_groups(tmp_path):
    old = [with_config(tmp_path / f"old-seed{seed}", seed) for seed in range(2)]
    new = [with_config(tmp_path / f"tau{tau}", 2, tau=tau) for tau in (5, 9)]
    groups = compare.group_runs(loaded(*new, *old))
    assert [(group.name, group.seeds) for group in groups] == [("tau5", [2]), ("tau9", [2]), ("old", [0, 1])]


def test_group_runs_does_not_mix_configs_of_different_codes(tmp_path):
    ours = with_config(tmp_path / "ours", 0)
    theirs = write_run(tmp_path / "theirs", [1.0], seed=1)
    config.save(Config({"seed": 1, "env": "tsp", "rate": 1.0}), theirs / CONFIG_FILE)
    assert len(compare.group_runs(loaded(ours, theirs))) == 2


def test_group_runs_goes_by_name_where_there_is_no_config(tmp_path):
    names = ("ppo_seed1", "ppo_seed2", "dqn_20", "dqn_50")
    groups = compare.group_runs(loaded(*[write_foreign(tmp_path / name, {"loss": [1.0]}) for name in names]))
    assert [(group.name, group.seeds) for group in groups] == [("ppo", [1, 2]), ("dqn_20", [None]), ("dqn_50", [None])]


def test_named_groups_are_the_users(six, tmp_path, capsys):
    arguments = [
        "--group",
        f"ours={six}/fast*",
        "--group",
        f"theirs={six}/slow*",
        "--group",
        f"theirs={six}/fast-seed0",
    ]
    compare.main([*arguments, "--out", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert row_of(out, "seeds") == ["0, 1, 2", "0, 0, 1, 2"]
    assert row_of(out, "actor.rate") == ["2.0", "1.0 or 2.0"]
    assert "Note: theirs: several runs have seed 0, and count as if they were independent." in out


def test_compare_says_that_returns_are_of_different_metrics(tmp_path, capsys):
    ours = write_run(tmp_path / "ours", [1.0, 2.0], seed=0)
    foreign = write_foreign(tmp_path / "sb3_seed1", {"rollout/ep_rew_mean": [1.0, 3.0], "time/fps": [9.0, 9.0]})
    compare.main([str(ours), str(foreign), "--out", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert row_of(out, "return is") == ["valid_return", "rollout/ep_rew_mean"]
    assert row_of(out, "best return") == ["-1", "3"]
    assert "Note: returns are taken from different metrics: rollout/ep_rew_mean, valid_return." in out


def test_compare_takes_runs_without_any_return(tmp_path, capsys):
    compare.main([str(write_foreign(tmp_path / "a", {"loss": [1.0, 2.0]})), "--out", str(tmp_path / "a.png")])
    assert row_of(capsys.readouterr().out, "env steps") == ["1"]


def test_compare_takes_seeds_that_are_no_numbers(tmp_path, capsys):
    for index, seed in enumerate(["words", 1, {"a": 1}, {"a": 1}]):
        logdir = write_run(tmp_path / "logdir" / str(index), [1.0], seed=0)
        config.save(Config({"seed": seed, "rate": 1}), logdir / CONFIG_FILE)
    compare.main(["--group", f"all={tmp_path}/logdir", "--out", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert row_of(out, "seeds") == ["1, ?, ?, ?"]
    assert "seed is 'words', which is no whole number" in out


@pytest.mark.parametrize("name", [r"$\foo$", "$", r"a\$b$c", "$x_1$"])
def test_draw_takes_dollars_in_a_name_as_they_stand(tmp_path, name):
    curves.draw({name: [series([0.0, 100.0], [9.0, 1.0])]}, tmp_path / "a.png", label="return", log_scale=False)
    assert (tmp_path / "a.png").exists()


def test_draw_writes_a_picture_with_both_axes(tmp_path):
    groups = {"a": [series([0.0, 100.0], [9.0, 1.0]), series([0.0, 100.0], [7.0, 1.0])], "none": []}
    curves.draw(groups, tmp_path / "a.png", label="gap, %", log_scale=True)
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert image.shape == (660, 1500, 3)
    # The group's colour is on either half, and no other group's is.
    blue = (image == np.array([0x00, 0x72, 0xB2])).all(-1)
    assert blue[100:, :750].any() and blue[100:, 750:].any()
    assert not (image == np.array([0xD5, 0x5E, 0x00])).all(-1).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_draw_says_in_one_line_that_numbers_are_too_large_for_a_picture(tmp_path):
    with pytest.raises(ConfigError, match=r"a.png cannot be drawn \("):
        curves.draw({"a": [series([0.0, 1.0], [-1.7e308, 1.7e308])]}, tmp_path / "a.png", label="", log_scale=False)


def test_curve_is_the_mean_where_all_seeds_are():
    one = series([0.0, 100.0, 200.0], [0.0, 10.0, 20.0])
    two = series([50.0, 150.0, 300.0], [7.0, 17.0, 3.0])
    grid, mean, low, high = curves.curve([one, two], "steps")
    assert grid.tolist() == [50.0, 100.0, 150.0, 200.0]
    # At 200 the second is a third of its way from 17 to 3.
    assert mean.tolist() == pytest.approx([6.0, 11.0, 16.0, (20 + 17 - 14 / 3) / 2])
    assert (low[0], high[0]) == (5.0, 7.0)


def test_curve_passes_over_what_is_not_finite():
    grid, mean, _, _ = curves.curve([series([0.0, 1.0, 2.0], [1.0, np.nan, 3.0])], "steps")
    assert (grid.tolist(), mean.tolist()) == ([0.0, 2.0], [1.0, 3.0])


def test_curve_of_seeds_apart_from_each_other_is_empty():
    grid, mean, _, _ = curves.curve([series([0.0, 1.0], [1.0, 2.0]), series([5.0, 6.0], [1.0, 2.0])], "steps")
    assert len(grid) == len(mean) == 0


@pytest.mark.run
def test_runs_of_another_program_or_of_other_flags_are_no_seeds_of_ours(tmp_path: Path):
    settings = config.load(Path(compare.__file__).with_name("configs.yaml"), ["debug"], {})
    made = [
        ("ours", ["dreamer.py"], {}),
        ("again", ["dreamer.py"], {}),
        ("theirs", ["peer.py"], {}),
        ("tuned", ["peer.py"], {"epochs": "4"}),
    ]
    for seed, (name, argv, flags) in enumerate(made):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 10, "seconds": 1.0, "valid_return": 1.0}\n')
        save_run_facts(folder, settings.replace(seed=seed), argv, defaults=settings, flags=flags)
    groups = compare.group_runs(compare.load([str(tmp_path)], {}))
    assert sorted(sorted(map(str, group.seeds)) for group in groups) == [["0", "1"], ["2"], ["3"]]
    differences = compare.config_differences(groups)
    assert set(differences) == {"program", "epochs"}


def test_setting_that_was_changed_while_a_run_went_on_is_marked(six: Path):
    change = {"step": 100, "key": "actor.rate", "was": 2.0, "now": 1.0}
    (six / "slow-seed2" / "run.json").write_text(json.dumps({"changes": [change]}))
    groups = compare.group_runs(compare.load([str(six)], {}))
    assert [group.seeds for group in groups] == [[0, 1, 2], [0, 1], [2]]
    values = compare.config_differences(groups)["actor.rate"]
    assert values == {"fast": "2.0", "slow": "1.0", "slow (2)": "2.0, from step 100 on 1.0"}
    (remark,) = compare.remarks(groups)
    assert "slow-seed2: went on at step 100 with actor.rate 1.0 (was 2.0)" in remark


def test_run_whose_program_cannot_be_read_is_told_of(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "seconds": 1.0, "valid_return": 1.0}\n')
    (tmp_path / "run.json").write_text("{")
    (run,) = compare.load([str(tmp_path)], {})
    assert run.made_by == {}
    assert "run.json cannot be read" in run.notes[0]
