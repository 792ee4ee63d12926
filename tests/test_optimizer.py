from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guard import Guard
from optimizer import Optimizer

NAN, INF = math.nan, math.inf


@pytest.fixture
def guard() -> Guard:
    return Guard("cpu")


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def optimizer(module: nn.Module, guard: Guard, **changes: Any) -> Optimizer:
    settings: dict[str, Any] = {"lr": 0.1, "clip": 1.0, "warmup": 0, **changes}
    return Optimizer("net", {"net": module}, guard=guard, **settings)


def loss_of(module: nn.Module, *, scale: float = 1.0) -> Tensor:
    inputs = torch.linspace(-1, 1, 15).view(5, 3)
    return scale * (module(inputs) - 1).square().mean()


def everything(module: nn.Module, chosen: Optimizer) -> list[Tensor]:
    """Parameters, moments and Adam's step counters, copied."""
    moments = [value for state in chosen.adam.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*module.parameters(), *moments]]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_optimizer_equals_torchs_adam_with_clipping(module: nn.Module, guard: Guard, scale: float):
    reference = copy.deepcopy(module)
    adam = torch.optim.Adam(reference.parameters(), lr=0.1, eps=1e-8)
    ours = optimizer(module, guard)
    for _ in range(5):
        _, metrics = ours.step(loss_of(module, scale=scale), progress=0.0)
        adam.zero_grad()
        loss = loss_of(reference, scale=scale)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adam.step()
        torch.testing.assert_close(metrics["net_grad_norm"], norm)
        torch.testing.assert_close(metrics["net_loss"], loss.detach())
    for mine, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_optimizer_clips_the_norm_over_the_whole_group(module: nn.Module, guard: Guard):
    ours = optimizer(module, guard, clip=0.5)
    _, metrics = ours.step(loss_of(module, scale=100.0), progress=0.0)
    assert metrics["net_grad_norm"] > 0.5
    applied = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(applied, torch.tensor(0.5))


def test_rate_rises_stays_and_falls_on_straight_lines(module: nn.Module, guard: Guard):
    ours = optimizer(module, guard, lr=1.0, warmup=4, decay_from=0.5, final_lr=0.2)
    rates = []
    for _ in range(6):
        rates.append(ours.rate(0.0))
        ours.step(loss_of(module), progress=0.0)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    # Half of the way from 0.5 to 1 takes away half of the 0.8 that is to go.
    assert [ours.rate(progress) for progress in (0.5, 0.75, 1.0, 1.5)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_rate_is_what_adam_steps_with(module: nn.Module, guard: Guard):
    ours = optimizer(module, guard, lr=0.1, warmup=2)
    before = [p.detach().clone() for p in module.parameters()]
    ours.step(loss_of(module), progress=0.0)
    # Adam's first step moves every parameter by the learning rate, here half of 0.1.
    moved = torch.cat([(p - b).abs().flatten() for p, b in zip(module.parameters(), before, strict=True)])
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("decay_from", [0.0, 1.0])
def test_rate_at_the_edges_of_the_decay(module: nn.Module, guard: Guard, decay_from: float):
    ours = optimizer(module, guard, lr=1.0, decay_from=decay_from, final_lr=0.5)
    assert [ours.rate(0.0), ours.rate(1.0)] == [1.0, 0.5 if decay_from == 0.0 else 1.0]


def nan_loss(module: nn.Module) -> Tensor:
    return loss_of(module) * NAN


def infinite_loss(module: nn.Module) -> Tensor:
    return loss_of(module) + INF


def finite_loss_with_nan_gradient(module: nn.Module) -> Tensor:
    first = next(module.parameters())
    # The root's derivative at 0 is infinite, times 0 is NaN; the value is 0.
    return loss_of(module) + ((first - first).square().sum()).sqrt()


@pytest.mark.parametrize("bad_loss", [nan_loss, infinite_loss, finite_loss_with_nan_gradient])
@pytest.mark.parametrize("updates_before", [0, 3])
def test_non_finite_update_leaves_everything_bit_identical(
    module: nn.Module, guard: Guard, bad_loss: Callable[[nn.Module], Tensor], updates_before: int
):
    ours = optimizer(module, guard)
    for _ in range(updates_before):
        applied, _ = ours.step(loss_of(module), progress=0.0)
        assert applied == 1
    before = everything(module, ours)
    applied, _ = ours.step(bad_loss(module), progress=0.0)
    assert applied == 0
    after = everything(module, ours)
    # Before its first update Adam holds no moments: the skipped one leaves the zeros that it begins with.
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=bool(updates_before)))
    assert not any(tensor.any() for tensor in after[len(before) :])


def test_optimizer_goes_on_after_a_skipped_update_as_if_it_had_not_been(module: nn.Module, guard: Guard):
    undisturbed = copy.deepcopy(module)
    ours, reference = optimizer(module, guard), optimizer(undisturbed, Guard("cpu"))
    for update in range(4):
        if update == 2:
            ours.step(nan_loss(module), progress=0.0)
        ours.step(loss_of(module), progress=0.0)
        reference.step(loss_of(undisturbed), progress=0.0)
    for mine, theirs in zip(everything(module, ours), everything(undisturbed, reference), strict=True):
        assert torch.equal(mine, theirs)


def test_guard_is_told_of_the_parameter_whose_gradient_is_not_finite(module: nn.Module, guard: Guard):
    ours = optimizer(module, guard)
    ours.step(loss_of(module), progress=0.0)
    assert guard.report() is None
    ours.step(finite_loss_with_nan_gradient(module), progress=0.0)
    assert [(finding.kind, finding.name) for finding in guard.findings()] == [("net gradient", "net.0.weight")]


def test_step_changes_only_its_own_parameters(guard: Guard):
    own, other = nn.Linear(2, 2), nn.Linear(2, 2)
    ours = optimizer(own, guard)
    before = copy.deepcopy(other.state_dict())
    kept = own.weight.detach().clone()
    ours.step(other(own(torch.ones(1, 2))).square().sum(), progress=0.0)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert all(parameter.grad is None for parameter in other.parameters())
    assert not torch.equal(own.weight, kept)


def test_step_leaves_parameters_alone_that_the_loss_does_not_depend_on(guard: Guard):
    used, spare = nn.Linear(2, 1), nn.Linear(2, 1)
    ours = optimizer(nn.ModuleList([used, spare]), guard)
    inputs = torch.ones(1, 2)
    ours.step((used(inputs) + spare(inputs)).sum(), progress=0.0)
    before = spare.weight.detach().clone()
    # Its moments are no longer zero; they must not go on pushing it.
    ours.step(used(inputs).sum(), progress=0.0)
    assert torch.equal(spare.weight, before)


def test_restored_optimizer_goes_on_identically(module: nn.Module, guard: Guard):
    ours = optimizer(module, guard, warmup=5)
    for _ in range(2):
        ours.step(loss_of(module), progress=0.0)
    twin = copy.deepcopy(module)
    restored = optimizer(twin, guard, warmup=5)
    restored.load_state_dict(copy.deepcopy(ours.state_dict()))
    for _ in range(2):
        ours.step(loss_of(module), progress=0.0)
        restored.step(loss_of(twin), progress=0.0)
    for mine, theirs in zip(everything(module, ours), everything(twin, restored), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": NAN}, {"clip": 0.0}, {"warmup": -1}, {"decay_from": 1.1}, {"final_lr": -0.1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_optimizer_refuses_a_schedule_out_of_range(module: nn.Module, guard: Guard, wrong: dict[str, float]):
    with pytest.raises(ValueError, match=f"optimiser net: .* {next(iter(wrong))} "):
        optimizer(module, guard, **wrong)
