"""The picture of what runs paid while they learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import regrets


def run(folder: Path, *, cost: str, regret: list[float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"cost: {cost}\n")
    lines = [{"step": 100 * k, "regret": value} for k, value in enumerate(regret)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]))
    return folder


def test_picture_tells_what_each_run_has_paid(tmp_path: Path, capsys):
    first, second = (
        run(tmp_path / cost, cost=cost, regret=[90.0, 30.0, end]) for cost, end in (("a", 7.0), ("b", 8.0))
    )
    regrets.main([str(first), str(second), "--out", str(tmp_path / "pictures" / "regret.png")])
    assert (tmp_path / "pictures" / "regret.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert f"{first}: 7.0 % after 200 env steps" in said and f"{second}: 8.0 % after 200 env steps" in said


def test_run_without_regret_is_named(tmp_path: Path, capsys):
    silent = run(tmp_path / "silent", cost="lanes", regret=[])
    for path, cause in ((silent, "has logged no regret"), (tmp_path / "none", "is no folder of a run")):
        with pytest.raises(SystemExit):
            regrets.main([str(path), "--out", str(tmp_path / "regret.png")])
        assert cause in capsys.readouterr().err
