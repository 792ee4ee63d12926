"""Code that the config of a received run or weights file names is not run unless the user says so."""

from __future__ import annotations

import ast
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import config
import dreamer
import export
import sac
import solve
from config import CODE_KEYS, ConfigError, require_trust
from guard import Guard
from tests.library import library_paths
from tests.scenes import debug_config
from training import setup
from training.devices import make_generators

CPU = torch.device("cpu")
ROOT = Path(dreamer.__file__).parent
NAMED: dict[str, Any] = {
    "import": "payload",
    "cost": "payload:toll",
    "imag_reward": "payload:reward",
    "language.reward": "payload:reward",
    "logger": "tensorboard,payload:reward",
    "task": "gym_payload:Own-v0",
    "env.kwargs": "{reward: 'payload:reward'}",
}
PAYLOAD = """
from pathlib import Path
Path({marker!r}).touch()
def toll(origin, target, factors):
    return (target - origin).norm(dim=-1)
def reward(instance, state, action):
    return -toll(instance.coords[..., 0, :], instance.coords[..., 1, :], None)
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once the received module has been imported."""
    path, folder = tmp_path / "executed", tmp_path / "received"
    folder.mkdir()
    (folder / "payload.py").write_text(PAYLOAD.format(marker=str(path)))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return path


def write_weights(path: Path, *, agent: dict[str, object] | None = None, **changes: Any) -> Path:
    """Weights, or none, with their config."""
    settings = debug_config(**changes)
    path.parent.mkdir(exist_ok=True)
    checkpoint.save(path, {"config": settings.to_dict(), "agent": agent or {}, "step": 0})
    return path


def write_run(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    checkpoint.save(folder / checkpoint.LATEST, {"agent": {}, "step": 0})
    config.save(debug_config(**changes), folder / "config.yaml")
    return folder


def trained_weights() -> dict[str, object]:
    settings = debug_config()
    task, generators = setup.make_task(settings), make_generators(0, CPU)
    agent = dreamer.Dreamer.of(task, settings, device=CPU, generators=generators, guard=Guard(CPU))
    return dict(agent.acting_weights())


def refusal(capsys: pytest.CaptureFixture[str], main, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("key", CODE_KEYS)
def test_solve_runs_no_code_that_a_weights_file_names(
    key: str, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_weights(tmp_path / "friend.pt", **{key: NAMED[key]})
    line = refusal(capsys, solve.main, path, "--random", 2, "--device", "cpu")
    assert str(path) in line and f"{key} is {NAMED[key]!r}" in line and "--trust" in line
    assert not marker.exists()


@pytest.mark.parametrize("main", [dreamer.main, sac.main])
@pytest.mark.parametrize("key", CODE_KEYS)
def test_evaluate_runs_no_code_that_a_logdir_names(
    key: str, main, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "friend", **{key: NAMED[key]})
    line = refusal(capsys, main, "--evaluate", run, "--device", "cpu")
    assert (
        f"{key} is {NAMED[key]!r}" in line and f"--{key} {shlex.quote(NAMED[key])}" in line and "--trust true" in line
    )
    assert not marker.exists()


def test_export_refuses_named_code_before_it_writes(
    marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "friend", imag_reward=NAMED["imag_reward"])
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    assert "imag_reward" in refusal(capsys, export.main, run, tmp_path / "mine" / "own.pt")
    assert not marker.exists() and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("consent", [("--imag_reward", NAMED["imag_reward"]), ("--trust", "true")])
def test_evaluate_runs_code_that_the_user_names_or_trusts(
    consent: tuple[str, str], marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "own", imag_reward=NAMED["imag_reward"], imag_gradient="reinforce")
    line = refusal(capsys, dreamer.main, "--evaluate", run, "--device", "cpu", *consent)
    # The file holds no weights; only what stands before them was of interest.
    assert "does not fit this config" in line
    assert marker.exists()


def test_evaluate_refuses_named_code_where_the_user_names_other_code(
    marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "friend", imag_reward=NAMED["imag_reward"])
    line = refusal(capsys, dreamer.main, "--evaluate", run, "--imag_reward", "math:exp", "--device", "cpu")
    assert f"imag_reward is {NAMED['imag_reward']!r}" in line
    assert not marker.exists()


def test_solve_runs_named_code_with_trust(marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_weights(tmp_path / "own.pt", agent=trained_weights(), imag_reward=NAMED["imag_reward"])
    solve.main([str(path), "--random", "1", "--device", "cpu", "--trust"])
    assert marker.exists() and "random-0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "size", ["model__units", "model__rssm__deter", "actor__pointer__hidden", "actor__pointer__latent", "critic__units"]
)
def test_solve_refuses_sizes_that_the_weights_do_not_have_before_they_take_memory(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_weights(tmp_path / "friend.pt", agent=trained_weights(), **{size: 10**8})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "does not fit this config" in refusal(capsys, solve.main, path, "--random", 1, "--device", "cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_solve_refuses_a_seed_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_weights(tmp_path / "friend.pt", agent=trained_weights(), seed=-1)
    assert "seed is -1; it must be" in refusal(capsys, solve.main, path, "--random", 1, "--device", "cpu")


def test_solve_refuses_layers_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_weights(tmp_path / "friend.pt", agent=trained_weights(), actor__pointer__layers=10**9)
    line = refusal(capsys, solve.main, path, "--random", 1, "--device", "cpu")
    assert "actor.pointer.layers is 1e+09; it must be between 1 and 1000" in line


def test_trust_takes_true_or_false(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--trust is 'maybe'" in refusal(capsys, dreamer.main, "--evaluate", tmp_path, "--trust", "maybe")


def test_require_trust_lets_ordinary_configs_pass_and_others_not() -> None:
    ordinary = debug_config(task="gym_CartPole-v1", cost="lanes")
    require_trust(ordinary, Path("run"), given=None, trust=False)
    with pytest.raises(ConfigError, match="cost is"):
        require_trust(ordinary.replace(cost="own:toll"), Path("run"), given=None, trust=False)


def test_require_trust_shows_values_of_any_type_on_one_line() -> None:
    settings = config.Config({**debug_config().to_dict(), "import": ["a\nb"]})
    with pytest.raises(ConfigError, match="import is") as refused:
        require_trust(settings, Path("run"), given=None, trust=False)
    assert "\n" not in str(refused.value)


def test_every_key_whose_value_is_loaded_as_code_is_listed() -> None:
    keys = set()
    for path in library_paths():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "load_function":
                keys |= {ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == "key"}
            if isinstance(node, ast.Attribute) and node.attr == "import_module":
                # These import functions by name, and modules that register environments: keys import and task.
                assert path.name in ("named_code.py", "gym_tasks.py")
    assert keys == {"cost", "imag_reward", "language.reward", "logger"} < CODE_KEYS.keys()
