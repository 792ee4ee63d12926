"""Films an episode of Drive-v0: roads, traffic, lights, what the car may do in blue, and what it does in red.

    python -m benchmarks.driving_film --planner idm --seed 6 --out logdir/driving.gif

The first picture is also kept by itself, beside the film, as .png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.closed_loop import FIRST_SEED, WINDOW, planner_named
from driving.canvas import ROAD
from driving.drawing import PALETTE
from driving.maps import MAPS
from envs.driving import DriveEnv
from system import safe_files
from system.errors import UserError
from system.terminal import Parser, one_line_errors, show
from training import launch

# Pixels of the film's side, milliseconds of each picture, and shares of a colour in the edges between it and the road.
SIDE, PAUSE, EDGES = 360, 200, (1.0, 0.6, 0.3)


def film(name: str, map_name: str, seed: int) -> list[Image.Image]:
    """A picture of every half second of an episode."""
    decide = planner_named(name)
    env = DriveEnv(maps=[map_name], window=WINDOW, render_mode="rgb_array")
    try:
        obs, _ = env.reset(seed=seed)
        pictures, over = [env.render()], False
        while not over:
            decision = decide(obs)
            obs, _, terminated, truncated, _ = (env.drive if np.ndim(decision) else env.step)(decision)
            pictures, over = [*pictures, env.render()], terminated or truncated
    finally:
        env.close()
    return [Image.fromarray(picture) for picture in pictures if picture is not None]


def palette() -> Image.Image:
    """One palette for all pictures, so that nothing flickers and what is small keeps its colour."""
    shades = [
        round(share * part + (1 - share) * road)
        for colour in PALETTE
        for share in EDGES
        for part, road in zip(colour, ROAD, strict=True)
    ]
    image = Image.new("P", (1, 1))
    image.putpalette(shades)
    return image


def main(argv: list[str]) -> None:
    """Write the film, and say where it is."""
    parser = Parser("benchmarks.driving_film", description=__doc__)
    parser.add_argument("--planner", default="idm", help="as in benchmarks.closed_loop (default idm)")
    parser.add_argument("--map", default="ingolstadt", help=f"one of {', '.join(MAPS)}")
    parser.add_argument("--seed", type=int, default=0, help="another episode for each (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="the film, .gif")
    with one_line_errors("benchmarks.driving_film", OSError, *launch.USER_ERRORS):
        arguments = parser.parse_args(argv)
        if arguments.out.suffix != ".gif":
            raise UserError(f"--out is {arguments.out}; a film is a file .gif")
        if arguments.map not in MAPS:
            raise UserError(f"there is no map '{arguments.map}'; there are {', '.join(MAPS)}")
        pictures = film(arguments.planner, arguments.map, FIRST_SEED + arguments.seed)
        small = [picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for picture in pictures]
        colours = palette()
        first, *others = (picture.quantize(palette=colours, dither=Image.Dither.NONE) for picture in small)
        safe_files.make_folder(arguments.out.parent)
        with safe_files.replacing(arguments.out) as unfinished:
            first.save(unfinished, save_all=True, append_images=others, duration=PAUSE, loop=0)
        with safe_files.replacing(arguments.out.with_suffix(".png")) as unfinished:
            pictures[0].save(unfinished)
        show(f"{arguments.out}: {len(pictures)} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
