"""What a cache holds for a filter, what was computed for it, and what is left out and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from scenarios.manifest import Entry


@dataclass
class Report:
    """A count of everything that went in.

    Attributes:
        entries: scenarios with samples, in the filter's order.
        computed: scenarios that had to be computed, those that turned out to be invalid among them.
        rows: samples of these, valid ones.
        seconds: that computing took; simulations are not counted.
        processor: seconds of a processor that it took, in all processes together.
        damaged: files that were there, and could not be read.
        invalid: scenarios that have no samples, by reason.
        left_out: stretches of logs that are no scenarios, scenarios that the filter does not take, and rows, by reason.
    """

    entries: list[Entry] = field(default_factory=list)
    computed: int = 0
    rows: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    damaged: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry) -> None:
        """Count a scenario as one with samples, or as an invalid one."""
        if entry.fault:
            self.invalid[entry.fault] += 1
        else:
            self.entries.append(entry)

    def lines(self) -> list[str]:
        """All of it in words."""
        samples = sum(entry.scenario.rows for entry in self.entries)
        logs = len({entry.scenario.log for entry in self.entries})
        types = Counter(entry.scenario.type for entry in self.entries)
        lines = [
            f"{len(self.entries):,} scenarios of {logs:,} logs, {samples:,} samples:"
            f" {', '.join(f'{count:,} {kind}' for kind, count in types.most_common())}"
        ]
        if self.computed:
            speeds = [self.rows / max(seconds, 1e-9) for seconds in (self.seconds, self.processor)]
            lines.append(
                f"computed {self.computed:,} scenarios, {self.rows:,} samples: {speeds[0]:,.0f} a second, and"
                f" {speeds[1]:,.0f} in each second of a processor"
            )
        else:
            lines.append("nothing was computed: all were there")
        if self.damaged:
            lines.append(f"{self.damaged:,} files were damaged, and were computed again")
        invalid = self.invalid.most_common()
        lines += [f"invalid, and not used: {count:,} scenarios, since {why}" for why, count in invalid]
        lines += [f"left out: {count:,} {why}" for why, count in self.left_out.most_common() if count]
        return lines
