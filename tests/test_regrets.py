"""The picture of what runs paid while they learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import regrets


def run(folder: Path, *, cost: str, regret: list[float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"cost: {cost}\n")
    lines = [{"step": 100 * k, "seconds": 1.0 * k, "regret": value} for k, value in enumerate(regret)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{"step": 0, "seconds": 0.0}, *lines])
    )
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
    (tmp_path / "file.pt").write_bytes(b"weights")
    run(tmp_path / "silent", cost="lanes", regret=[])
    causes = {"silent": "has logged no regret", "none": "is no folder", "file.pt": "is no folder"}
    for name, cause in causes.items():
        with pytest.raises(SystemExit):
            regrets.main([str(tmp_path / name), "--out", str(tmp_path / "regret.png")])
        assert cause in capsys.readouterr().err


@pytest.mark.parametrize("name", ["regret.xyz", "regret", "."])
def test_picture_has_to_be_called_one(tmp_path: Path, capsys, name: str):
    paid = run(tmp_path / "paid", cost="lanes", regret=[90.0])
    with pytest.raises(SystemExit):
        regrets.main([str(paid), "--out", str(tmp_path / name)])
    assert "ends in .png" in capsys.readouterr().err
