"""What runs paid while they learnt: a picture of `regret` over env steps, the runs of each world in one colour.

    python -m benchmarks.regrets logdir/tsp_few_steps-tsp_plan-tsp_lanes-seed* --out regret.png

Runs log it with `log_regret: true`: what all training tours so far cost above the best ones by true costs, in percent.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from comparing.runs import Series, UnreadableRunError, read
from config import ConfigError, one_line_errors
from system import safe_files
from system.terminal import Parser, show
from training import launch

INCHES = (6.0, 3.2)
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")


def curve(path: Path) -> tuple[str, Series]:
    """The world of a run, and the regret up to each of its rows.

    Raises:
        ConfigError: it is no run of ours, or has logged none.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder of a run")
    try:
        run = read(path)
    except UnreadableRunError as error:
        raise ConfigError(f"{path}: {error}") from error
    if run.config is None or "regret" not in run.series:
        raise ConfigError(f"{path} has logged no regret; train with --log_regret true")
    return str(run.config["cost"]), run.series["regret"]


def draw(runs: list[Path], out: Path) -> list[str]:
    """Draw the curves of all runs; what each of them has paid at its end, in a line."""
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    colors: dict[str, str] = {}
    lines = []
    for path in runs:
        world, regret = curve(path)
        label = None if world in colors else world
        color = colors.setdefault(world, COLORS[len(colors) % len(COLORS)])
        axes.plot(regret.steps, regret.values, color=color, label=label, linewidth=1)
        lines.append(f"{path}: {regret.values[-1]:.1f} % after {regret.steps[-1]:,.0f} env steps")
    axes.set(xlabel="env steps", ylabel="paid above the best tours, %", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    safe_files.make_folder(out.parent)
    figure.savefig(out, dpi=110, format="png")
    return lines


def main(argv: list[str]) -> None:
    """Read the command line and draw."""
    parser = Parser("regrets", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("regret.png"), help="the picture (default: regret.png)")
    arguments = parser.parse_args(argv)
    with one_line_errors("regrets", *launch.USER_ERRORS):
        if arguments.out.suffix != ".png" or arguments.out.is_dir():
            raise ConfigError(f"--out is {arguments.out}; give the name of a picture that ends in .png")
        show("\n".join([*draw(arguments.runs, arguments.out), str(arguments.out)]))


if __name__ == "__main__":
    main(sys.argv[1:])
