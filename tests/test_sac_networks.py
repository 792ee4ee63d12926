from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from envs.tasks import ObservationKey
from soft.networks import ActionValues, ObservationVector, TanhNormal, Temperature, TwinMLP

CPU = torch.device("cpu")


def test_tanh_normal_has_the_density_of_the_transformed_normal():
    mean, log_std, noise = torch.randn(3, 7, 2)
    dist = TanhNormal(mean, 0.5 * log_std)
    action, log_prob = dist.sample(noise)
    reference = TransformedDistribution(Normal(mean, dist.log_std.exp()), TanhTransform(cache_size=1))
    torch.testing.assert_close(action, torch.tanh(mean + dist.log_std.exp() * noise))
    torch.testing.assert_close(log_prob, reference.log_prob(action).sum(-1), atol=1e-3, rtol=1e-4)


def test_tanh_normal_counts_no_slope_below_its_floor():
    x = torch.tensor([[-9.0], [-6.0], [0.0], [5.0], [7.0], [12.0]], dtype=torch.float64)
    _, log_prob = TanhNormal(x, torch.zeros_like(x)).sample(torch.zeros_like(x))
    log_normal = -math.log(math.sqrt(2 * math.pi)) + 1.5
    expected = log_normal - torch.log(1 - torch.tanh(x).square() + 1e-6)
    torch.testing.assert_close(log_prob, expected.squeeze(-1))


def test_tanh_normal_keeps_log_std_between_minus_5_and_2():
    log_std = TanhNormal(torch.zeros(3), torch.tensor([-1e9, 0.0, 1e9])).log_std
    torch.testing.assert_close(log_std, torch.tensor([-5.0, -1.5, 2.0]))


def test_tanh_normal_is_finite_where_tanh_is_one():
    mean = torch.tensor([[300.0], [-300.0], [1e6]], requires_grad=True)
    action, log_prob = TanhNormal(mean, torch.zeros(3, 1)).sample(torch.zeros(3, 1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    assert log_prob.isfinite().all() and gradient.isfinite().all()
    # The density is that of a slope of 1e-6, and does not change any more.
    torch.testing.assert_close(log_prob, torch.full((3,), 1.5 - 0.5 * math.log(2 * math.pi) - math.log(1e-6)))
    assert (gradient == 0).all()
    assert (action.abs() == 1).all()


def reference_mlp(twin: TwinMLP, index: int, x: torch.Tensor) -> torch.Tensor:
    state = twin.state_dict()
    for layer in range(twin.layers):
        x = x @ state[f"q{index}.weight{layer}"] + state[f"q{index}.bias{layer}"]
        if layer + 1 < twin.layers:
            x = x.clamp(min=0)
    return x


def test_twin_mlp_is_two_mlps():
    twin, x = TwinMLP(3, 2, units=8, layers=2), torch.randn(5, 3)
    torch.testing.assert_close(twin(x), torch.stack([reference_mlp(twin, index, x) for index in (1, 2)]))
    assert not torch.allclose(*twin(x))


def test_twin_mlp_restores_and_names_its_twins():
    one, other = TwinMLP(3, 2, units=8, layers=1), TwinMLP(3, 2, units=8, layers=1)
    state = one.state_dict()
    assert state.keys() == {
        f"q{twin}.{kind}{layer}" for twin in (1, 2) for kind in ("weight", "bias") for layer in (0, 1)
    }
    other.load_state_dict(state)
    assert torch.equal(one(torch.ones(4, 3)), other(torch.ones(4, 3)))
    # What the guard copies into the state arrives in the network.
    other.state_dict()["q2.weight0"].fill_(7.0)
    weight = other.get_parameter("weight0")
    assert (weight[1] == 7).all() and torch.equal(weight[0], one.get_parameter("weight0")[0])


def test_frozen_twin_mlp_passes_gradients_to_its_input_only():
    twin, x = TwinMLP(3, 1, units=8, layers=2), torch.randn(5, 3, requires_grad=True)
    gradients = torch.autograd.grad(twin(x, frozen=True).sum(), [x, *twin.parameters()], allow_unused=True)
    (expected,) = torch.autograd.grad(twin(x).sum(), x)
    torch.testing.assert_close(gradients[0], expected)
    assert all(gradient is None for gradient in gradients[1:])


def test_two_hot_values_begin_at_zero_and_are_fitted_to_large_returns():
    values = ActionValues(2, 1, units=8, layers=1, bins=63)
    obs, action, target = torch.randn(4, 2), torch.rand(4, 1), torch.full((4,), -2e6)
    outputs = values(obs, action)
    assert torch.equal(values.mean(outputs), torch.zeros(2, 4))
    # Uniform over 63 bins, for each of the twins.
    torch.testing.assert_close(values.loss(outputs, target), torch.full((4,), 2 * math.log(63)))
    optimizer = torch.optim.Adam(values.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        values.loss(values(obs, action), target).mean().backward()
        optimizer.step()
    torch.testing.assert_close(values.mean(values(obs, action)), torch.full((2, 4), -2e6), rtol=0.02, atol=0.0)


def test_squared_error_of_both_twins_by_hand():
    values = ActionValues(1, 1, units=4, layers=1, bins=None)
    outputs = torch.tensor([[[1.0]], [[4.0]]])
    torch.testing.assert_close(values.loss(outputs, torch.tensor([3.0])), torch.tensor([0.5 * 4 + 0.5 * 1]))


def test_observation_vector_reads_numbers_and_classes():
    keys = {
        "b": ObservationKey("vector", (2,), torch.float32),
        "a": ObservationKey("classes", (1,), torch.int64, classes=(3,)),
    }
    read = ObservationVector(keys, units=4, depth=2)
    row = read({"b": torch.tensor([[0.5, -7.0]]), "a": torch.tensor([[2]])})
    assert row.tolist() == [[0, 0, 1, 0.5, -7]] and read.size == 5


def test_observation_vector_reads_images_and_sets_by_encoders():
    keys = {
        "pixels": ObservationKey("image", (16, 16, 3), torch.uint8),
        "points": ObservationKey("set", (4, 2), torch.float32),
        "b": ObservationKey("vector", (2,), torch.float32),
    }
    read = ObservationVector(keys, units=4, depth=2)
    obs = {
        "pixels": torch.randint(0, 256, (3, 5, 16, 16, 3), dtype=torch.uint8),
        "points": torch.randn(3, 5, 4, 2),
        "b": torch.randn(3, 5, 2),
    }
    row = read(obs)
    # 4 * depth channels of the one pixel that is left, the units of the set, and the numbers as they are.
    assert row.shape == (3, 5, read.size) and read.size == 8 + 4 + 2
    assert row[..., -2:].equal(obs["b"])
    assert read.encoder is not None
    torch.testing.assert_close(row[..., :-2], read.encoder({"pixels": obs["pixels"], "points": obs["points"]}))
    assert not ObservationVector({"b": keys["b"]}, units=4, depth=2).learns


def test_temperature_begins_at_one():
    assert Temperature(1.0, device=CPU)().item() == 1
    assert Temperature(0.03, device=CPU)().item() == pytest.approx(0.03)
