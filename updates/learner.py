"""An agent's updates: applied to each group of parameters, watched, explained where they fail, and gone back on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import checkpoint
from guard import Guard
from system.ranks import here
from updates.compiling import compiled_parts
from updates.diagnosis import diagnose
from updates.optimizer import Optimizer, update_together
from updates.recovery import Recovery, module_state, require_finite

# Each loss with the names of all the groups that it trains.
LossGroups = list[tuple[Tensor, tuple[str, ...]]]
Metrics = dict[str, Tensor]
Batch = Mapping[str, Tensor]


class Computed(NamedTuple):
    """An update's losses and metrics, and what its agent wants handed back of what the losses saw."""

    losses: LossGroups
    metrics: Metrics
    seen: Any = None


Compute = Callable[[], Computed]


class Attempt(NamedTuple):
    """An update that was tried: its losses, the batch and random numbers they came from, and whether it was applied."""

    compute: Compute
    batch: Batch
    draws: dict[str, Tensor]
    applied: Float[Tensor, ""]


class Learner:
    """The groups of parameters that an agent trains, each with its optimiser, and what keeps them finite.

    Optimisers and the way back are made when the first update, or a state to go on from, needs them: an agent that only
    acts has none.
    """

    def __init__(
        self,
        make_optimizers: Callable[[], Mapping[str, Optimizer]],
        *,
        modules: Mapping[str, nn.Module],
        watched: Mapping[str, nn.Module],
        follow: Callable[[dict[str, Tensor]], None],
        generators: Mapping[str, torch.Generator],
        guard: Guard,
    ) -> None:
        """Keep what is needed to make the optimisers.

        Args:
            make_optimizers: makes one per group, by the group's name.
            modules: all that an update changes beside the optimisers, slow copies and statistics included.
            watched: where a report looks for the first output that was not finite.
            follow: lets slow copies and statistics follow an update, given for each group whether it was applied (1)
                or skipped (0); with nothing but zeros it takes back what computing the losses has changed.
            generators: all that losses draw from, and `replay`.
            guard: told of everything that is not finite.
        """
        self.watched, self.generators, self.guard = watched, generators, guard
        self.follow = follow
        self.updates = 0
        self._make_optimizers, self._modules = make_optimizers, modules
        self._alone: list[Attempt] = []

    @cached_property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """One per group, by the group's name."""
        return self._make_optimizers()

    @cached_property
    def recovery(self) -> Recovery:
        """The way back from updates that fail; the state as it is at the first use is the first good one."""
        return Recovery(self.optimizers, self._modules, guard=self.guard)

    @property
    def has_begun(self) -> bool:
        """Whether there are optimisers, and with them a state to go back to."""
        return "recovery" in vars(self)

    def keep(self) -> None:
        """Take the parameters as they are now for good, since they were loaded. Waits.

        Raises:
            NonFinite: they are not finite.
        """
        if self.has_begun:
            self.recovery.keep()
        elif self.guard.settings.enabled:
            require_finite(module_state(self._modules))

    def mend(self) -> None:
        """Take up the last good state if this one is not finite. Waits."""
        if self.has_begun:
            self.recovery.mend()

    def update_alone(self, name: str, compute: Compute, *, batch: Batch, progress: float) -> Metrics:
        """Minimise the one loss of `compute` for the group `name`; the next `update` judges how this went, too.

        Its skips are counted for themselves: that it goes well says nothing of updates of all groups together.
        """
        _ = self.recovery  # It keeps the first good state, before anything is changed.
        draws = checkpoint.generator_state(self.generators)
        ((loss, _),), metrics, _ = compute()
        applied, _ = self.optimizers[name].step(loss, progress=progress, stream="alone")
        self._alone.append(Attempt(compute, batch, draws, applied))
        return metrics

    def update(self, compute: Compute, *, batch: Batch, progress: float) -> tuple[Metrics, Any]:
        """Minimise the losses once; if updates keep failing, go back to the last good state.

        Gives metrics, and what the losses have seen.

        Args:
            compute: gives losses and metrics. It is called again, with the same random numbers, where they were not
                finite, to find out why.
            batch: what it computes them from.
            progress: the share of the run that is over, for schedules.
        """
        _ = self.recovery  # It keeps the first good state, before anything is changed.
        draws = checkpoint.generator_state(self.generators)
        losses, metrics, seen = compute()
        applied, update_metrics = update_together(self._with_optimizers(losses), progress=progress)
        self.follow(applied)
        together = Attempt(compute, batch, draws, torch.stack(list(applied.values())).amin())
        attempts, self._alone = [*self._alone, together], []

        # On a GPU it is called some updates later, so it has to know which one it is about.
        def find_cause(update: int = self.updates) -> dict[str, Any]:
            failed = next((attempt for attempt in attempts if not bool(attempt.applied)), together)
            return self._find_cause(failed, update=update, take_back=failed is together)

        if self.recovery.after_update(self.updates, diagnose=find_cause):
            # Otherwise the same batches would be drawn again.
            self.generators["replay"].manual_seed(self.updates + (here().index << 32))
        self.updates += 1
        rollbacks = torch.full((), float(self.recovery.rollbacks), device=losses[0][0].device)
        return metrics | update_metrics | {"rollbacks_max": rollbacks}, seen

    def _with_optimizers(self, losses: LossGroups) -> list[tuple[Tensor, list[Optimizer]]]:
        return [(loss, [self.optimizers[name] for name in names]) for loss, names in losses]

    def _find_cause(self, attempt: Attempt, *, update: int, take_back: bool) -> dict[str, Any]:
        """Compute an update's losses again with the noise it had, to find what was not finite; changes nothing.

        Statistics that the losses move are taken back on request.
        """
        now = checkpoint.generator_state(self.generators)
        checkpoint.restore_generators(self.generators, attempt.draws)

        def run_again() -> list[tuple[Tensor, dict[str, Tensor]]]:
            return [
                (loss, {name: p for each in named for name, p in zip(each.names, each.parameters, strict=True)})
                for loss, named in self._with_optimizers(attempt.compute().losses)
            ]

        try:
            # Hooks do not see into compiled parts, whose graphs cannot be gone through twice either.
            with compiled_parts("none", learning=False):
                return diagnose(run_again, modules=self.watched, batch=attempt.batch, guard=self.guard, update=update)
        finally:
            checkpoint.restore_generators(self.generators, now)
            if take_back:
                self.follow({name: each.parameters[0].new_zeros(()) for name, each in self.optimizers.items()})

    def state_dict(self) -> dict[str, Any]:
        """Optimisers and counters. Call `mend` before saving parameters."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "recovery": self.recovery.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, with the parameters as they are now for the good ones."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.recovery.load_state_dict(state["recovery"])
        self.updates = state["updates"]
