"""Replay in the host's memory, for a device that learns and has less of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from system import arrivals
from tools import Bounds
from training.replay import Replay
from training.ring import Spaces

HOST = torch.device("cpu")


class HostReplay(Replay):
    """Rows stay with the host; batches are gathered there and sent to the device that learns.

    All numbers are those of a `Replay` with the same draws: nothing in a batch is stale. What an update rewrites comes
    back while the host goes on, and is put in place before memory is next read, or anything is added or saved. No batch
    is drawn ahead of its update, since rows that come in between would be missing in it; but its rows are gathered
    while the device is still busy with the update before, and only the latents that its windows go on from, one of
    each, have to wait for that.

    The host waits for a row that is added, as the next batch may need it. It waits for no batch that it sends.
    Generators handed to the samplers live on the host, as `device` says.
    """

    def __init__(
        self,
        spaces: Spaces,
        *,
        num_envs: int,
        capacity: int,
        learns_on: torch.device,
        memory: Spaces | None = None,
        rows_to_come: int | None = None,
    ) -> None:
        """Make room in the host's memory, which is taken as the ring fills.

        Args:
            spaces: as for `Replay`, as are the others.
            num_envs: likewise.
            capacity: likewise.
            learns_on: the device that rows come from and batches go to.
            memory: likewise.
            rows_to_come: likewise.

        Raises:
            UserError: as `Replay`.
        """
        super().__init__(
            spaces, num_envs=num_envs, capacity=capacity, device=HOST, memory=memory, rows_to_come=rows_to_come
        )
        self.learns_on = learns_on
        self._coming: dict[str, Tensor] = {}
        self._mark: Any = None

    def add(self, row: Mapping[str, Tensor]) -> None:
        """As `Replay.add`, of a row on the device that learns. Waits for it."""
        self._settle()
        here, mark = self._fetched(row)
        if mark is not None:
            mark.synchronize()
        super().add(here)

    @property
    def rewards(self) -> Bounds:
        """As `Replay.rewards`, on the device that learns."""
        return Bounds(self._sent(self.reward_min), self._sent(self.reward_max))

    def rewrite(self, batch: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
        """As `Replay.rewrite`, in a while: nothing waits for what is to be written."""
        self._settle()
        place = {name: batch[name] for name in ("env", "column")}
        self._coming, self._mark = self._fetched({**place, **memory})

    def save_chunks(self, folder: Path, *, emergency: bool = False, numbered: bool = False) -> dict[str, Any]:
        """As `Replay.save_chunks`."""
        self._settle()
        return super().save_chunks(folder, emergency=emergency, numbered=numbered)

    def _settle(self) -> None:
        """Put what was to be rewritten in place."""
        if not self._coming:
            return
        if self._mark is not None:
            self._mark.synchronize()
        coming, self._coming = self._coming, {}
        super().rewrite(coming, {name: coming[name] for name in self.memory})

    def _fetched(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Copies on the host, and a mark that says when they are there; None where they are."""
        here = {name: value.to(HOST, non_blocking=True, copy=True) for name, value in tensors.items()}
        return here, None if self.learns_on.type == "cpu" else arrivals.mark(self.learns_on)

    def _sent(self, value: Tensor) -> Tensor:
        """The same on the device that learns, behind all that it has been asked to do."""
        # From other memory the host would wait for the copy, and for all work before it.
        if self._pins and not value.is_pinned():
            value = value.contiguous().pin_memory()
        return value.to(self.learns_on, non_blocking=True)

    @property
    def _pins(self) -> bool:
        return self.learns_on.type == "cuda"

    def _windows(self, env: Int[Tensor, " B"], start: Int[Tensor, " B"], length: int) -> dict[str, Tensor]:
        return {name: self._sent(value) for name, value in super()._windows(env, start, length).items()}

    def _memory_at(self, env: Int[Tensor, " B"], position: Int[Tensor, " B"]) -> dict[str, Shaped[Tensor, "B *S"]]:
        self._settle()
        return super()._memory_at(env, position)

    def _gathered(
        self, stored: Shaped[Tensor, "E L *S"], env: Int[Tensor, "*#B"], position: Int[Tensor, "*B"]
    ) -> Shaped[Tensor, "*B *S"]:
        # At once into memory that the device can take it from.
        rows = (env * self.length + position).flatten()
        out = torch.empty((len(rows), *stored.shape[2:]), dtype=stored.dtype, device=HOST, pin_memory=self._pins)
        torch.index_select(stored.flatten(0, 1), 0, rows, out=out)
        return out.unflatten(0, position.shape)
