"""Plays every environment of zoo.txt for some steps with updates, and tells which ran and why others were refused.

    python -m benchmarks.zoo [PART-OF-A-TASK ...]

Each runs in a process of its own, by `dreamer.py` and the section `debug`, without an evaluation. Importing this module
registers environments with spaces that few have.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
from gymnasium import Space, spaces

ROOT = Path(__file__).resolve().parents[1]
ZOO = Path(__file__).with_suffix(".txt")
STEPS = 300
COMMAND = (
    *("--configs", "debug", "--device", "cpu", "--steps", str(STEPS), "--envs", "2", "--prefill", "60"),
    *("--train_ratio", "4", "--log_every", "100", "--eval_every", "0", "--eval_episodes", "0"),
    *("--checkpoint_every", str(STEPS)),
)
PATIENCE = 300.0


class Odd(gymnasium.Env):
    """Shows samples of its space, whatever is done; episodes last 20 steps."""

    observation_space: Space = spaces.Box(-1, 1, (3,))
    action_space: Space = spaces.Discrete(3)
    length: ClassVar[float] = 20

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action."""
        assert action in self.action_space
        self._time += 1
        return self.observation_space.sample(), float(self.np_random.random()), self._time >= self.length, False, {}


class OneStep(Odd):
    """Episodes of one step."""

    length = 1


class Endless(Odd):
    """An episode that never ends."""

    length = np.inf


class Unbounded(Odd):
    """Numbers without bounds, seen and done."""

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)


class FloatFrames(Odd):
    """Four stacked frames of floats."""

    observation_space = spaces.Box(0, 1, (4, 32, 40, 3), np.float32)


class Goal(Odd):
    """A dict as in goal-conditioned tasks, with a set of points and flags for those that are there."""

    observation_space = spaces.Dict(
        observation=spaces.Box(-1, 1, (5,)),
        desired_goal=spaces.Box(-1, 1, (2,)),
        points=spaces.Box(-1, 1, (6, 2)),
        points_mask=spaces.MultiBinary(6),
    )
    action_space = spaces.Box(-2, 2, (2,))


class TupleActions(Odd):
    """Choices in a tuple and a dict."""

    action_space = spaces.Tuple((spaces.Discrete(3), spaces.Dict(tools=spaces.MultiBinary(2))))


class Levels(Odd):
    """Whole numbers to be done."""

    action_space = spaces.Box(-2, 2, (3,), np.int32)


class MixedActions(Odd):
    """A choice beside a number."""

    action_space = spaces.Dict(gear=spaces.Discrete(3), throttle=spaces.Box(0, 1, (1,)))


class Words(Odd):
    """A text beside numbers."""

    observation_space = spaces.Dict(speed=spaces.Box(-1, 1, (2,)), note=spaces.Text(8))


class Quantity(Odd):
    """Whole numbers of a thousand values to be done."""

    action_space = spaces.Box(0, 999, (1,), np.int64)


ODD = {
    **{"ZooOneStep-v0": OneStep, "ZooEndless-v0": Endless, "ZooUnbounded-v0": Unbounded},
    **{"ZooFloatFrames-v0": FloatFrames, "ZooGoal-v0": Goal, "ZooTupleActions-v0": TupleActions},
    **{"ZooLevels-v0": Levels, "ZooMixedActions-v0": MixedActions, "ZooText-v0": Words, "ZooQuantity-v0": Quantity},
}
for _name, _kind in ODD.items():
    # This module is imported twice where it is the program.
    if _name not in gymnasium.registry:
        gymnasium.register(id=_name, entry_point=f"benchmarks.zoo:{_kind.__name__}")


class Outcome(NamedTuple):
    """How a run of one line ended.

    Attributes:
        line: of the zoo.
        ran: whether it came to its end.
        refused: whether it ended with one line of its program's.
        said: what it sees, or the last line that it told.
        seconds: that it took.
    """

    line: str
    ran: bool
    refused: bool
    said: str
    seconds: float

    @property
    def verdict(self) -> str:
        """In one word."""
        return "ran" if self.ran else "refused" if self.refused else "FAILED"


def read_zoo(path: Path = ZOO) -> list[str]:
    """The lines of a zoo that name an environment."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def arguments_of(line: str) -> list[str]:
    """The command line of `dreamer.py` that a line of the zoo stands for; a value goes on up to the next flag."""
    task, *flags = line.split(" --")
    parts = [flag.split(" ", 1) for flag in flags]
    return [*COMMAND, "--task", task, *(word for key, value in parts for word in (f"--{key}", value))]


def play(line: str, folder: Path) -> Outcome:
    """Run one line of the zoo, with what it writes in a folder of its own."""
    command = [sys.executable, "dreamer.py", *arguments_of(line), "--logdir", str(folder)]
    start = time.monotonic()
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Outcome(line, False, False, f"nothing for {PATIENCE:g} s", PATIENCE)
    told = finished.stderr.strip().splitlines()
    last = told[-1] if told else ""
    refused = finished.returncode == 2 and last.startswith("dreamer.py: ") and "Traceback" not in finished.stderr
    ran = finished.returncode == 0
    said = "; ".join(part.removeprefix("sees").strip() for part in told if _is_seen(part, told)) if ran else last
    return Outcome(line, ran, refused, said, time.monotonic() - start)


def _is_seen(part: str, told: list[str]) -> bool:
    """Whether a line of what a run tells in the beginning is about what it sees."""
    first = next((index for index, each in enumerate(told) if each.startswith("sees")), len(told))
    after = [index for index in range(first + 1, len(told)) if not told[index].startswith(" ")]
    return first <= told.index(part) < (after[0] if after else len(told))


def main(argv: list[str]) -> int:
    """Play the zoo, or those whose lines have one of the given parts; the status is 1 where one failed."""
    chosen = [line for line in read_zoo() if not argv or any(part in line for part in argv)]
    outcomes = []
    print("| environment | outcome | s | what it sees, or is told |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(chosen):
            outcome = play(line, Path(folder) / str(number))
            outcomes.append(outcome)
            said = outcome.said.removeprefix("dreamer.py: ").replace("|", r"\|")
            print(f"| `{outcome.line}` | {outcome.verdict} | {outcome.seconds:.0f} | {said} |", flush=True)
    counts = {word: sum(each.verdict == word for each in outcomes) for word in ("ran", "refused", "FAILED")}
    print("\n" + ", ".join(f"{count} {word}" for word, count in counts.items()) + f" of {len(outcomes)}")
    return int(counts["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
