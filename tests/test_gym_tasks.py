"""Environments made by the name of their task."""

import gymnasium
import pytest

from config import UserError
from envs.gym_tasks import make_gym


def test_make_gym_makes_the_environment_of_the_task():
    env = make_gym("gym_CartPole-v1", imports="", render_mode="rgb_array")()
    assert env.spec is not None and env.spec.id == "CartPole-v1" and env.render_mode == "rgb_array"
    env.close()


def test_make_gym_imports_modules_that_register_ids(tmp_path, monkeypatch):
    register = "import gymnasium\ngymnasium.register('Own-v0', entry_point='test_own_module:Own')\n"
    (tmp_path / "test_own_module.py").write_text(register + "class Own(gymnasium.Env): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        make_gym("gym_Own-v0", imports="math, test_own_module")
        assert gymnasium.spec("Own-v0").entry_point == "test_own_module:Own"
    finally:
        gymnasium.registry.pop("Own-v0")


@pytest.mark.parametrize(
    ("task", "imports", "message"),
    [
        ("gym_CartPol-v1", "", "no environment is registered as 'CartPol-v1'; did you mean CartPole-v1"),
        ("gym_CartPole-v7", "", "'CartPole-v7'; did you mean CartPole-v"),
        ("gym_zzzzzz", "", "'zzzzzz'; import the module that registers it"),
        ("gym_CartPole-v1", "math,no_such_module", "module 'no_such_module' cannot be imported"),
        ("gym_CartPole-v1", "./own.py", "module './own.py' cannot be imported .*; it needs to be the name of a module"),
    ],
)
def test_make_gym_refuses_unknown_names_in_one_line(task, imports, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make_gym(task, imports=imports)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import sys; sys.exit()", UserError, "'own_code' cannot be imported .*ends the program"),
        ("def broken(:", UserError, "'own_code' cannot be imported"),
        ("int('one')", ValueError, "invalid literal"),
    ],
)
def test_make_gym_keeps_what_the_code_of_a_module_raises(code, error, message, tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=message) as raised:
        make_gym("gym_CartPole-v1", imports="own_code")
    assert isinstance(raised.value, UserError) == (error is UserError)
