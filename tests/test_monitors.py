"""Monitors of gradients and activations: what they see, when they wait for it, and that they change nothing."""

from __future__ import annotations

import builtins
import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from config import UserError
from guard import Guard, NonFinite
from monitors import ActivationMonitor, BackwardNorms, GradientMonitor, GradientSummary, trainer_callback
from tests.language_scenes import VOCABULARY, small_gpt2
from updates.optimizer import Optimizer

NAN, INF = math.nan, math.inf


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def give_gradients(module: nn.Module, *values: float) -> None:
    """Gradients that are one number each."""
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.grad = torch.full_like(parameter, value)


def test_gradient_monitor_by_hand():
    module = net()
    monitor = GradientMonitor(module, summary_every=2)
    # 12, 4, 4 and 1 entries: norms 2 sqrt(3), 2, 4 and 3, in all sqrt(12 + 4 + 16 + 9).
    give_gradients(module, 1.0, 1.0, 2.0, 3.0)
    monitor.step()
    assert not monitor.summaries
    give_gradients(module, 0.0, 0.0, 0.0, 5.0)
    monitor.step()
    (found,) = monitor.summaries
    assert found.rows[0] == pytest.approx((1, (2 * math.sqrt(3) + 9) / 4, 4.0, 2.0, math.sqrt(41)))
    assert found.rows[1] == pytest.approx((2, 1.25, 5.0, 0.0, 5.0))
    assert (found.nan, found.inf, found.names) == (0, 0, [])
    assert found.metrics()["gradient_norm_max"] == 5.0 and found.metrics()["gradient_norm_min"] == 0.0
    assert found.metrics()["gradient_norm_total"] == pytest.approx((math.sqrt(41) + 5) / 2)


def test_gradient_monitor_counts_and_names_what_is_not_finite():
    module = net()
    monitor = GradientMonitor(module, summary_every=3)
    for values in ((1.0, 1.0, NAN, 1.0), (1.0, INF, NAN, 2.0), (1.0, 1.0, 1.0, 1.0)):
        give_gradients(module, *values)
        monitor.step()
    (found,) = monitor.summaries
    assert (found.nan, found.inf, found.names) == (2, 1, ["2.weight", "0.bias"])
    # What is finite still has its figures.
    assert found.rows[1].largest == pytest.approx(math.sqrt(12)) and found.rows[1].least == 2.0
    assert math.isnan(found.rows[1].total) and math.isfinite(found.rows[2].total)


def test_gradient_monitor_names_the_first_ten():
    module = nn.Sequential(*[nn.Linear(1, 1) for _ in range(8)])
    monitor = GradientMonitor(module, summary_every=1)
    give_gradients(module, *[NAN] * 16)
    monitor.step()
    names = [f"{layer}.{kind}" for layer in range(5) for kind in ("weight", "bias")]
    assert monitor.summaries[-1].names == names and monitor.summaries[-1].nan == 16


def test_gradient_monitor_passes_over_parameters_without_a_gradient():
    module = net()
    monitor = GradientMonitor(module, summary_every=2)
    give_gradients(module, 0.0, 0.0, 0.0, 3.0)
    module[0].weight.grad = module[0].bias.grad = None
    monitor.step()
    give_gradients(module, 1.0, 1.0, NAN, 1.0)
    monitor.step()
    (found,) = monitor.summaries
    assert found.rows[0].mean == 1.5 and found.names == ["2.weight"]


def test_gradient_monitor_refuses_a_step_whose_gradients_are_gone():
    module = net()
    give_gradients(module, 1.0, 1.0, 1.0, 1.0)
    module.zero_grad()
    with pytest.raises(UserError, match="after backward\\(\\) and before zero_grad"):
        GradientMonitor(module).step()


@pytest.mark.parametrize("value", [NAN, INF])
def test_gradient_monitor_halts_on_request_and_names_the_parameter(value: float):
    module = net()
    monitor = GradientMonitor(module, halt_on_nan=True)
    give_gradients(module, 1.0, 1.0, 1.0, 1.0)
    monitor.step()
    give_gradients(module, 1.0, value, 1.0, value)
    with pytest.raises(NonFinite, match=r"step 2: the gradient of 0\.bias and of 1 more is not finite"):
        monitor.step()


def test_gradient_monitor_fetches_once_per_summary():
    # The device `meta` has no numbers: asking for one raises.
    module = net().to("meta")
    monitor = GradientMonitor(module, summary_every=3)
    give_gradients(module, 1.0, 1.0, 1.0, 1.0)
    monitor.step()
    monitor.step()
    with pytest.raises(NotImplementedError, match="meta"):
        monitor.step()


def test_gradient_monitor_tells_of_every_summary_and_keeps_the_last_ones():
    told: list[GradientSummary] = []
    monitor = GradientMonitor(summary_every=1, notify=told.append)
    for value in range(150):
        monitor.observe(["a"], torch.tensor([float(value)]))
    assert [each.rows[0].total for each in told] == list(range(150))
    assert list(monitor.summaries) == told[-100:]
    assert monitor.summary() is None


def test_optimizer_hands_over_norms_before_clipping_and_changes_nothing():
    modules = [net()]
    modules.append(copy.deepcopy(modules[0]))
    inputs = torch.randn(5, 3)
    monitor, norms = GradientMonitor(summary_every=1), []
    for module, observers in zip(modules, ([monitor.observe], []), strict=True):
        optimizer = Optimizer("net", {"net": module}, guard=Guard("cpu"), lr=0.1, clip=0.5, warmup=0)
        optimizer.observers.extend(observers)
        for _ in range(3):
            _, metrics = optimizer.step(100 * module(inputs).square().mean(), progress=0.0)
            norms.append(float(metrics["net_grad_norm"]))
    assert all(torch.equal(*pair) for pair in zip(*(module.parameters() for module in modules), strict=True))
    assert norms[:3] == norms[3:] == pytest.approx([each.rows[0].total for each in monitor.summaries])
    assert min(norms) > 0.5


def test_activation_monitor_by_hand():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        module.get_parameter("0.weight").copy_(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    monitor = ActivationMonitor(module, every=2)
    with monitor.step():
        module(torch.tensor([[3.0, 1.0]]))
        module(torch.tensor([[1.0, NAN]]))
    (found,) = monitor.summaries
    # 3 and 2; 1 and NaN, which a product with 0 makes of both.
    assert found.step == 1 and [row.name for row in found.rows] == ["0", "1", ""]
    assert found.rows[0].mean == 2.5 and found.rows[0].largest == 3.0 and found.rows[0].bad_share == 0.5
    assert found.rows[1].mean == 1.5 and found.names == ["0", "1", ""]


def test_activation_monitor_watches_every_nth_step():
    module = net()
    monitor = ActivationMonitor(module, every=3)
    hooks = []
    for _ in range(7):
        with monitor.step():
            hooks.append(sum(len(each._forward_hooks) for each in module.modules()))
            module(torch.randn(5, 3))
    assert hooks == [4, 0, 0, 4, 0, 0, 4] and [each.step for each in monitor.summaries] == [1, 4, 7]
    assert not any(each._forward_hooks for each in module.modules())


def test_activation_monitor_leaves_no_hooks_where_a_step_fails():
    module = net()
    monitor = ActivationMonitor(module)
    with pytest.raises(RuntimeError), monitor.step():
        module(torch.randn(5, 4))
    assert not any(each._forward_hooks for each in module.modules())


def test_activation_monitor_finds_where_nan_begins_in_a_gpt2():
    model = small_gpt2()
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.bias")[0] = NAN
    monitor = ActivationMonitor(model, every=1)
    with monitor.step():
        model(torch.zeros(2, 4, dtype=torch.int64))
    assert monitor.summaries[-1].names[0] == "transformer.h.1.mlp.c_fc"
    assert len(monitor.summaries[-1].rows) > 10


def test_activation_monitor_names_the_first_ten():
    module = nn.Sequential(*[nn.Identity() for _ in range(12)])
    monitor = ActivationMonitor(module)
    with monitor.step():
        module(torch.tensor([INF]))
    assert monitor.summaries[-1].names == [str(number) for number in range(10)]
    assert math.isnan(monitor.summaries[-1].rows[0].mean)


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(index, index + 6) % VOCABULARY
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        **{"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        **{"report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True},
        **{"dataloader_pin_memory": False, **changes},
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=model, args=arguments, train_dataset=Texts(), callbacks=list(callbacks))


@pytest.mark.run
def test_callback_sees_the_norms_that_the_trainer_clips(tmp_path: Path):
    model = small_gpt2()
    gradients, activations = GradientMonitor(model, summary_every=2), ActivationMonitor(model, every=3)
    chosen = trainer(model, tmp_path, trainer_callback(gradients=gradients, activations=activations))
    chosen.train()
    logs = chosen.state.log_history
    told = [entry["grad_norm"] for entry in logs if "grad_norm" in entry]
    seen = [row.total for summary in gradients.summaries for row in summary.rows]
    assert len(told) == 5 and min(told) > 0.1 and seen == pytest.approx(told, rel=1e-4)
    assert [entry["step"] for entry in logs if "gradient_norm_total" in entry] == [2, 4]
    assert [each.step for each in activations.summaries] == [1, 4]
    assert [entry["step"] for entry in logs if "activation_max" in entry] == [1, 4]
    assert not any(each._forward_hooks for each in model.modules())


@pytest.mark.run
def test_callback_counts_what_a_last_short_accumulation_gives(tmp_path: Path):
    # 64 texts in batches of 4 are 16; steps of 5 batches leave one of 1.
    gradients = GradientMonitor(model := small_gpt2(), summary_every=1)
    callback = trainer_callback(gradients=gradients)
    chosen = trainer(model, tmp_path, callback, gradient_accumulation_steps=5, max_steps=-1, num_train_epochs=1)
    chosen.train()
    told = [entry["grad_norm"] for entry in chosen.state.log_history if "grad_norm" in entry]
    assert len(told) == 4
    assert [each.rows[0].total for each in gradients.summaries] == pytest.approx(told, rel=1e-4)


def spoil_fifth(weight: nn.Parameter) -> None:
    """Let its gradient be NaN in the fifth backward pass, which is in the third step."""
    backwards: list[None] = []

    def spoil(gradient: Tensor) -> Tensor:
        backwards.append(None)
        return gradient * (NAN if len(backwards) == 5 else 1.0)

    weight.register_hook(spoil)


@pytest.mark.run
def test_callback_halts_before_a_bad_step_is_applied_and_names_its_origin(tmp_path: Path):
    model = small_gpt2()
    weight = model.get_parameter("transformer.h.1.mlp.c_fc.weight")
    callback = trainer_callback(gradients=GradientMonitor(model, halt_on_nan=True))
    chosen = trainer(model, tmp_path, callback)
    spoil_fifth(weight)
    # Clipping then makes NaN of all gradients: only norms from before it know where it came from.
    with pytest.raises(NonFinite, match=r"step 3: the gradient of transformer\.h\.1\.mlp\.c_fc\.weight is not finite"):
        chosen.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.run
def test_trainer_without_a_monitor_loses_every_parameter_to_one_bad_gradient(tmp_path: Path):
    model = small_gpt2()
    spoil_fifth(model.get_parameter("transformer.h.1.mlp.c_fc.weight"))
    trainer(model, tmp_path).train()
    # Clipping by a norm that is NaN has made NaN of all gradients.
    assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.run
def test_callback_refuses_a_model_that_is_not_trained(tmp_path: Path):
    callback = trainer_callback(gradients=GradientMonitor(small_gpt2()))
    with pytest.raises(UserError, match="watch the model it trains"):
        trainer(small_gpt2(), tmp_path, callback).train()


@pytest.mark.run
def test_trainers_gradients_are_gone_by_the_end_of_a_step(tmp_path: Path):
    seen: dict[str, int] = {}

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["before the optimiser"] = with_gradient(kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["at the end"] = with_gradient(kwargs["model"])

    def with_gradient(model: nn.Module) -> int:
        return sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())

    model = small_gpt2(n_layer=1)
    trainer(model, tmp_path, Count(), max_steps=1).train()
    assert len([*model.parameters()]) == 16 and seen == {"before the optimiser": 16, "at the end": 0}


def test_norms_are_taken_at_the_last_backward_pass_alone():
    module, last = net(), [False]
    norms = BackwardNorms(dict(module.named_parameters()), is_last=lambda: last[0])
    norms.attach()
    for last[0] in (False, True):
        with pytest.raises(UserError) if not last[0] else nullcontext():
            module(torch.ones(1, 3)).sum().backward()
            names, found = norms.take()
    expected = [parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None]
    assert names == [name for name, _ in module.named_parameters()] and torch.equal(found, torch.stack(expected))


def test_callback_asks_for_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name.startswith("accelerate"):
            raise ImportError(name)
        return original(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install -e "\.\[lm\]"'):
        trainer_callback()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientMonitor(summary_every=0), "summary_every is 0"),
        (lambda: ActivationMonitor(net(), every=0), "every is 0"),
    ],
)
def test_monitors_refuse_to_look_never(make: Callable[[], Any], message: str):
    with pytest.raises(UserError, match=message):
        make()
