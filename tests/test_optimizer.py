from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checkpoint
from guard import Guard
from updates.optimizer import Optimizer, update_together

NAN, INF = math.nan, math.inf
ALGORITHMS = ["adam", "laprop"]
both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


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
    """Parameters, moments and their update counters, copied."""
    moments = [value for state in chosen.rule.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*module.parameters(), *moments]]


def test_weight_decay_of_matrices_equals_torchs_adamw(module: nn.Module, guard: Guard):
    reference = copy.deepcopy(module)
    matrices = [parameter for parameter in reference.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in reference.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.1, eps=1e-8)
    ours = optimizer(module, guard, clip=INF, weight_decay=0.3)
    for _ in range(5):
        ours.step(loss_of(module), progress=0.0)
        adamw.zero_grad()
        loss_of(reference).backward()
        adamw.step()
        for actual, expected in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(actual, expected)


@both_algorithms
def test_gradient_that_lies_transposed_in_memory_is_taken_for_what_it_is(guard: Guard, algorithm: str):
    gradient = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]).t()
    parts = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, 3))})
    ours = Optimizer("net", {"net": parts}, guard=guard, lr=0.1, clip=INF, warmup=0, algorithm=algorithm)
    ours.apply([gradient], losses=[torch.zeros(())], progress=0.0)
    assert parts["weight"].sign().tolist() == [[-1.0] * 3, [1.0] * 3]


def test_weights_do_not_decay_where_an_update_is_skipped(module: nn.Module, guard: Guard):
    ours = optimizer(module, guard, weight_decay=0.3)
    before = everything(module, ours)
    ours.step(loss_of(module) * NAN, progress=0.0)
    assert all(torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=False))


def test_weight_decay_leaves_embeddings_alone(guard: Guard):
    table = nn.Embedding(4, 3)
    before = table.weight.detach().clone()
    ours = optimizer(table, guard, weight_decay=0.3)
    ours.step(table(torch.tensor([1])).square().sum(), progress=0.0)
    unmoved = torch.tensor([True, False, True, True])
    assert torch.equal(table.weight[unmoved], before[unmoved])


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


@both_algorithms
@pytest.mark.parametrize("bad_loss", [nan_loss, infinite_loss, finite_loss_with_nan_gradient])
@pytest.mark.parametrize("updates_before", [0, 3])
def test_non_finite_update_leaves_everything_bit_identical(
    module: nn.Module, guard: Guard, bad_loss: Callable[[nn.Module], Tensor], updates_before: int, algorithm: str
):
    ours = optimizer(module, guard, algorithm=algorithm)
    for _ in range(updates_before):
        applied, _ = ours.step(loss_of(module), progress=0.0)
        assert applied == 1
    before = everything(module, ours)
    applied, _ = ours.step(bad_loss(module), progress=0.0)
    assert applied == 0
    after = everything(module, ours)
    # Before the first update there are no moments: the skipped one leaves the zeros that it begins with.
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=bool(updates_before)))
    assert not any(tensor.any() for tensor in after[len(before) :])


@both_algorithms
def test_optimizer_goes_on_after_a_skipped_update_as_if_it_had_not_been(
    module: nn.Module, guard: Guard, algorithm: str
):
    undisturbed = copy.deepcopy(module)
    ours = optimizer(module, guard, algorithm=algorithm)
    reference = optimizer(undisturbed, Guard("cpu"), algorithm=algorithm)
    for update in range(4):
        if update in (0, 2):
            ours.step(nan_loss(module), progress=0.0)
        ours.step(loss_of(module), progress=0.0)
        reference.step(loss_of(undisturbed), progress=0.0)
    for mine, theirs in zip(everything(module, ours), everything(undisturbed, reference), strict=True):
        assert torch.equal(mine, theirs)


def test_guard_is_told_of_the_parameter_whose_gradient_is_not_finite(module: nn.Module, guard: Guard):
    ours = optimizer(module, guard)
    ours.step(loss_of(module), progress=0.0)
    assert guard.findings() == []
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


@both_algorithms
def test_step_leaves_parameters_alone_that_the_loss_does_not_depend_on(guard: Guard, algorithm: str):
    used, spare = nn.Linear(2, 1), nn.Linear(2, 1)
    ours = optimizer(nn.ModuleList([used, spare]), guard, algorithm=algorithm)
    inputs = torch.ones(1, 2)
    ours.step((used(inputs) + spare(inputs)).sum(), progress=0.0)
    before = spare.weight.detach().clone()
    # Its moments are no longer zero; they must not go on pushing it.
    ours.step(used(inputs).sum(), progress=0.0)
    assert torch.equal(spare.weight, before)


@both_algorithms
def test_restored_optimizer_goes_on_identically(module: nn.Module, guard: Guard, tmp_path: Path, algorithm: str):
    ours = optimizer(module, guard, warmup=5, algorithm=algorithm)
    for _ in range(2):
        ours.step(loss_of(module), progress=0.0)
    twin = copy.deepcopy(module)
    restored = optimizer(twin, guard, warmup=5, algorithm=algorithm)
    checkpoint.save(tmp_path / "state.pt", ours.state_dict())
    restored.load_state_dict(checkpoint.load(tmp_path / "state.pt", torch.device("cpu")))
    for _ in range(2):
        ours.step(loss_of(module), progress=0.0)
        restored.step(loss_of(twin), progress=0.0)
    for mine, theirs in zip(everything(module, ours), everything(twin, restored), strict=True):
        assert torch.equal(mine, theirs)


def plain_laprop(gradients: list[list[float]], values: list[float], *, lr: float, agc: float) -> list[list[float]]:
    """DreamerV3's optimiser for one vector, in plain floats: the values after each update."""
    mu, nu, history = [0.0] * len(values), [0.0] * len(values), []
    for time, gradient in enumerate(gradients, start=1):
        if agc:
            upper = agc * max(1e-3, math.hypot(*values))
            gradient = [g / max(1.0, math.hypot(*gradient) / upper) for g in gradient]
        nu = [0.999 * n + 0.001 * g * g for n, g in zip(nu, gradient, strict=True)]
        update = [g / (math.sqrt(n / (1 - 0.999**time)) + 1e-20) for n, g in zip(nu, gradient, strict=True)]
        mu = [0.9 * m + 0.1 * u for m, u in zip(mu, update, strict=True)]
        values = [v - lr * m / (1 - 0.9**time) for v, m in zip(values, mu, strict=True)]
        history.append(values)
    return history


class Vector(nn.Module):
    """One parameter, and losses whose gradient is given."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def loss(self, gradient: list[float]) -> Tensor:
        return (self.values * torch.tensor(gradient)).sum()


@pytest.mark.parametrize("agc", [0.0, 0.3])
def test_laprops_first_steps_are_those_by_hand(guard: Guard, agc: float):
    gradients = [[3.0, -4.0, 0.0], [0.1, 0.2, 1e-4], [-2.0, 0.5, 0.0]]
    vector = Vector([0.6, 0.8, -1.0])
    ours = optimizer(vector, guard, algorithm="laprop", clip=INF, agc=agc)
    expected = plain_laprop(gradients, [0.6, 0.8, -1.0], lr=0.1, agc=agc)
    # The first one is known without any code: the learning rate, against the gradient's sign.
    assert expected[0] == pytest.approx([0.5, 0.9, -1.0])
    for gradient, values in zip(gradients, expected, strict=True):
        ours.step(vector.loss(gradient), progress=0.0)
        torch.testing.assert_close(vector.values.detach(), torch.tensor(values), rtol=1e-5, atol=1e-6)


def applied_gradient(values: list[float], gradient: list[float], guard: Guard, **changes: Any) -> list[float]:
    """What is left of a gradient after clipping."""
    vector = Vector(values)
    optimizer(vector, guard, **changes).step(vector.loss(gradient), progress=0.0)
    assert vector.values.grad is not None
    return vector.values.grad.tolist()


@both_algorithms
@pytest.mark.parametrize(
    ("values", "gradient", "clip", "clipped"),
    [
        # 0.3 times the parameter's norm of 5 is 1.5, a tenth of the gradient's 15.
        ([3.0, 4.0], [9.0, -12.0], INF, [0.9, -1.2]),
        ([3.0, 4.0], [0.9, -1.1], INF, [0.9, -1.1]),
        # A parameter at zero counts as one of norm 0.001.
        ([0.0, 0.0], [0.0, 2.0], INF, [0.0, 3e-4]),
        ([3.0, 4.0], [0.0, 0.0], INF, [0.0, 0.0]),
        # The whole group's limit, where it is the smaller one, and where it isn't.
        ([3.0, 4.0], [9.0, -12.0], 0.5, [0.3, -0.4]),
        ([3.0, 4.0], [9.0, -12.0], 2.0, [0.9, -1.2]),
    ],
)
def test_adaptive_clipping_limits_a_gradient_by_its_parameters_norm(
    guard: Guard, algorithm: str, values: list[float], gradient: list[float], clip: float, clipped: list[float]
):
    actual = applied_gradient(values, gradient, guard, algorithm=algorithm, clip=clip, agc=0.3)
    assert actual == pytest.approx(clipped, rel=1e-5)


def test_adaptive_clipping_treats_every_parameter_alone(guard: Guard):
    small, large = Vector([0.1]), Vector([10.0])
    ours = optimizer(nn.ModuleList([small, large]), guard, clip=INF, agc=0.1)
    ours.step(small.loss([0.5]) + large.loss([0.5]), progress=0.0)
    assert small.values.grad is not None and large.values.grad is not None
    assert small.values.grad.tolist() == pytest.approx([0.01]) and large.values.grad.tolist() == [0.5]


def test_infinite_clip_leaves_the_gradient_as_it_is(guard: Guard):
    assert applied_gradient([1.0, 2.0], [3e5, -4e5], guard, clip=INF) == [3e5, -4e5]


def test_laprop_counts_the_updates_of_each_parameter(guard: Guard):
    early, late = Vector([1.0]), Vector([1.0])
    ours = optimizer(nn.ModuleList([early, late]), guard, algorithm="laprop", clip=INF)
    for _ in range(5):
        ours.step(early.loss([2.0]), progress=0.0)
    ours.step(early.loss([2.0]) + late.loss([2.0]), progress=0.0)
    # A first update is as long as the learning rate, however late it comes.
    assert late.values.tolist() == pytest.approx([0.9])


@pytest.mark.parametrize("agc", [0.0, 0.3])
def test_laprop_survives_a_skipped_update_whose_squares_overflow(guard: Guard, agc: float):
    vector = Vector([1.0, 2.0])
    ours = optimizer(vector, guard, algorithm="laprop", clip=INF, agc=agc)
    ours.step(vector.loss([3.0, -1.0]), progress=0.0)
    before = everything(vector, ours)
    applied, _ = ours.step(vector.loss([1e30, 1e30]), progress=0.0)
    assert applied == 0
    assert all(torch.equal(a, b) for a, b in zip(before, everything(vector, ours), strict=True))


def test_laprop_survives_a_skipped_first_update_whose_quotient_overflows(guard: Guard):
    vector = Vector([1.0, 2.0])
    ours = optimizer(vector, guard, algorithm="laprop", clip=INF)
    # No squares yet: 1e19 / 1e-20 is beyond single precision.
    applied, _ = ours.step(vector.loss([1e19, 1.0]) + INF, progress=0.0)
    assert applied == 0
    values, *moments = everything(vector, ours)
    assert values.tolist() == [1.0, 2.0] and not any(moment.any() for moment in moments)


class Groups:
    """Three groups and a loss for each; every module takes one number to one number."""

    def __init__(self, guard: Guard, algorithm: str) -> None:
        self.modules = {name: nn.Linear(1, 1) for name in ("model", "actor", "critic")}
        self.optimizers = {
            name: Optimizer(name, {name: module}, guard=guard, lr=0.1, clip=1.0, warmup=0, algorithm=algorithm)
            for name, module in self.modules.items()
        }

    def loss(self, *names: str, scale: float = 1.0) -> tuple[Tensor, list[Optimizer]]:
        """A loss that reaches the named groups, with their optimisers."""
        value = torch.ones(1, 1)
        for name in names:
            value = self.modules[name](value)
        return scale * (value - 3).square().sum(), [self.optimizers[name] for name in names]

    def update(self, *losses: tuple[Tensor, list[Optimizer]]) -> dict[str, int]:
        """Which groups were updated, as they say; and as it is seen."""
        before = {name: everything(module, self.optimizers[name]) for name, module in self.modules.items()}
        applied, _ = update_together(losses, progress=0.0)
        for name, flag in applied.items():
            after = everything(self.modules[name], self.optimizers[name])
            same = all(torch.equal(a, b) for a, b in zip(before[name], after, strict=False))
            assert same is not bool(flag)
        return {name: int(flag) for name, flag in applied.items()}


@pytest.fixture(params=ALGORITHMS)
def groups(guard: Guard, request: pytest.FixtureRequest) -> Groups:
    return Groups(guard, request.param)


def test_together_equals_the_groups_apart(groups: Groups):
    apart = copy.deepcopy(groups)
    for _ in range(3):
        assert groups.update(groups.loss("model"), groups.loss("actor")) == {"model": 1, "actor": 1}
        for name in ("model", "actor"):
            loss, (alone,) = apart.loss(name)
            alone.step(loss, progress=0.0)
    for name in ("model", "actor"):
        mine, theirs = (everything(g.modules[name], g.optimizers[name]) for g in (groups, apart))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_together_adds_up_the_losses_that_reach_a_group(groups: Groups):
    losses = [groups.loss("model", scale=0.01), groups.loss("model", "critic", scale=0.01)]
    weight = groups.modules["model"].weight
    (expected,) = torch.autograd.grad(losses[0][0] + losses[1][0], weight, retain_graph=True)
    update_together(losses, progress=0.0)
    torch.testing.assert_close(weight.grad, expected)


def test_together_skips_both_groups_that_a_non_finite_loss_reaches_and_no_other(groups: Groups):
    shared, others = ("model", "critic"), ("actor",)
    assert groups.update(groups.loss(*shared), groups.loss(*others)) == {"model": 1, "critic": 1, "actor": 1}
    # The gradient of the first is not finite either, that of the second is.
    for spoil in (lambda loss: loss * NAN, lambda loss: loss + INF):
        loss, named = groups.loss(*shared)
        applied = groups.update(groups.loss("model"), (spoil(loss), named), groups.loss(*others))
        assert applied == {"model": 0, "critic": 0, "actor": 1}


def test_together_skips_only_the_group_whose_gradient_is_not_finite(groups: Groups):
    actor, critic = (groups.modules[name].weight.sum() for name in ("actor", "critic"))
    # The root's derivative at 0 is infinite, times 0 is NaN; the value is 0.
    loss = actor.square() + ((critic - critic).square()).sqrt()
    named = [groups.optimizers["actor"], groups.optimizers["critic"]]
    assert groups.update((loss, named)) == {"actor": 1, "critic": 0}


def test_optimizer_refuses_another_algorithms_state(module: nn.Module, guard: Guard):
    state = optimizer(module, guard, algorithm="laprop").state_dict()
    with pytest.raises(ValueError, match="optimiser net: .* laprop's, but the algorithm is adam") as refused:
        optimizer(module, guard).load_state_dict(state)
    assert "\n" not in str(refused.value)
