from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from parts.layers import MLP, BlockLinear, initialise

# What cutting at two standard deviations leaves of one: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(100, 400), 100),
        (nn.Conv2d(8, 64, kernel_size=5), 8 * 5 * 5),
        (nn.Conv2d(8, 512, kernel_size=5, groups=2), 4 * 5 * 5),
        # The whole input, over all blocks, as published.
        (BlockLinear(200, 800, blocks=4), 200),
    ],
    ids=["linear", "convolution", "grouped convolution", "blocks"],
)
def test_initialise_draws_a_cut_normal_distribution_by_fan_in(layer: nn.Linear | nn.Conv2d | BlockLinear, fan_in: int):
    initialise(layer)
    std = 1.1368 / math.sqrt(fan_in)
    weight = layer.weight.detach()
    assert weight.mean().abs() < 0.03 * std
    assert weight.std().item() == pytest.approx(CUT * std, rel=0.02)
    assert 1.98 * std < weight.abs().max() <= 2 * std * (1 + 1e-6)
    # 0.6514 of a normal distribution that is cut at 2 lies within 0.9 standard deviations, of a uniform one 0.45.
    within = math.erf(0.9 / math.sqrt(2)) / math.erf(math.sqrt(2))
    assert (weight.abs() < 0.9 * std).float().mean().item() == pytest.approx(within, abs=0.015)
    assert layer.bias is not None and not layer.bias.any()


def test_initialise_keeps_the_variance_of_a_signal():
    layer = nn.Linear(1000, 1000)
    initialise(layer)
    assert layer(torch.randn(50, 1000)).std().item() == pytest.approx(1.0, rel=0.02)


def test_initialise_leaves_layers_at_zero():
    mlp = MLP(8, 5, units=16, layers=1, zero_output=True)
    initialise(mlp)
    assert not mlp.output.weight.any() and not mlp.output.bias.any()
    assert all(p.any() for p in mlp.hidden.parameters() if p.ndim == 2)


def test_initialise_multiplies_by_the_output_scale():
    plain, scaled = (MLP(8, 5, units=16, layers=1, output_scale=scale) for scale in (1.0, 0.01))
    for mlp in (plain, scaled):
        torch.manual_seed(1)
        initialise(mlp)
    torch.testing.assert_close(scaled.output.weight, 0.01 * plain.output.weight)
    torch.testing.assert_close(next(scaled.hidden.parameters()), next(plain.hidden.parameters()))


def test_initialise_reaches_layers_without_bias_at_any_depth_and_leaves_norms():
    inner = nn.Linear(4, 4, bias=False)
    norm = nn.RMSNorm(4)
    before = inner.weight.detach().clone()
    initialise(nn.ModuleList([nn.Sequential(inner, norm)]))
    assert not torch.equal(inner.weight, before) and torch.equal(norm.weight, torch.ones(4))


def test_initialise_draws_from_the_global_generator():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    for layer in (first, second):
        torch.manual_seed(3)
        initialise(layer)
    assert torch.equal(first.weight, second.weight)
