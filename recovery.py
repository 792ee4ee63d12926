"""Recovery from updates that keep failing: the last good state, kept in memory, and the way back to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from guard import Guard, NonFinite
from optimizer import Optimizer


class Recovery:
    """Watches an agent's updates, and goes back to the last good state when they fail one after another.

    All flags are computed on the device. On a CPU they are read after every update; on another device they are copied
    behind its back and read when they have arrived, so that nothing waits.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], modules: Mapping[str, nn.Module], *, guard: Guard) -> None:
        """Keep the state as it is now.

        Args:
            optimizers: whose skipped updates count, and whose moments are part of the state.
            modules: their parameters and buffers are the rest of it.
            guard: its settings apply, and it is told what happens.
        """
        self.optimizers, self.modules, self.guard = optimizers, modules, guard
        self.rollbacks = 0
        self.rollbacks_in_row = 0
        self._snapshot: dict[str, Tensor] = {}
        self._pending: deque[tuple[int, Tensor, Any]] = deque()
        self._failing = False
        self.keep()

    def keep(self) -> None:
        """Take the state as it is now for good."""
        if self.guard.settings.enabled:
            self._snapshot = {name: value.clone() for name, value in self._state().items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters. The good state itself is not kept: a checkpoint is one."""
        return {"rollbacks": self.rollbacks, "rollbacks_in_row": self.rollbacks_in_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, with the state as it is now for the good one."""
        self.rollbacks, self.rollbacks_in_row = state["rollbacks"], state["rollbacks_in_row"]
        self.keep()

    def after_update(self, update: int, *, diagnose: Callable[[], dict[str, Any]]) -> bool:
        """Look at how the update went. Returns whether the last good state was taken up again.

        Args:
            update: its number.
            diagnose: finds out what went wrong in it; called for the first of a row of failures.

        Raises:
            NonFinite: the good state was taken up too often without getting anywhere.
        """
        settings = self.guard.settings
        if not settings.enabled:
            return False
        skips = torch.stack([optimizer.skips_in_row for optimizer in self.optimizers.values()])
        broken = torch.zeros((), dtype=torch.bool, device=skips.device)
        if update % settings.snapshot_every == settings.snapshot_every - 1:
            finite = self._state_is_finite()
            broken = ~finite
            self._keep_if(finite & (skips == 0).all())
        flags = torch.cat((skips, broken[None].to(skips.dtype)))
        for number, (*in_row, is_broken) in self._arrived(update, flags):
            if self._judge(number, in_row, bool(is_broken), update=update, diagnose=diagnose):
                self._pending.clear()
                return True
        return False

    def _judge(
        self,
        number: int,
        in_row: Sequence[float],
        is_broken: bool,
        *,
        update: int,
        diagnose: Callable[[], dict[str, Any]],
    ) -> bool:
        """Whether the flags of update `number` made it necessary to go back."""
        settings = self.guard.settings
        skipped = [name for name, count in zip(self.optimizers, in_row, strict=True) if count]
        if not skipped and not is_broken:
            self._failing = False
            if (number + 1) % settings.snapshot_every == 0:
                # A good state was kept since the last return.
                self.rollbacks_in_row = 0
            return False
        if not self._failing:
            self._failing = True
            verdict = f"skipped {', '.join(skipped)}" if skipped else "parameters or moments are not finite"
            self.guard.notices.append(f"guard: update {number}: {verdict}")
            self.guard.reports.append({"update": number, "verdict": verdict, **diagnose()})
        if not is_broken and max(in_row) < settings.max_skips:
            return False
        self._go_back(number)
        return True

    def _go_back(self, number: int) -> None:
        self.rollbacks += 1
        self.rollbacks_in_row += 1
        self._failing = False
        with torch.no_grad():
            for name, tensor in self._state().items():
                if name in self._snapshot:
                    tensor.copy_(self._snapshot[name])
                else:
                    # Moments that did not exist yet began at zero.
                    tensor.zero_()
        for optimizer in self.optimizers.values():
            optimizer.recover(self.guard.settings.recovery)
        if self.rollbacks_in_row > self.guard.settings.max_rollbacks:
            raise NonFinite(
                f"update {number} failed, as did all since {self.guard.settings.max_rollbacks} returns to the last good"
                " state"
            )
        self.guard.notices.append(
            f"guard: update {number}: back to the last good state, with half the learning rate for"
            f" {self.guard.settings.recovery} updates"
        )

    def _arrived(self, update: int, flags: Float[Tensor, " G"]) -> list[tuple[int, list[float]]]:
        """Flags of this and earlier updates that the host can read without waiting."""
        if flags.device.type == "cpu":
            return [(update, flags.tolist())]
        copied = flags.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((update, copied, event))
        arrived = []
        while self._pending and self._pending[0][2].query():
            number, values, _ = self._pending.popleft()
            arrived.append((number, values.tolist()))
        return arrived

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that an update changes, by name."""
        state: dict[str, Tensor] = {}
        for prefix, module in self.modules.items():
            state |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        for prefix, optimizer in self.optimizers.items():
            state |= {f"{prefix} optimizer.{name}": value for name, value in optimizer.moments().items()}
        return state

    def _state_is_finite(self) -> Bool[Tensor, ""]:
        floats = [value for value in self._state().values() if value.is_floating_point()]
        return torch.stack(torch._foreach_norm(floats, ord=float("inf"))).isfinite().all()

    def _keep_if(self, good: Bool[Tensor, ""]) -> None:
        """Take the state as the last good one, if it is; decided on the device."""
        for name, value in self._state().items():
            if name in self._snapshot:
                self._snapshot[name].copy_(torch.where(good, value, self._snapshot[name]))
            else:
                # Of moments that appear in a bad update, zeros are the good state.
                self._snapshot[name] = torch.where(good, value, torch.zeros_like(value))
