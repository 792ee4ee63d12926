"""One optimiser per parameter group: schedule, clipping, and an update that is skipped on the device if not finite."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guard import Guard


class Optimizer:
    """Adam with linear warm-up, a constant stretch and a linear decay, for the parameters of some modules.

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
        warmup: int = 50,
        decay_from: float = 1.0,
        final_lr: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        """Collect the parameters.

        Args:
            name: what metrics and reports call this group.
            modules: their names are the prefixes in reports.
            guard: told of every non-finite loss and gradient.
            lr: the learning rate of the constant stretch.
            clip: the largest gradient norm over the whole group.
            warmup: updates over which the rate rises from 0.
            decay_from: the share of the run at which the rate begins to fall.
            final_lr: the share of `lr` that is left at the run's end.
            eps: Adam's epsilon.

        Raises:
            ValueError: a parameter of the schedule is out of range.
        """
        if not (lr > 0 and clip > 0 and warmup >= 0 and 0 <= decay_from <= 1 and 0 <= final_lr <= 1):
            raise ValueError(
                f"optimiser {name}: lr and clip must be positive, warmup at least 0, decay_from and final_lr in [0, 1];"
                f" got lr {lr}, clip {clip}, warmup {warmup}, decay_from {decay_from}, final_lr {final_lr}"
            )
        named = [(f"{prefix}.{key}", p) for prefix, module in modules.items() for key, p in module.named_parameters()]
        self.name, self.guard = name, guard
        self.names = [key for key, _ in named]
        self.parameters = [p for _, p in named]
        self.lr, self.clip, self.warmup = lr, clip, warmup
        self.decay_from, self.final_lr = decay_from, final_lr
        self.updates = 0
        # The fused kernel takes `found_inf`, a flag on the device under which it changes nothing.
        self.adam = torch.optim.Adam(self.parameters, lr=lr, eps=eps, fused=True)

    def rate(self, progress: float) -> float:
        """The learning rate at this update and this share of the run."""
        rate = self.lr * min(1.0, (self.updates + 1) / max(1, self.warmup))
        if progress > self.decay_from:
            rate *= 1 - (1 - self.final_lr) * min(1.0, (progress - self.decay_from) / (1 - self.decay_from))
        return rate

    def step(self, loss: Float[Tensor, ""], *, progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Minimise `loss` once. Returns whether the update was applied (1 or 0) and metrics.

        Only this group's parameters get gradients, whatever else the loss depends on.
        """
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        used = [(key, p, g) for key, p, g in zip(self.names, self.parameters, gradients, strict=True) if g is not None]
        norms = torch.stack(torch._foreach_norm([g for _, _, g in used]))
        norm = norms.norm()
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        clipped = torch._foreach_mul([g for _, _, g in used], scale)
        for parameter in self.parameters:
            parameter.grad = None
        for (_, parameter, _), gradient in zip(used, clipped, strict=True):
            parameter.grad = gradient
        found_inf = (~(norm.isfinite() & loss.detach().isfinite())).float()
        self.guard.watch(f"{self.name} gradient", [key for key, _, _ in used], norms)
        for group in self.adam.param_groups:
            group["lr"] = self.rate(progress)
        self.adam.found_inf = found_inf  # type: ignore[attr-defined]
        self.adam.step()
        self.updates += 1
        return 1 - found_inf, {
            f"{self.name}_grad_norm": norm,
            f"{self.name}_grad_norm_max": norm,
            f"{self.name}_loss": loss.detach(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Moments and counters."""
        return {"adam": self.adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.adam.load_state_dict(state["adam"])
        self.updates = state["updates"]
