"""A picture of a tour that gets better: one map's greedy tour at some moments of a run, and LKH's beside them.

    python dreamer.py --configs tsp_attn --steps 50000 --checkpoint_every 2000 --checkpoint_numbered true \\
        --logdir logdir/picture
    python -m benchmarks.training_picture logdir/picture --steps 2000,4000,20000,50000 --map 14 \\
        --out training.png

Each moment is one of the checkpoints that `--checkpoint_numbered true` keeps; `--map` numbers the field's test set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.image import imsave
from PIL import Image

import solve
from config import ConfigError, one_line_errors
from routing.drawing import draw_tours
from routing.instances import TEST_SEED, reference_tour
from solving.answers import Solution
from solving.decoding import Decoding
from system.terminal import Parser, show
from training import launch
from training.tours import percent_above

# Five of them are as wide as a page, whose titles can still be read.
PANEL_INCHES = 2.2
CPU = torch.device("cpu")
COLORS = 64


def checkpoints(run: Path, steps: str | None) -> dict[int, Path]:
    """A run's numbered checkpoints by env step: those that are asked for, or all.

    Args:
        run: the run's folder.
        steps: env steps, separated by commas; the checkpoint next to each is taken.

    Raises:
        ConfigError: there are none, or the steps are no whole numbers.
    """
    found = {int(path.stem.removeprefix("step_")): path for path in sorted(run.glob("step_*.pt"))}
    if not found:
        raise ConfigError(f"{run} has no numbered checkpoints; train with --checkpoint_numbered true")
    if steps is None:
        return found
    if not all(part.strip().isdecimal() for part in steps.split(",")):
        raise ConfigError(f"--steps is {steps!r}; give env steps separated by commas, such as 2000,50000")
    nearest = [min(found, key=lambda step: abs(step - wanted)) for wanted in map(int, steps.split(","))]
    return {step: found[step] for step in nearest}


def draw(moments: dict[int, Path], out: Path, *, number: int) -> list[str]:
    """Draw the tours of the test set's map `number`; the titles of the picture's parts."""
    tours, titles = [], []
    for step, path in moments.items():
        agent = solve.load_agent(path, CPU)
        instance = solve.random_instances(agent, number + 1, agent.task.num_actions, TEST_SEED)[number]
        best = reference_tour(instance.cost_matrix())
        shortest = instance.tour_length(best)
        (found,) = solve.solve(agent, [instance], Decoding())
        assert isinstance(found, Solution) and found.length is not None, "the agent plays the maps of its training"
        tours.append(found.tour)
        titles.append(f"{step:,} steps, gap {percent_above(float(found.length), float(shortest)):.0f} %")
    pixels = draw_tours(instance.coords, [*tours, best], titles=[*titles, "LKH"], inches=PANEL_INCHES)
    out.parent.mkdir(parents=True, exist_ok=True)
    imsave(out, pixels)
    # Few colours are drawn, and a file that names them is a third as large.
    with Image.open(out) as picture:
        small = picture.convert("RGB").quantize(COLORS)
    small.save(out, optimize=True)
    return titles


def main(argv: list[str]) -> None:
    """Read the command line and draw."""
    parser = Parser("training_picture", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run that kept its checkpoints")
    parser.add_argument("--steps", help="moments of the run, in env steps, separated by commas (default: all)")
    parser.add_argument("--map", type=int, choices=range(1000), metavar="NUMBER", default=0, help="of the test set")
    parser.add_argument("--out", type=Path, default=Path("training.png"), help="the picture (default: training.png)")
    arguments = parser.parse_args(argv)
    with one_line_errors("training_picture", *launch.USER_ERRORS):
        titles = draw(checkpoints(arguments.run, arguments.steps), arguments.out, number=arguments.map)
        show("\n".join([*titles, str(arguments.out)]))


if __name__ == "__main__":
    main(sys.argv[1:])
