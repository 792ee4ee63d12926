"""Recovery from updates that keep failing: the last good state, kept in memory, and the way back to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from guard import Guard, NonFinite, culprit
from system.arrivals import Arrival
from system.ranks import here
from updates.diagnosis import bad_tensors
from updates.optimizer import Optimizer

# The most reports that one process makes. Faults that come again and again would fill the disk; they are counted all
# the same.
MOST_REPORTS = 20

Diagnose = Callable[[], dict[str, Any]]


class Outcome(NamedTuple):
    """How an update went, as the host will read it.

    Attributes:
        update: its number.
        flags: for each optimiser the updates skipped in a row, and whether the state is broken.
        diagnose: finds out why.
    """

    update: int
    flags: Arrival
    diagnose: Diagnose


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
        self._good: dict[str, Tensor] = {}
        self._pending: deque[Outcome] = deque()
        self._failing = False
        self._reports = 0
        self._cause = ""
        if guard.settings.enabled:
            self._take(self._state())

    def keep(self) -> None:
        """Take the state as it is now for good. Waits.

        Raises:
            NonFinite: it is not finite, so that nothing could be gone back to.
        """
        if not self.guard.settings.enabled:
            return
        state = self._state()
        require_finite(state)
        self._take(state)

    def _take(self, state: Mapping[str, Tensor]) -> None:
        self._good = {name: value.clone() for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters. The good state itself is not kept: a checkpoint is one."""
        return {"rollbacks": self.rollbacks, "rollbacks_in_row": self.rollbacks_in_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, with the state as it is now for the good one."""
        self.rollbacks, self.rollbacks_in_row = state["rollbacks"], state["rollbacks_in_row"]
        self.keep()

    def after_update(self, update: int, *, diagnose: Diagnose) -> bool:
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
        finite = _are_finite([p.detach() for optimizer in self.optimizers.values() for p in optimizer.parameters])
        if (update + 1) % settings.snapshot_every == 0:
            finite = finite & _are_finite(self._state().values())
            self._keep_if(finite & (skips == 0).all())
        flags = torch.cat((skips, (~finite)[None].to(skips.dtype)))
        self._pending.append(Outcome(update, Arrival(flags), diagnose))
        while self._pending and here().is_due(self._pending[0].flags, behind=len(self._pending) - 1):
            if self._judge(self._pending.popleft()):
                self._pending.clear()
                return True
        return False

    def mend(self) -> None:
        """Take up the good state if this one is not finite, as it may be between two looks at it. Waits."""
        if self.guard.settings.enabled and not bool(_are_finite(self._state().values())):
            self._restore()
            self.guard.notices.append("guard: the state is not finite: back to the last good one")

    def _judge(self, outcome: Outcome) -> bool:
        """Whether an update's outcome made it necessary to go back."""
        settings, update = self.guard.settings, outcome.update
        *in_row, broken = outcome.flags.read()
        skipped = [name for name, count in zip(self.optimizers, in_row, strict=True) if count]
        if not skipped and not broken:
            self._failing = False
            if (update + 1) % settings.snapshot_every == 0:
                # A good state was kept since the last return.
                self.rollbacks_in_row = 0
            return False
        verdict = "the state is not finite" if broken else f"skipped {', '.join(skipped)}"
        if not self._failing:
            self._failing = True
            self._report(update, verdict, outcome.diagnose)
        if not broken and max(in_row) < settings.max_skips:
            return False
        self._go_back(update, verdict if broken else f"{verdict} {max(in_row):.0f} times in a row")
        return True

    def _report(self, update: int, verdict: str, diagnose: Diagnose) -> None:
        self._reports += 1
        if self._reports > MOST_REPORTS:
            if self._reports == MOST_REPORTS + 1:
                self.guard.notices.append(f"guard: {MOST_REPORTS} events reported; from here on they are only counted")
            return
        state = bad_tensors("state", self._state())
        report = {"update": update, "verdict": verdict, "state": state, **diagnose()}
        self._cause = culprit(report)
        self.guard.notices.append(f"guard: update {update}: {verdict}; not finite: {self._cause}")
        self.guard.reports.append(report)

    def _go_back(self, update: int, verdict: str) -> None:
        settings = self.guard.settings
        self._restore()
        self.rollbacks += 1
        self.rollbacks_in_row += 1
        if self.rollbacks_in_row > settings.max_rollbacks:
            raise NonFinite(
                f"update {update}: {verdict}, and {settings.max_rollbacks} returns to the last good state have not"
                f" helped; not finite: {self._cause}"
            )
        self.guard.notices.append(
            f"guard: update {update}: {verdict}: back to the last good state, with half the learning rate for"
            f" {settings.recovery} updates"
        )

    def _restore(self) -> None:
        self._failing = False
        self._pending.clear()
        with torch.no_grad():
            for name, tensor in self._state().items():
                if name in self._good:
                    tensor.copy_(self._good[name])
                else:
                    # Moments that did not exist yet began at zero.
                    tensor.zero_()
        for optimizer in self.optimizers.values():
            optimizer.recover(self.guard.settings.recovery)

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that an update changes, by name."""
        state = module_state(self.modules)
        for prefix, optimizer in self.optimizers.items():
            state |= {f"{prefix} optimizer.{name}": value for name, value in optimizer.moments().items()}
        return state

    def _keep_if(self, good: Bool[Tensor, ""]) -> None:
        """Take the state as the last good one, if it is; decided on the device."""
        for name, value in self._state().items():
            if name in self._good:
                self._good[name].copy_(torch.where(good, value, self._good[name]))
            else:
                # Moments that appear in a bad update have zeros as their good state.
                self._good[name] = torch.where(good, value, torch.zeros_like(value))


def module_state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of some modules, by the modules' names and their own."""
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Check that a state is one to go on from. Waits.

    Raises:
        NonFinite: it is not finite.
    """
    # Without numbers, on the device "meta", sizes alone are looked at.
    if not any(value.is_meta for value in state.values()) and not bool(_are_finite(state.values())):
        first = next((finding["name"] for finding in bad_tensors("state", state)), "its norm")
        raise NonFinite(f"not finite: {first}")


def _are_finite(tensors: Iterable[Tensor]) -> Bool[Tensor, ""]:
    """Whether the floating-point ones among the tensors are finite, and so small that their norms are, too."""
    # A norm is several times faster than a maximum; where it overflows, the numbers are of no use either.
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.is_floating_point()])
    return torch.stack(norms).isfinite().all()
