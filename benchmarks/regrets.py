"""What runs paid while they learnt: a picture of `regret` over env steps, the runs of each world in one colour.

    python -m benchmarks.regrets logdir/tsp_few_steps-tsp_plan-tsp_lanes-seed* --out regret.png

Runs log it with `log_regret: true`: what all training tours so far cost above the best ones by true costs, in percent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import config
from config import ConfigError, one_line_errors
from system.terminal import Parser, show
from training import launch

INCHES = (6.0, 3.2)
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")


def curve(run: Path) -> tuple[list[int], list[float]]:
    """Env steps of a run, and the regret up to each.

    Raises:
        ConfigError: it is no run, or has logged none.
    """
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        raise ConfigError(f"{run} is no folder of a run: it has no metrics.jsonl") from None
    found = [(line["step"], line["regret"]) for line in lines if "regret" in line]
    if not found:
        raise ConfigError(f"{run} has logged no regret; train with --log_regret true")
    return [step for step, _ in found], [regret for _, regret in found]


def draw(runs: list[Path], out: Path) -> list[str]:
    """Draw the curves of all runs; what each of them has paid at its end, in a line."""
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    colors: dict[str, str] = {}
    lines = []
    for run in runs:
        steps, regrets = curve(run)
        world = str(config.read(run / "config.yaml")["cost"])
        label = None if world in colors else world
        color = colors.setdefault(world, COLORS[len(colors) % len(COLORS)])
        axes.plot(steps, regrets, color=color, label=label, linewidth=1)
        lines.append(f"{run}: {regrets[-1]:.1f} % after {steps[-1]:,} env steps")
    axes.set(xlabel="env steps", ylabel="paid above the best tours, %", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return lines


def main(argv: list[str]) -> None:
    """Read the command line and draw."""
    parser = Parser("regrets", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("regret.png"), help="the picture (default: regret.png)")
    arguments = parser.parse_args(argv)
    with one_line_errors("regrets", *launch.USER_ERRORS):
        show("\n".join([*draw(arguments.runs, arguments.out), str(arguments.out)]))


if __name__ == "__main__":
    main(sys.argv[1:])
