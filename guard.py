"""The numerical guard: notices non-finite values on the device, names them, and keeps the report of each event.

`python -m guard logdir/guard/step_000012000.pt` prints a report.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from settings.run import GuardSettings
from system.terminal import show, tell


class NonFinite(RuntimeError):
    """Training met values that are NaN or infinite and could not get rid of them; the message says what to do."""


class Finding(NamedTuple):
    """A number that was watched and not finite: in which update first and last, and in how many."""

    update: int
    kind: str
    name: str
    times: int
    last: int


class Guard:
    """Counts non-finite values by name, on the device, and fetches the counts only when asked.

    Each kind of value ("observation", "model loss", "actor gradient") is watched once per update, in the order in
    which values flow, so that the first finding of the earliest update is the origin.

    Attributes:
        update: the number of the running update.
        notices: lines that the user should read. Whoever prints them empties the list.
        reports: what was found out about each event, to be saved; likewise.
    """

    def __init__(self, device: torch.device | str, settings: GuardSettings | None = None) -> None:
        self.device = device
        self.settings = settings or GuardSettings()
        self.update = 0
        self.notices: list[str] = []
        self.reports: list[dict[str, Any]] = []
        self._sites: dict[tuple[str, tuple[str, ...]], tuple[Tensor, Tensor, Tensor]] = {}

    def watch(self, kind: str, names: Sequence[str], values: Float[Tensor, " V"]) -> None:
        """Note which of the named numbers are non-finite in this update, without waiting for the device."""
        site = (kind, tuple(names))
        if site not in self._sites:
            never = torch.full((len(names),), -1, dtype=torch.int64, device=self.device)
            self._sites[site] = (never, never.clone(), torch.zeros_like(never))
        first, last, times = self._sites[site]
        bad = ~values.detach().isfinite()
        first.masked_fill_(bad & (first < 0), self.update)
        last.masked_fill_(bad, self.update)
        times.add_(bad)

    def watch_all(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """The same for whole floating-point tensors; other types can't be non-finite and are passed over."""
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        if tensors:
            # A sum is non-finite if any entry is; float64 so that large finite entries don't overflow it.
            sums = torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in tensors.values()])
            self.watch(kind, list(tensors), sums)

    def findings(self, *, since: int = 0) -> list[Finding]:
        """All that was not finite in update `since` or later, earliest first. Waits for the device."""
        found = []
        for (kind, names), counters in self._sites.items():
            for name, first, last, times in zip(names, *torch.stack(counters).tolist(), strict=True):
                if last >= since:
                    found.append(Finding(update=first, kind=kind, name=name, times=times, last=last))
        return sorted(found, key=lambda finding: max(finding.update, since))


def culprit(report: Mapping[str, Any]) -> str:
    """The first thing that was not finite, by a report."""
    for finding in (*report["state"], *report["findings"], *report["seen"]):
        return f"{finding['kind']} {finding['name']}"
    return "of unknown origin"


def describe(report: Mapping[str, Any]) -> str:
    """A saved report as text."""
    lines = [f"step {report['step']}, update {report['update']}: {report['verdict']}"]
    for title, part in (("in the agent's state", "state"), ("run again", "findings")):
        for finding in report[part]:
            lines.append(
                f"  {title}, {finding['kind']} {finding['name']}: shape {tuple(finding['shape'])},"
                f" {100 * finding['bad_share']:.3g} % not finite, the rest from {finding['min']:.4g} to"
                f" {finding['max']:.4g}"
            )
    if not report["findings"]:
        lines.append("  run again, all is finite: neither this batch nor the parameters bring it about")
    seen = [f"{finding['kind']} {finding['name']}" for finding in report["seen"]]
    if seen:
        lines.append(f"  seen in the update itself: {', '.join(seen)}")
    if report["rows"]:
        rows = ", ".join(f"({env}, {column})" for env, column in report["rows"])
        lines.append(f"  rows of replay (environment, column): {rows}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the reports that the arguments name; the exit status."""
    if argv[:1] in (["-h"], ["--help"]):
        show(__doc__ or "")
        return 0
    if not argv:
        tell("usage: python -m guard LOGDIR/guard/step_*.pt")
        return 2
    for path in argv:
        try:
            report = checkpoint.load(Path(path), torch.device("cpu"))
        except CheckpointError as error:
            tell(f"guard: {error}")
            return 2
        try:
            text = describe(report)
        except (KeyError, TypeError, ValueError, AttributeError):
            # A file from elsewhere may hold anything under these names.
            tell(f"guard: {path} is no report; those are in a run's folder guard")
            return 2
        show(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
