"""One optimiser per parameter group: schedule, clipping, and an update that is skipped on the device if not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import UserError
from guard import Guard
from system.ranks import here
from updates.compiling import Part

# The least norm that a parameter counts with in adaptive gradient clipping: one that starts at zero has to move, too.
SMALLEST_NORM = 1e-3


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al. 2020): gradients are normalised by their own size first, and averaged over time then.

    Like torch's fused Adam it changes nothing where `found_inf` is 1, and does not wait for the device to know.
    Gradients must then be zero or NaN.

    Both averages are kept without bias: at the t-th update the newest value weighs (1 - beta) / (1 - beta^t), which
    is the usual average from zero divided by 1 - beta^t. A weight of 0 leaves an average as it was.
    """

    found_inf: Float[Tensor, ""]

    def __init__(self, parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "updates": parameter.new_zeros(()),
                    "momentum": torch.zeros_like(parameter),
                    "square": torch.zeros_like(parameter),
                }
        applied = 1 - self.found_inf
        counts = [self.state[parameter]["updates"] for parameter in parameters]
        # These are doubles, since 1 - 0.999 has lost half its digits in single precision.
        times = torch.stack(counts).double() + 1
        # One tensor for all of them would be taken for a number, for which the host would have to wait.
        torch._foreach_add_(counts, [applied] * len(counts))
        momentum_weights, square_weights = (
            ((1 - beta) / (1 - beta**times) * applied).to(parameters[0].dtype).unbind() for beta in group["betas"]
        )
        rate = group["lr"] * applied
        moments = [(self.state[parameter]["momentum"], self.state[parameter]["square"]) for parameter in parameters]
        weights = list(zip(momentum_weights, square_weights, strict=True))
        gradients = [parameter.grad for parameter in parameters]
        self.move(parameters, gradients, moments, weights, rate=rate, eps=group["eps"])

    @torch.no_grad()
    def move(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[tuple[Tensor, Tensor]],
        weights: Sequence[tuple[Tensor, Tensor]],
        *,
        rate: Float[Tensor, ""],
        eps: float,
    ) -> None:
        """Move parameters by `rate`, and their averages of gradients and of squares by their newest values' weights."""
        # One parameter after the other: on a CPU the numbers are still in its cache for the next line, where
        # torch._foreach_* takes up to twice as long.
        for parameter, raw, (momentum, square), (momentum_weight, square_weight) in zip(
            parameters, gradients, moments, weights, strict=True
        ):
            # NaN times a weight of 0 would still be NaN.
            gradient = raw.nan_to_num_(0.0)
            buffer = gradient.square()
            square.lerp_(buffer, square_weight)
            # No `out=`, which a compiler refuses for convolutions, whose gradients lie in memory in another order.
            buffer.copy_(square).sqrt_().add_(eps)
            momentum.lerp_(gradient / buffer, momentum_weight)
            parameter.addcmul_(momentum, rate, value=-1)


# The epsilon that each algorithm is published with; LaProp's is DreamerV3's.
EPSILON = {"adam": 1e-8, "laprop": 1e-20}


class Optimizer:
    """Adam or LaProp with linear warm-up, a constant stretch and a linear decay, for the parameters of some modules.

    A non-finite loss or gradient leaves parameters and moments as they were; the decision is taken on the device.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        *,
        guard: Guard,
        lr: float,
        clip: float,
        agc: float = 0.0,
        weight_decay: float = 0.0,
        algorithm: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        warmup: int = 50,
        decay_from: float = 1.0,
        final_lr: float = 1.0,
    ) -> None:
        """Collect the parameters.

        Args:
            name: what metrics and reports call this group.
            modules: their names are the prefixes in reports.
            guard: told of every non-finite gradient.
            lr: the learning rate of the constant stretch.
            clip: the largest gradient norm over the whole group; infinity for no limit.
            agc: the largest norm of each parameter's gradient, as a share of the parameter's own norm (adaptive
                gradient clipping, Brock et al. 2021); 0 for no limit. Where `clip` asks for less, that holds.
            weight_decay: times the learning rate, the share of every matrix that each update takes away (Loshchilov
                and Hutter 2019). Vectors, biases among them, keep theirs, and so do tables of embeddings, of which an
                update teaches a few rows only.
            algorithm: adam or laprop.
            betas: how slowly the averages of gradients and of their squares forget.
            eps: added to the root of the squares; None for the algorithm's own.
            warmup: updates over which the rate rises from 0.
            decay_from: the share of the run at which the rate begins to fall.
            final_lr: the share of `lr` that is left at the run's end.
        """
        eps = EPSILON[algorithm] if eps is None else eps
        named = [(f"{prefix}.{key}", p) for prefix, module in modules.items() for key, p in module.named_parameters()]
        self.name, self.guard, self.algorithm = name, guard, algorithm
        self.names = [key for key, _ in named]
        self.parameters = [p for _, p in named]
        children = [child for module in modules.values() for child in module.modules()]
        tables = {id(child.weight) for child in children if isinstance(child, nn.Embedding)}
        self._decayed = {id(p) for p in self.parameters if p.dim() > 1} - tables
        self.lr, self.clip, self.agc, self.weight_decay, self.warmup = lr, clip, agc, weight_decay, warmup
        self.decay_from, self.final_lr = decay_from, final_lr
        self.updates, self.recovering_until = 0, 0
        self.skips = torch.zeros((), device=guard.device)
        # Each stream of updates has a count of its own, since an update of one says nothing of another.
        self.in_row: dict[str, Tensor] = {}
        # Each is told the names of the parameters and the norms of their gradients, before clipping: see monitors.py.
        self.observers: list[Callable[[Sequence[str], Tensor], None]] = []
        self.rule = self._make_rule(betas, eps)

    def _make_rule(self, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
        """The algorithm. It takes `found_inf`, a flag on the device under which it changes nothing."""
        if self.algorithm == "adam":
            return torch.optim.Adam(self.parameters, lr=self.lr, betas=betas, eps=eps, fused=True)
        return LaProp(self.parameters, betas=betas, eps=eps)

    def parts(self) -> list[Part]:
        """What pays to be compiled: PyTorch's own Adam is one kernel already."""
        return [Part(self.rule, "move")] if isinstance(self.rule, LaProp) else []

    def rate(self, progress: float) -> float:
        """The learning rate at this update and this share of the run."""
        rate = self.lr * min(1.0, (self.updates + 1) / max(1, self.warmup))
        if self.updates < self.recovering_until:
            rate /= 2
        if progress > self.decay_from:
            rate *= 1 - (1 - self.final_lr) * min(1.0, (progress - self.decay_from) / (1 - self.decay_from))
        return rate

    @property
    def skips_in_row(self) -> Float[Tensor, ""]:
        """Updates skipped one after another until now, in the stream that has most of them."""
        if not self.in_row:
            return torch.zeros((), device=self.guard.device)
        return torch.stack(list(self.in_row.values())).amax()

    def step(
        self, loss: Float[Tensor, ""], *, progress: float, stream: str = "together"
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Minimise `loss` once. Returns whether the update was applied (1 or 0) and metrics.

        Only this group's parameters get gradients, whatever else the loss depends on.
        """
        applied, metrics = update_together([(loss, [self])], progress=progress, stream=stream)
        return applied[self.name], metrics

    def apply(
        self,
        gradients: Sequence[Tensor | None],
        *,
        losses: Sequence[Float[Tensor, ""]],
        progress: float,
        stream: str = "together",
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """One update with the gradients of `losses`, if all are finite. Returns what `step` does.

        Args:
            gradients: one for each of `parameters`; those without one are left alone.
            losses: all that these gradients come from.
            progress: the share of the run that is over.
            stream: in which the updates that are skipped in a row are counted.
        """
        used = [(key, p, g) for key, p, g in zip(self.names, self.parameters, gradients, strict=True) if g is not None]
        assert used, f"no loss reaches a parameter of {self.name}"
        names, parameters, raw = zip(*used, strict=True)
        norms = torch.stack(torch._foreach_norm(raw))
        norm = norms.norm()
        self.guard.watch(f"{self.name} gradient", names, norms)
        for observe in self.observers:
            observe(names, norms)
        values = torch.stack([loss.detach() for loss in losses])
        found_inf = (~(norm.isfinite() & values.isfinite().all())).float()
        if not self.guard.settings.enabled:
            found_inf = torch.zeros_like(found_inf)
        self.skips = self.skips + found_inf
        self.in_row[stream] = (self.in_row.get(stream, torch.zeros_like(found_inf)) + found_inf) * found_inf
        for parameter in self.parameters:
            parameter.grad = None
        scales = self._scales(parameters, norms)
        # Where the update is not to be applied, each entry becomes zero or NaN.
        clipped = torch._foreach_mul(raw, (scales * (1 - found_inf)).unbind())
        for parameter, gradient in zip(parameters, clipped, strict=True):
            # Fused kernels take memory as it lies, and a gradient may come transposed.
            lies_alike = gradient.stride() == parameter.stride()
            parameter.grad = gradient if lies_alike else torch.empty_like(parameter).copy_(gradient)
        for group in self.rule.param_groups:
            group["lr"] = self.rate(progress)
        self.rule.found_inf = found_inf  # type: ignore[attr-defined]
        if decayed := [p for p in parameters if self.weight_decay and id(p) in self._decayed]:
            kept = 1 - self.rate(progress) * self.weight_decay * (1 - found_inf)
            with torch.no_grad():
                torch._foreach_mul_(decayed, kept)
        self.rule.step()
        self.updates += 1
        return 1 - found_inf, {
            f"{self.name}_grad_norm": norm,
            f"{self.name}_grad_norm_max": norm,
            f"{self.name}_grad_norm_clipped": (norms * scales).norm(),
            f"{self.name}_clip_rate": (norm > self.clip).float(),
            f"{self.name}_skips_max": self.skips,
        }

    def _scales(self, parameters: Sequence[nn.Parameter], norms: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """What each parameter's gradient is multiplied by to keep within both limits."""
        scale = (self.clip / (norms.norm() + 1e-6)).clamp(max=1.0).expand_as(norms)
        if not self.agc:
            return scale
        sizes = torch.stack(torch._foreach_norm([p.detach() for p in parameters])).clamp(min=SMALLEST_NORM)
        return torch.minimum(scale, self.agc * sizes / norms)

    def recover(self, updates: int) -> None:
        """Halve the learning rate for the next updates, and count skips anew."""
        self.recovering_until = self.updates + updates
        self.in_row = {}

    def moments(self) -> dict[str, Tensor]:
        """The algorithm's running averages and counts, by parameter and kind, as they are: for copying into."""
        named = zip(self.names, self.parameters, strict=True)
        return {
            f"{name}.{kind}": value
            for name, parameter in named
            if parameter in self.rule.state
            for kind, value in self.rule.state[parameter].items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Moments and counters."""
        return {
            self.algorithm: self.rule.state_dict(),
            "updates": self.updates,
            "recovering_until": self.recovering_until,
            "skips": self.skips,
            "in_row": dict(self.in_row),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            UserError: the state is another algorithm's.
            RuntimeError: it is of other parameters.
        """
        if self.algorithm not in state:
            (other,) = state.keys() & EPSILON.keys()
            raise UserError(
                f"optimiser {self.name}: the state to go on from is {other}'s, but the algorithm is {self.algorithm}; "
                f"choose {other}, or take the weights only"
            )
        self.rule.load_state_dict(state[self.algorithm])
        # PyTorch checks no shapes here, and its fused update would read and write beyond a moment that is too small.
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for kind, moment in self.rule.state.get(parameter, {}).items():
                if not isinstance(moment, Tensor) or moment.shape not in ((), parameter.shape):
                    raise RuntimeError(f"optimiser {self.name}: {kind} of {name} is not of that parameter's shape")
        for name in ("updates", "recovering_until", "skips"):
            setattr(self, name, state[name])
        self.in_row = dict(state["in_row"])


def update_together(
    losses: Sequence[tuple[Float[Tensor, ""], Sequence[Optimizer]]], *, progress: float, stream: str = "together"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Minimise the sum of some losses once, with one backward pass for all the parameter groups that they reach.

    A group is skipped where its own gradient or a loss that names it is not finite; the others go on.

    Args:
        losses: each with the optimisers of all the groups that it is to train. No two optimisers share a parameter,
            and no loss reaches a group that it doesn't name but another does: it would train that one, too.
        progress: the share of the run that is over, for schedules.
        stream: in which the updates that are skipped in a row are counted.

    Returns:
        Whether each group's update was applied (1 or 0), by the optimiser's name, and metrics.
    """
    optimizers = list(dict.fromkeys(optimizer for _, named in losses for optimizer in named))
    parameters = [parameter for optimizer in optimizers for parameter in optimizer.parameters]
    given = torch.autograd.grad([loss for loss, _ in losses], parameters, allow_unused=True)
    # All ranks go the same way: it is the mean over them that is clipped, judged and applied.
    means, values = here().average(given, [loss for loss, _ in losses])
    gradients = iter(means)
    applied: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for optimizer in optimizers:
        applied[optimizer.name], update_metrics = optimizer.apply(
            [next(gradients) for _ in optimizer.parameters],
            losses=[value for value, (_, named) in zip(values, losses, strict=True) if optimizer in named],
            progress=progress,
            stream=stream,
        )
        metrics |= update_metrics
    return applied, metrics
