"""Monitors of gradients and activations, for any trainer: what they cost is meant to be too little to turn them off.

A trainer of one's own calls them:

    gradients, activations = GradientMonitor(model, summary_every=10), ActivationMonitor(model, every=100)
    with activations.step():
        loss(model).backward()
    gradients.step()  # before clipping
    optimizer.step()

An `Optimizer` of this repository hands over the norms that it computes anyway, and the `Trainer` of Hugging Face's
transformers takes them as a callback:

    optimizer.observers.append(gradients.observe)
    Trainer(..., callbacks=[trainer_callback(gradients=gradients, activations=activations)])
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import UserError
from guard import NonFinite

# Names in a summary: the first are enough, for one NaN reaches everything that comes after it.
MOST_NAMES = 10
# Summaries that a monitor keeps.
MOST_SUMMARIES = 100


class GradientRow(NamedTuple):
    """Norms of one step's gradients, before clipping.

    Attributes:
        step: its number, from 1.
        mean: over the parameters whose gradient is finite; likewise `largest` and `least`. NaN where there are none.
        largest: the largest.
        least: the least.
        total: of all gradients together.
    """

    step: int
    mean: float
    largest: float
    least: float
    total: float


class GradientSummary(NamedTuple):
    """What some steps' gradients were.

    Attributes:
        rows: one for each step.
        nan: gradients that held NaN: each parameter at each step counts.
        inf: gradients that held infinity, or were too large for their norm to be a number.
        names: the parameters of these, the first few, in order of appearance.
    """

    rows: list[GradientRow]
    nan: int
    inf: int
    names: list[str]

    def metrics(self) -> dict[str, float]:
        """For a log: means over the steps, but the largest and the least of them all."""
        rows = self.rows
        return {
            "gradient_norm_mean": sum(row.mean for row in rows) / len(rows),
            "gradient_norm_max": max(row.largest for row in rows),
            "gradient_norm_min": min(row.least for row in rows),
            "gradient_norm_total": sum(row.total for row in rows) / len(rows),
            "gradient_nan_count": float(self.nan),
            "gradient_inf_count": float(self.inf),
        }


def gradient_norms(parameters: Mapping[str, nn.Parameter]) -> tuple[list[str], Float[Tensor, " P"]]:
    """Names of the parameters that have a gradient, and its norms."""
    given = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return [*given], torch.stack([norm.float() for norm in torch._foreach_norm([*given.values()])])


class GradientMonitor:
    """Norms of every parameter's gradient, at every step; fetched from the device once in `summary_every` steps.

    Attributes:
        steps: that were seen.
        summaries: the last ones.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter] | None = None,
        *,
        summary_every: int = 10,
        halt_on_nan: bool = False,
        notify: Callable[[GradientSummary], None] | None = None,
    ) -> None:
        """Take what is watched.

        Args:
            model: whose parameters `step` reads, or these by name; None where only `observe` is called.
            summary_every: steps.
            halt_on_nan: raise at the step at which a gradient is not finite, before it is applied. Every step then
                waits for the device.
            notify: is called with each summary.

        Raises:
            UserError: a summary of no step.
        """
        if summary_every < 1:
            raise UserError(f"summary_every is {summary_every}; it must be at least 1")
        named = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model or {})
        self.parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self.summary_every, self.halt_on_nan, self.notify = summary_every, halt_on_nan, notify
        self.steps = 0
        self.summaries: deque[GradientSummary] = deque(maxlen=MOST_SUMMARIES)
        self._window: list[tuple[Sequence[str], Tensor]] = []

    def step(self) -> None:
        """Look at the gradients as they are: call it after `backward` and before they are clipped.

        Raises:
            NonFinite: one is not, and `halt_on_nan` is set.
            UserError: there are none.
        """
        if all(parameter.grad is None for parameter in self.parameters.values()):
            raise UserError(
                "no parameter has a gradient; call step() of the monitor after backward() and before zero_grad()"
            )
        self.observe(*gradient_norms(self.parameters))

    def observe(self, names: Sequence[str], norms: Float[Tensor, " P"]) -> None:
        """The same for a trainer that knows the norms of its gradients; a step's names may differ from another's.

        Raises:
            NonFinite: one is not, and `halt_on_nan` is set.
        """
        self.steps += 1
        self._window.append((names, norms.detach()))
        if self.halt_on_nan and not bool(norms.isfinite().all()):
            bad = [name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)]
            others = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
            raise NonFinite(
                f"step {self.steps}: the gradient of {bad[0]}{others} is not finite; lower the learning rate, or let "
                "torch.autograd.set_detect_anomaly(True) find the operation"
            )
        if len(self._window) == self.summary_every:
            self.summary()

    def summary(self) -> GradientSummary | None:
        """What the steps since the last summary were; None where there were none. Waits for the device."""
        if not self._window:
            return None
        window, self._window = self._window, []
        # One transfer for all steps.
        fetched = torch.cat([norms for _, norms in window]).cpu().split([len(names) for names, _ in window])
        rows: list[GradientRow] = []
        names: dict[str, None] = {}
        nan = inf = 0
        for number, ((step_names, _), norms) in enumerate(zip(window, fetched, strict=True), start=1):
            finite = norms[norms.isfinite()]
            known = [float(number) for number in (finite.mean(), finite.max(), finite.min())] if len(finite) else []
            mean, largest, least = known or [math.nan] * 3
            step = self.steps - len(window) + number
            rows.append(GradientRow(step, mean=mean, largest=largest, least=least, total=float(norms.norm())))
            nan += int(norms.isnan().sum())
            inf += int(norms.isinf().sum())
            if len(finite) < len(norms):
                bad = (~norms.isfinite()).nonzero().flatten().tolist()
                names |= dict.fromkeys(step_names[index] for index in bad)
        found = GradientSummary(rows, nan=nan, inf=inf, names=list(names)[:MOST_NAMES])
        self.summaries.append(found)
        if self.notify is not None:
            self.notify(found)
        return found


class ActivationRow(NamedTuple):
    """What a module gave in one step, over all its calls.

    Attributes:
        name: of the module, as the one above it calls it; empty for the whole.
        mean: of the absolute values that are finite.
        largest: of these.
        bad_share: the share of values that are not finite.
    """

    name: str
    mean: float
    largest: float
    bad_share: float


class ActivationSummary(NamedTuple):
    """What modules gave in one step.

    Attributes:
        step: its number, from 1.
        rows: one for each module that was called, in the order of their first calls.
        names: the modules that gave something that is not finite, the first few.
    """

    step: int
    rows: list[ActivationRow]
    names: list[str]

    def metrics(self) -> dict[str, float]:
        """For a log, over all modules."""
        return {
            "activation_mean": sum(row.mean for row in self.rows) / max(1, len(self.rows)),
            "activation_max": max((row.largest for row in self.rows), default=0.0),
            "activation_bad_share_max": max((row.bad_share for row in self.rows), default=0.0),
        }


class ActivationMonitor:
    """What a model's modules give, by hooks that are there at every n-th step alone.

    Watched are the modules without any below them, and the whole. What they give may be a tensor, or a sequence or
    mapping of them. Modules that were compiled show nothing of what is within.

    Attributes:
        steps: that were begun.
        summaries: the last ones.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, notify: Callable[[ActivationSummary], None] | None = None
    ) -> None:
        """Take what is watched.

        Args:
            model: whose modules.
            every: steps; the first is watched.
            notify: is called with each summary.

        Raises:
            UserError: `every` is less than 1.
        """
        if every < 1:
            raise UserError(f"every is {every}; it must be at least 1")
        self.every, self.notify = every, notify
        self.steps = 0
        self.summaries: deque[ActivationSummary] = deque(maxlen=MOST_SUMMARIES)
        named = model.named_modules()
        self._modules = [(name, module) for name, module in named if not name or not any(module.children())]
        self._handles: list[Any] = []
        self._seen: list[tuple[str, Tensor]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, which may have any number of forward passes."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Begin a step, for those who cannot use `step`."""
        self._forget()
        self.steps += 1
        if (self.steps - 1) % self.every == 0:
            self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules]

    def end(self) -> ActivationSummary | None:
        """End it; the summary, if this one was watched. Waits for the device then."""
        if not self._handles:
            return None
        seen = self._seen
        self._forget()
        calls: dict[str, list[list[float]]] = {}
        if seen:
            for (name, _), values in zip(seen, torch.stack([values for _, values in seen]).tolist(), strict=True):
                calls.setdefault(name, []).append(values)
        rows = []
        for name, values in calls.items():
            total, largest, finite, count = zip(*values, strict=True)
            rows.append(
                ActivationRow(
                    name,
                    mean=sum(total) / sum(finite) if sum(finite) else math.nan,
                    largest=max(largest),
                    bad_share=1 - sum(finite) / sum(count),
                )
            )
        bad = [row.name for row in rows if row.bad_share > 0]
        found = ActivationSummary(self.steps, rows, names=bad[:MOST_NAMES])
        self.summaries.append(found)
        if self.notify is not None:
            self.notify(found)
        return found

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._seen.extend((name, _measure(tensor)) for tensor in _floats(output))

        return hook

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], []


@torch.no_grad()
def _measure(tensor: Tensor) -> Float[Tensor, "4"]:
    """Sum and largest of the absolute values that are finite, how many these are, and how many there are."""
    sizes = tensor.detach().abs()
    finite = sizes.isfinite()
    sizes = sizes.nan_to_num(nan=0.0, posinf=0.0)
    count = torch.full((), float(tensor.numel()), dtype=torch.float64, device=tensor.device)
    return torch.stack((sizes.sum(dtype=torch.float64), sizes.amax().double(), finite.sum().double(), count))


def _floats(output: Any) -> list[Tensor]:
    """The tensors of an output that can be other than finite, and have values."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for part in output for tensor in _floats(part)] if isinstance(output, (tuple, list)) else []


class BackwardNorms:
    """Norms of gradients as the last backward pass of a step leaves them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, is_last: Callable[[], bool]) -> None:
        self._parameters, self._is_last = parameters, is_last
        self._handles: list[Any] = []
        self._queued = False
        self._found: tuple[list[str], Tensor] | None = None

    def attach(self) -> None:
        """Begin."""
        self.detach()
        for parameter in self._parameters.values():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook))

    def detach(self) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._queued, self._found = [], False, None

    def take(self) -> tuple[list[str], Float[Tensor, " P"]]:
        """Names of the parameters that had a gradient by the end of the last backward pass, and its norms.

        Raises:
            UserError: there are none.
        """
        if self._found is None:
            raise UserError("the Trainer's model has none of the monitor's parameters; watch the model it trains")
        found, self._found = self._found, None
        return found

    def _hook(self, _parameter: Tensor) -> None:
        # One call of `torch._foreach_norm` after the whole pass is several times faster than a norm in each hook.
        if not self._queued and self._is_last():
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._measure)  # type: ignore[attr-defined]

    def _measure(self) -> None:
        self._queued = False
        self._found = gradient_norms(self._parameters)


def trainer_callback(*, gradients: GradientMonitor | None = None, activations: ActivationMonitor | None = None) -> Any:
    """A callback for the `Trainer` of Hugging Face's transformers. Summaries go to its `state.log_history`, too.

    That trainer clips before `on_pre_optimizer_step`, and its gradients are gone by `on_step_end`; so norms are taken
    by hooks on the parameters, at the last backward pass of each step, when what was accumulated is complete. Under
    float16 they are those of the scaled loss, and where several processes train together of this one's own batch.

    Raises:
        UserError: transformers or accelerate is not installed.
    """
    try:
        from accelerate.state import GradientState
        from transformers import TrainerCallback
    except ImportError as error:
        raise UserError(f'a Trainer needs transformers and accelerate ({error}): pip install -e ".[lm]"') from error

    # What Trainer tells accelerate: whether an optimiser's step follows on this backward pass.
    accumulation = GradientState()
    parameters = {} if gradients is None else gradients.parameters
    backward = BackwardNorms(parameters, is_last=lambda: accumulation.sync_gradients)

    class MonitorCallback(TrainerCallback):
        """Calls the monitors when Trainer calls it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
            """Hook the parameters."""
            backward.attach()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
            """The forward passes come after this."""
            if activations is not None:
                activations.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
            """The backward passes are over, and nothing has been applied yet."""
            if gradients is None:
                return
            try:
                gradients.observe(*backward.take())
            except NonFinite:
                backward.detach()
                raise
            if gradients.steps % gradients.summary_every == 0:
                state.log_history.append({**gradients.summaries[-1].metrics(), "step": state.global_step + 1})

        def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
            """The step is over."""
            found = activations.end() if activations is not None else None
            if found is not None:
                state.log_history.append({**found.metrics(), "step": state.global_step})

        def on_train_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
            """Take the hooks away; the last steps have a summary, too."""
            backward.detach()
            if gradients is not None:
                gradients.summary()

    return MonitorCallback()
