import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401  (registers VRPTW-v0)
from config import UserError
from envs.routing import VRPTWEnv, tour_length
from routing.vrptw import PACE, VRPTWInstance, VRPTWRules, VRPTWState
from system import cached_files

CPU = torch.device("cpu")
# A depot in the middle of a cross, whose arms are 1, 2, 1 and 2 long; a unit of length takes 10 units of time.
CROSS = [[0, 0], [1, 0], [0, 2], [-1, 0], [0, -2]]
OWN = {
    "coords": CROSS,
    "demand": [0, 1, 1, 1, 1],
    "capacity": 4,
    "ready": [0, 0, 30, 0, 0],
    "due": [120, 15, 70, 100, 100],
    "service": [0, 5, 5, 5, 5],
    "pace": 10,
}


def own(**changes):
    env = VRPTWEnv(num_nodes=5, seed=0)
    env.reset(options=OWN | changes)
    return env


def random_instances(count, num_nodes=6, seed=0):
    return VRPTWRules.random(count, num_nodes, generator=torch.Generator().manual_seed(seed), device=CPU)


def random_states(count, seed=1, **keywords):
    instance, draws = random_instances(count, **keywords), torch.Generator().manual_seed(seed)
    states, actions = [VRPTWRules.reset(instance)], []
    while not VRPTWRules.finished(states[-1]).all():
        mask = VRPTWRules.action_mask(states[-1])
        assert mask.any(-1).all()
        actions.append(torch.multinomial(mask.float(), 1, generator=draws)[:, 0])
        states.append(VRPTWRules.step(states[-1], actions[-1])[0])
    return instance, states, actions


def is_in_time(instance: VRPTWInstance, row: int, route: list[int], *, slack: int = 0) -> bool:
    """By the definition, in float64 and without any rounding."""
    coords = instance.coords[row].double().numpy()
    pace, time, here = float(instance.pace[row]), 0.0, 0
    for node in [*route, 0]:
        time += pace * float(np.linalg.norm(coords[node] - coords[here]))
        if time > int(instance.due[row, node]) + slack:
            return False
        time = max(time, int(instance.ready[row, node])) + int(instance.service[row, node])
        here = node
    return True


def test_vrptw_rules_follow_the_clock():
    env = own()
    times, masks = [], []
    for node in (1, 3, 2, 0, 4, 0):
        masks.append(env.action_masks().astype(int).tolist())
        observation, *_ = env.step(node)
        times.append(int(observation["time"][0]))
    # At 1 after 11 (each leg is rounded up), served by 16; at 3 after 37, served by 42; at 2 after 65, just in time.
    assert times[:2] == [16, 42]
    assert masks[0] == [0, 1, 1, 1, 1]
    assert times[2:] == [70, 0, 26, 0]
    assert env.rules.finished(env._state).all()


def test_vrptw_rules_wait_for_a_window_to_open():
    env = own()
    observation, reward, *_ = env.step(2)
    # There after 21, served from 30 to 35; too late for customer 1, and everything else can still be reached.
    assert observation["time"].tolist() == [35] and reward == pytest.approx(-2)
    assert observation["action_mask"].astype(int).tolist() == [1, 0, 0, 1, 1]


def test_vrptw_rules_never_let_a_vehicle_come_home_late():
    env = own(due=[60, 15, 35, 100, 100])
    env.step(1)
    # From 1, customer 4 could be served from 39 to 44, and be back by 65.
    assert env.action_masks().astype(int).tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_vrptw_rules_accept_all_routes_that_are_in_time_and_no_other(seed):
    instance = random_instances(1, num_nodes=6, seed=seed)
    accepted = set()
    for length in range(1, 6):
        for route in itertools.permutations(range(1, 6), length):
            state, legal = VRPTWRules.reset(instance), True
            for node in route:
                legal = legal and bool(VRPTWRules.action_mask(state)[0, node])
                state, _ = VRPTWRules.step(state, torch.tensor([node]))
            if legal:
                accepted.add(route)
            if is_in_time(instance, 0, list(route), slack=-2 * (length + 1)):
                load = int(instance.demand[0, list(route)].sum())
                assert legal or load > int(instance.capacity[0])
    assert all(is_in_time(instance, 0, list(route)) for route in accepted)
    assert len(accepted) > 5


def test_vrptw_random_episodes_keep_every_window_and_visit_each_customer_once():
    instance, _, actions = random_states(64, num_nodes=21)
    tours = torch.stack(actions, -1)
    for row in range(64):
        visits = tours[row][tours[row] > 0].tolist()
        assert sorted(visits) == list(range(1, 21))
        text = " ".join(map(str, [0, *tours[row].tolist(), 0])).split(" 0")
        routes = [[int(node) for node in part.split() if node != "0"] for part in text]
        for route in routes:
            assert is_in_time(instance, row, route)
            assert int(instance.demand[row, route].sum()) <= int(instance.capacity[row])


def test_vrptw_restore_inverts_observe():
    instance, states, _ = random_states(8)
    for state in states:
        restored_instance, restored_state = VRPTWRules.restore(VRPTWRules.observe(instance, state))
        assert all(a.equal(b) for a, b in zip(restored_instance[:7], instance[:7], strict=True))
        assert restored_state.drives is state.drives is None
        assert all(a.equal(b) for a, b in zip(restored_state[:-1], state[:-1], strict=True))


def test_vrptw_random_instances_have_the_fields_distribution():
    instance = random_instances(2000, num_nodes=21)
    customers = slice(1, None)
    lasts = (instance.due - instance.ready)[:, customers] / PACE
    assert lasts.min() >= 0.18 - 1e-4 and lasts.max() <= 0.2 and lasts.mean().item() == pytest.approx(0.19, abs=1e-3)
    service = instance.service[:, customers] / PACE
    assert service.min() >= 0.15 - 1e-4 and service.max() <= 0.18
    assert instance.due[:, 0].unique().tolist() == [460_000]
    VRPTWRules.validate(instance)


def test_vrptw_field_instances_are_the_first_rows_of_one_set():
    few, more = (VRPTWRules.field_instances(count, 21, seed=1234) for count in (2, 5))
    assert all(a.equal(b[:2]) for a, b in zip(few[:7], more[:7], strict=True))


def test_vrptw_reference_is_the_best_of_all_plans(tmp_path, monkeypatch):
    monkeypatch.setattr(cached_files, "cache_folder", lambda: tmp_path)
    instance = random_instances(2, num_nodes=6, seed=3)
    lengths = VRPTWRules.reference_lengths(instance)
    for row, length in enumerate(lengths):
        one = type(instance)(*(None if part is None else part[row : row + 1] for part in instance))
        best = np.inf
        ends: list[tuple[tuple[int, ...], VRPTWState]] = [((), VRPTWRules.reset(one))]
        while ends:
            actions, state = ends.pop()
            for node in VRPTWRules.action_mask(state)[0].nonzero()[:, 0].tolist():
                after, finished = VRPTWRules.step(state, torch.tensor([node]))
                if finished:
                    best = min(best, tour_length(one.coords, torch.tensor([[0, *actions]])).item())
                else:
                    ends.append(((*actions, node), after))
        assert length == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"due": [120, 9, 70, 100, 100]}, "no vehicle can be there in time"),
        ({"due": [120, 15, 20, 100, 100]}, "its window ends before it begins"),
        ({"due": [40, 15, 70, 40, 40]}, "no vehicle can be back in time"),
        ({"service": [0, 5, 5, 5, -5]}, "times cannot be below 0"),
        ({"ready": [0, 0.5, 30, 0, 0]}, "count in smaller units of time"),
        ({"ready": [0, 0, 30]}, "one for each node"),
        ({"pace": float("nan")}, "one number from 0"),
        ({"pace": 10**6}, "count in larger units of time"),
        ({"demand": [0, 9, 1, 1, 1]}, "no vehicle can carry it"),
    ],
)
def test_vrptw_env_refuses_what_cannot_be_kept(changes, message):
    with pytest.raises((ValueError, UserError), match=message):
        own(**changes)


def test_vrptw_env_passes_gymnasiums_checker():
    # It takes an action that it drew in mid-episode for a first one: where only the depot was legal, that is none.
    check_env(gymnasium.make("VRPTW-v0", num_nodes=6, seed=0).unwrapped)


@pytest.mark.parametrize("left_out", sorted(OWN.keys() - {"capacity"}))
def test_instance_that_lacks_a_part_is_refused(left_out: str):
    env = VRPTWEnv(num_nodes=5, capacity=30)
    with pytest.raises(ValueError, match=f"needs {left_out} with it"):
        env.reset(options={name: value for name, value in OWN.items() if name != left_out})
    with pytest.raises(ValueError, match="needs coords, demand"):
        env.reset(options={"capacity": 30})
