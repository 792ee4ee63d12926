"""The travelling-salesman problem by matrices: its rules, its random class, and its environment."""

from __future__ import annotations

import itertools
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

import dreamer
import envs  # noqa: F401  (registers ATSP-v0)
from config import UserError
from envs.routing import ATSPEnv, ATSPInstance, ATSPRules
from envs.vector import RoutingVectorEnv
from routing.costs import find_costs
from routing.matrix_costs import DEAREST, WHOLE_COSTS, closed, relative
from system import cached_files
from tests.run_scenes import read_metrics
from tests.scenes import CPU, generator, without_times

# The tour 0 1 2 3 costs 1 + 2 + 3 + 4, and the other way round 8 + 7 + 6 + 5.
ONE_WAY = [[0, 1, 9, 8], [5, 0, 2, 9], [9, 6, 0, 3], [4, 9, 7, 0]]


def drawn(count: int = 3, num_nodes: int = 6) -> ATSPInstance:
    return ATSPRules.random(count, num_nodes, generator=generator(2), device=CPU)


def paid(tour: list[int], matrix: list[list[int]] = ONE_WAY) -> float:
    """What an episode costs that visits nodes in that order, from node 0 and back."""
    env = ATSPEnv(num_nodes=len(matrix))
    env.reset(options={"costs": matrix})
    return -sum(env.step(node)[1] for node in [*tour, 0])


def test_atsp_tours_cost_what_the_matrix_says_in_their_direction():
    assert paid([1, 2, 3]) == 10
    assert paid([3, 2, 1]) == 26


def test_atsp_random_matrices_keep_the_triangle_inequality_and_free_stays():
    costs = drawn(count=20, num_nodes=8).costs
    detours = (costs[:, :, :, None] + costs[:, None]).amin(2)
    torch.testing.assert_close(detours, costs)
    assert not costs.diagonal(dim1=-2, dim2=-1).any()
    assert (costs != costs.transpose(1, 2)).any() and costs.min() >= 0 and costs.max() < 1


def test_atsp_closed_costs_are_those_of_the_cheapest_ways():
    # From 0 to 3 the way over 1 and 2 costs 6, and from 3 to 1 that over 0 costs 5.
    assert closed(torch.tensor(ONE_WAY, dtype=torch.float32)).tolist() == [
        [0, 1, 3, 6],
        [5, 0, 2, 5],
        [7, 6, 0, 3],
        [4, 5, 7, 0],
    ]


def test_atsp_closed_costs_do_not_depend_on_how_many_there_are():
    costs = torch.rand(700, 12, 12, generator=generator())
    assert closed(costs)[650:].equal(closed(costs[650:]))


def test_atsp_field_instances_are_the_first_rows_of_one_set():
    few, more = (ATSPRules.field_instances(count, 20, seed=1234).costs for count in (2, 200))
    assert few.dtype == torch.float64 and few.equal(more[:2])
    whole = more * WHOLE_COSTS
    assert (whole - whole.round()).abs().max() < 1e-6


def test_atsp_reference_is_the_best_of_all_tours(tmp_path, monkeypatch):
    monkeypatch.setattr(cached_files, "cache_folder", lambda: tmp_path)
    instance = drawn(count=2)
    best = [
        min(
            sum(matrix[a, b] for a, b in itertools.pairwise([0, *order, 0]))
            for order in itertools.permutations(range(1, 6))
        )
        for matrix in instance.costs.double().numpy()
    ]
    assert ATSPRules.reference_lengths(instance).tolist() == pytest.approx(best)


def test_atsp_restore_inverts_observe():
    instance = ATSPRules.pad(drawn(), 8)
    state = ATSPRules.reset(instance)
    for node in (3, 1):
        obs = ATSPRules.observe(instance, state)
        again = ATSPRules.restore(obs)
        for parts, expected in zip(again, (instance, state), strict=True):
            for part, other in zip(parts, expected, strict=True):
                assert (part is None) == (other is None)
                assert part is None or other is None or part.equal(other)
        state, _ = ATSPRules.step(state, torch.full((3,), node))


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**9])
def test_atsp_features_do_not_depend_on_the_unit(factor: float):
    instance = drawn()
    scaled = instance._replace(costs=factor * instance.costs)
    assert ATSPRules.node_features(scaled).equal(ATSPRules.node_features(instance))


def test_atsp_features_follow_the_nodes():
    instance, order = drawn(), torch.tensor([3, 0, 5, 1, 4, 2])
    moved = ATSPInstance.of(instance.costs[:, order][:, :, order])
    torch.testing.assert_close(ATSPRules.node_features(moved), ATSPRules.node_features(instance)[:, order])


def test_atsp_features_are_of_costs_beside_their_mean():
    # The others are 9, 8, 1 from node 0 and 5, 9, 4 to it; the mean of all twelve is 6.
    features = 6 * ATSPRules.node_features(ATSPInstance.of(torch.tensor([ONE_WAY], dtype=torch.float32)))[0, 0]
    expected = [1, 8, 9, 9, 9, 6, (38 / 3) ** 0.5, 4, 5, 9, 9, 9, 6, (14 / 3) ** 0.5]
    assert features.tolist() == pytest.approx(expected, abs=1e-4)


def test_relative_costs_look_at_moves_between_real_nodes_alone():
    costs = torch.tensor([[[7.0, 1.0, torch.nan], [3.0, 7.0, 1e9], [torch.nan, 1e9, 7.0]]])
    valid = torch.tensor([[True, True, False]])
    assert relative(costs, valid).tolist() == [[[0.0, 0.5, 0.0], [1.5, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    assert not relative(costs, torch.zeros(1, 3, dtype=torch.bool)).any()


def test_relative_costs_are_bounded_and_free_moves_stay_free():
    costs = torch.ones(1, 9, 9)
    costs[0, 0, 1] = 1e8
    assert relative(costs).max() == DEAREST
    assert not relative(torch.zeros(1, 3, 3)).any()


def test_atsp_vector_env_pays_as_the_environment_does():
    instance = ATSPInstance.of(torch.tensor([ONE_WAY], dtype=torch.float32))
    env = RoutingVectorEnv(ATSPRules, num_envs=1, num_nodes=4, device=CPU, instances=instance, check_actions=True)
    env.reset()
    assert [float(env.step(torch.tensor([node]))[1]) for node in (1, 2, 3, 0)] == [-1, -2, -3, -4]


def test_atsp_env_passes_gymnasiums_checker():
    check_env(gymnasium.make("ATSP-v0", num_nodes=5, render_mode="rgb_array").unwrapped)


def test_atsp_env_ignores_what_stands_on_the_diagonal():
    env = ATSPEnv(num_nodes=4)
    obs, _ = env.reset(options={"costs": np.array(ONE_WAY) + 9999 * np.eye(4)})
    assert obs["costs"].tolist() == ONE_WAY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"costs": np.zeros((3, 3))}, r"shape \(3, 3\), and this environment takes \(4, 4\)"),
        ({"costs": "costs"}, "not an array of numbers"),
        ({"costs": np.where(np.array(ONE_WAY) == 7, np.nan, ONE_WAY)}, "from node 3 to node 2 of instance 0 costs nan"),
        ({"costs": np.where(np.array(ONE_WAY) == 7, -1, ONE_WAY)}, "costs -1; a number from 0 to"),
        ({"coords": np.zeros((4, 2))}, "there is only 'costs'"),
    ],
)
def test_atsp_env_refuses_what_is_no_matrix_of_costs(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ATSPEnv(num_nodes=4).reset(options=options)


def test_atsp_refuses_a_matrix_whose_diagonal_costs_something():
    instance = ATSPInstance.of(torch.ones(1, 4, 4))
    with pytest.raises(UserError, match="the diagonal of a matrix of costs has to be 0"):
        RoutingVectorEnv(ATSPRules, num_envs=1, num_nodes=4, device=CPU, instances=instance)


def test_atsp_refuses_another_cost_world():
    assert ATSPRules.under(find_costs("euclidean")) is ATSPRules
    with pytest.raises(UserError, match="cost is euclidean"):
        ATSPRules.under(find_costs("euclidean", layout="clustered"))
    with pytest.raises(UserError, match="cost is lanes: leave cost and layout out"):
        ATSPRules.under(find_costs("lanes"))


def test_atsp_longest_leg_is_the_dearest_move():
    costs: Tensor = torch.tensor([ONE_WAY], dtype=torch.float32)
    assert ATSPRules.longest_leg(ATSPInstance.of(costs)).tolist() == [9]


@pytest.mark.run(shapes=True)
def test_atsp_trains_without_an_illegal_action_and_goes_on_with_the_same_numbers(tmp_path: Path):
    # Smaller matrices are padded, so that nothing of padding is ever legal or learnt from.
    command = ["--configs", "atsp_attn", "debug", "--device", "cpu", "--checkpoint_every", "100", "--eval_every", "100"]
    command += ["--steps", "200", "--curriculum", "[[4, 100], [6, null]]", "--checkpoint_numbered", "true"]
    dreamer.main([*command, "--logdir", str(tmp_path / "whole")])
    whole = read_metrics(tmp_path / "whole")
    first = min((tmp_path / "whole").glob("step_*.pt"), key=lambda path: int(path.stem[5:]))
    dreamer.main([*command, "--logdir", str(tmp_path / "rest"), "--resume", str(first)])
    rest = read_metrics(tmp_path / "rest")
    assert rest and without_times(rest) == without_times(whole)[-len(rest) :]
    assert whole[-1]["eval_gap"] >= 0
    assert max(row.get("miss_rate", 0) + row.get("env_miss_rate", 0) for row in whole) == 0
