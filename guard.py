"""The numerical guard: notices non-finite values on the device, and names the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class NonFinite(RuntimeError):
    """Training met a value that is NaN or infinite; the message names it and says what to do."""


class Finding(NamedTuple):
    """One tensor that was not finite."""

    update: int
    kind: str
    name: str
    times: int


class Guard:
    """Counts non-finite values by name, on the device, and fetches the counts only when asked.

    Each kind of value ("observation", "model loss", "actor gradient") is watched once per update, in the order in
    which values flow, so that the first finding of the earliest update is the origin.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.update = 0
        self._sites: dict[tuple[str, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    def watch(self, kind: str, names: Sequence[str], values: Float[Tensor, " V"]) -> None:
        """Note which of the named numbers are non-finite in this update, without waiting for the device."""
        site = (kind, tuple(names))
        if site not in self._sites:
            never = torch.full((len(names),), -1, dtype=torch.int64, device=self.device)
            self._sites[site] = (never, torch.zeros_like(never))
        first, times = self._sites[site]
        bad = ~values.detach().isfinite()
        self._sites[site] = (torch.where(bad & (first < 0), self.update, first), times + bad)

    def watch_all(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """The same for whole floating-point tensors; other types can't be non-finite and are passed over."""
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        if tensors:
            # A sum is non-finite if any entry is; float64 so that large finite entries don't overflow it.
            sums = torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in tensors.values()])
            self.watch(kind, list(tensors), sums)

    def findings(self) -> list[Finding]:
        """All that was not finite so far, earliest first. Waits for the device: call at log time only."""
        found = []
        for (kind, names), counters in self._sites.items():
            for name, first, times in zip(names, *torch.stack(counters).tolist(), strict=True):
                if times:
                    found.append(Finding(update=first, kind=kind, name=name, times=times))
        return sorted(found, key=lambda finding: finding.update)

    def report(self) -> str | None:
        """One line that names the first non-finite value, or None while all is well."""
        found = self.findings()
        if not found:
            return None
        first = found[0]
        others = f", and {len(found) - 1} more after it" if len(found) > 1 else ""
        return f"the first non-finite value is {first.kind} {first.name!r}, in update {first.update}{others}"
