import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from envs.routing import TSPEnv, TSPRules, tour_length
from envs.vector import RoutingVectorEnv


class ShortcutRules(TSPRules):
    """Tours that may close at any time, so that episodes differ in length, with a fee for each leg."""

    fixed_length = False

    @staticmethod
    def action_mask(state):
        return TSPRules.action_mask(state) | torch.nn.functional.one_hot(state.first, state.visited.shape[-1]).bool()

    @staticmethod
    def step(state, action):
        next_state, _ = TSPRules.step(state, action)
        return next_state, action == state.first

    @classmethod
    def cost(cls, instance, state, action, factors=None):
        # Staying put costs something too, so that a row which is reset shows whether it was charged.
        return TSPRules.cost(instance, state, action) + 1

    @staticmethod
    def observe(instance, state):
        return TSPRules.observe(instance, state) | {"action_mask": ShortcutRules.action_mask(state)}


def vector_env(*, rules=TSPRules, num_envs=4, num_nodes=5, seed=0, **keywords):
    if "instances" not in keywords:
        keywords["generator"] = torch.Generator().manual_seed(seed)
    return RoutingVectorEnv(rules, num_envs=num_envs, num_nodes=num_nodes, device="cpu", **keywords)


def highest_legal(obs):
    mask = obs["action_mask"]
    return mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = list(first.values()), list(second.values())
    if isinstance(first, tuple | list):
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    else:
        assert first == second


def test_vector_env_equals_tsp_env_step_by_step():
    env = vector_env(check_actions=True)
    singles = [TSPEnv(num_nodes=5) for _ in range(4)]
    for _ in range(2):
        obs, info = env.reset()
        for row, single in enumerate(singles):
            np.testing.assert_equal(
                {key: value[row].numpy() for key, value in obs.items()},
                single.reset(options={"coords": obs["coords"][row].numpy()})[0],
            )
        for _ in range(5):
            actions = torch.tensor([single.action_space.sample() for single in singles])
            obs, reward, terminated, truncated, info = env.step(actions)
            for row, single in enumerate(singles):
                single_obs, *expected, single_info = single.step(actions[row])
                np.testing.assert_equal({key: value[row].numpy() for key, value in obs.items()}, single_obs)
                assert [reward[row].item(), terminated[row].item(), truncated[row].item()] == expected
                np.testing.assert_array_equal(info["action_mask"][row], single_info["action_mask"])


def test_vector_env_resets_all_rows_on_the_step_after_the_last_move():
    env = vector_env()
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP
    obs, info = env.reset()
    first_coords = obs["coords"]
    decisions, any_first, ended, rewards = [info["decisions"]], [info["any_first"]], [False], []
    for _ in range(7):
        # After the end the action is ignored, even one that is no node at all.
        actions = torch.full((4,), 99) if ended[-1] else highest_legal(obs)
        obs, reward, terminated, _, info = env.step(actions)
        assert info["is_first"].all() == info["is_first"].any() == info["any_first"]
        decisions.append(info["decisions"])
        any_first.append(info["any_first"])
        ended.append(bool(terminated.all()))
        rewards.append(reward)
        if len(decisions) == 6:
            assert obs["coords"].equal(first_coords)
    assert decisions == [0, 4, 4, 4, 4, 4, 0, 4]
    assert any_first == [True, False, False, False, False, False, True, False]
    assert ended == [False, False, False, False, False, True, False, False]
    assert rewards[5].tolist() == [0, 0, 0, 0]
    assert not obs["coords"].equal(first_coords)
    torch.testing.assert_close(sum(rewards[:5]), -tour_length(first_coords, torch.tensor([[0, 4, 3, 2, 1]] * 4)))


def test_vector_env_counts_and_resets_rows_that_end_at_different_times():
    env = vector_env(rules=ShortcutRules, num_envs=2, check_actions=True)
    start, _ = env.reset()
    # Row 0 goes to node 1 and closes its tour; row 1 goes on, and ends while row 0 is moving again.
    script = [(1, 4), (0, 3), (99, 2), (2, 0), (3, 99), (4, 1)]
    steps = [env.step(torch.tensor(actions)) for actions in script]
    assert [info["decisions"] for *_, info in steps] == [2, 2, 1, 2, 1, 2]
    assert [info["any_first"] for *_, info in steps] == [False, False, True, False, True, False]
    assert [info["is_first"].tolist() for *_, info in steps[2:5]] == [[True, False], [False, False], [False, True]]
    assert [terminated.tolist() for _, _, terminated, *_ in steps] == [
        [False, False],
        [True, False],
        [False, False],
        [False, True],
        [False, False],
        [False, False],
    ]
    after_row_0, after_row_1 = steps[2][0], steps[4][0]
    assert not after_row_0["coords"][0].equal(start["coords"][0])
    assert after_row_0["coords"][1].equal(start["coords"][1])
    assert after_row_1["coords"][0].equal(after_row_0["coords"][0])
    assert after_row_0["visited"].tolist() == [[True] + [False] * 4, [True, False, True, True, True]]
    assert [steps[2][1][0].item(), steps[4][1][1].item()] == [0, 0]
    assert all(reward.count_nonzero() == info["decisions"] for _, reward, *_, info in steps)


def test_vector_env_asks_the_rules_for_every_cost(monkeypatch):
    env = vector_env()
    obs, _ = env.reset()
    monkeypatch.setattr(TSPRules, "cost", staticmethod(lambda instance, state, action: torch.full((4,), 2.5)))
    assert env.step(highest_legal(obs))[1].tolist() == [-2.5] * 4


def test_vector_env_same_generator_seed_gives_the_same_instances():
    first, same, other = (vector_env(seed=seed).reset()[0]["coords"] for seed in (1, 1, 2))
    assert first.equal(same)
    assert not first.equal(other)
    assert vector_env(seed=2).reset(seed=1)[0]["coords"].equal(first)


def test_vector_env_runs_fixed_instances_in_every_episode():
    coords = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(3))
    env = vector_env(instances=coords)
    obs, _ = env.reset()
    returns = torch.zeros(4)
    for _ in range(5):
        assert obs["coords"].equal(coords)
        obs, reward, *_ = env.step(highest_legal(obs))
        returns = returns + reward
    torch.testing.assert_close(returns, -tour_length(coords, torch.tensor([[0, 4, 3, 2, 1]] * 4)))
    assert env.step(highest_legal(obs))[0]["coords"].equal(coords)


@pytest.mark.parametrize("rules", [TSPRules, ShortcutRules])
@pytest.mark.parametrize("steps_before", [0, 3, 5, 6])
def test_vector_env_goes_on_exactly_from_its_state_dict(rules, steps_before, tmp_path):
    env = vector_env(rules=rules)
    obs, _ = env.reset()
    for _ in range(steps_before):
        obs, *_ = env.step(highest_legal(obs))
    torch.save({"env": env.state_dict(), "generator": env.generator.get_state()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    restored = vector_env(rules=rules, seed=99)
    restored.load_state_dict(saved["env"])
    restored.generator.set_state(saved["generator"])
    assert_same(restored.observe(), obs)
    for _ in range(8):
        step, restored_step = env.step(highest_legal(obs)), restored.step(highest_legal(obs))
        assert_same(restored_step, step)
        obs = step[0]


def test_vector_env_refuses_a_state_dict_of_another_size():
    env = vector_env(num_envs=3)
    env.reset()
    with pytest.raises(ValueError, match=r"\(3, 5\), this environment \(4, 5\)"):
        vector_env(num_envs=4).load_state_dict(env.state_dict())


@pytest.mark.parametrize("action", [0, 3, 5, -1])
def test_vector_env_with_checks_names_the_row_and_stays_as_it_was(action):
    env, untouched = vector_env(check_actions=True), vector_env(check_actions=True)
    for each in (env, untouched):
        each.reset()
        each.step(torch.tensor([4, 3, 3, 1]))
    with pytest.raises(ValueError, match=rf"action {action} of row 2 is illegal; legal nodes: \[1, 2, 4\]"):
        env.step(torch.tensor([1, 2, action, 0]))
    actions = torch.tensor([1, 2, 4, 3])
    assert_same(env.step(actions), untouched.step(actions))


@pytest.mark.parametrize("action", [-1, 5])
def test_vector_env_with_checks_refuses_nodes_outside_where_the_nearest_node_is_legal(action):
    env = vector_env(num_envs=1, check_actions=True)
    env.reset()
    for node in [1, 2, 3] if action == 5 else [1, 2, 3, 4]:
        env.step(torch.tensor([node]))
    with pytest.raises(ValueError, match=f"action {action} of row 0 is illegal"):
        env.step(torch.tensor([action]))


def test_vector_env_must_be_reset_first():
    env = vector_env()
    for call in (lambda: env.step(torch.zeros(4, dtype=torch.long)), env.observe, env.state_dict):
        with pytest.raises(ResetNeeded, match="before the first episode"):
            call()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_nodes": 2}, "at least 3 nodes"),
        ({"instances": torch.zeros(4, 6, 2)}, r"shape \(4, 6, 2\), not \(4, 5, 2\)"),
        ({"instances": None}, "either a generator"),
        ({"instances": torch.zeros(4, 5, 2), "generator": torch.Generator()}, "either a generator"),
    ],
)
def test_vector_env_refuses_impossible_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        vector_env(**keywords)


def test_vector_env_refuses_reset_options():
    with pytest.raises(ValueError, match="no options, got \\['coords'\\]"):
        vector_env().reset(options={"coords": torch.zeros(4, 5, 2)})


def test_vector_env_observations_lie_in_its_spaces():
    env = vector_env()
    obs, _ = env.reset()
    assert {key: value.numpy() for key, value in obs.items()} in env.observation_space
    assert highest_legal(obs).numpy() in env.action_space
    assert env.single_action_space.n == 5


def test_vector_env_in_lockstep_never_fetches_from_the_device(monkeypatch):
    env = vector_env()
    obs, _ = env.reset()

    def refuse(*_):
        raise AssertionError("waited for the device")

    for name in ("item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for _ in range(12):
        obs, *_ = env.step(highest_legal(obs))
    monkeypatch.undo()
    assert obs["current_node"].shape == (env.num_envs,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_vector_env_keeps_everything_on_the_gpu_and_never_waits_for_it():
    generator = torch.Generator("cuda").manual_seed(0)
    env = RoutingVectorEnv(TSPRules, num_envs=4, num_nodes=5, device="cuda", generator=generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        obs, info = env.reset()
        for _ in range(12):
            obs, reward, terminated, truncated, info = env.step(highest_legal(obs))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tensors = [*obs.values(), reward, terminated, truncated, info["is_first"]]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
