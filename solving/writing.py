"""Writes solutions: as the files of their problems, and as pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from tqdm import tqdm

from config import ConfigError
from routing.cost_world import Costs
from routing.drawing import draw_tour
from routing.files import RoutingInstance
from routing.layout import shown_at
from routing.metrics import is_paid
from routing.solutions import solution_path, write_solution
from solving import answers
from solving.answers import Solution
from solving.frames import as_instance
from system.safe_files import replacing


def picture_of(solution: Solution, costs: Costs | None) -> UInt8[np.ndarray, "H W 3"]:
    """The tour on a map; `costs` is the world of the run that solved it, None without one."""
    instance = solution.instance
    length = answers.length_text(solution.length, instance.metric)
    if costs is not None and is_paid(instance.metric):
        coords = torch.from_numpy(instance.coords)[None]
        # Maps of streets are narrow, and have no room for all that the table says.
        title = f"{instance.name}: {_expected(solution) or length}"
        note = solution.chooser if solution.length is None else f"in truth {length}; {solution.chooser}"
        return costs.picture(as_instance([instance], coords), solution.tour, title=title, note=note)
    title = f"{instance.name}: length {length}"
    if solution.gap is not None:
        title += f", {solution.gap:.2f} % above the reference"
    note = f"chosen by {solution.chooser}"
    if not instance.coords.shape[1]:
        note += "; places laid out by costs, not where they are"
    return draw_tour(shown_at(instance), solution.tour, title=title, note=note)


def _expected(solution: Solution) -> str:
    """What a tour is expected to cost, within bounds where there are any; empty where nobody expects anything."""
    if solution.forecast is None:
        return ""
    return (
        f"expected {answers.bounds(solution) or answers.length_text(solution.forecast.cost, solution.instance.metric)}"
    )


def write(solution: Solution, folder: Path, costs: Costs | None) -> None:
    """Write the solution to `folder` as its problem's files do, and its picture; `costs` as for `picture_of`."""
    instance = solution.instance
    expected = None if solution.forecast is None else solution.forecast.cost
    write_solution(solution_path(folder, instance), instance, solution.tour, expected=expected)
    picture = picture_of(solution, costs)
    # Most calls write no picture, and matplotlib takes longer to import than a tour to find.
    from matplotlib.image import imsave

    with replacing(folder / f"{instance.name}.png") as temporary:
        imsave(temporary, picture)


def check_output(folder: Path, found: Sequence[tuple[Path, RoutingInstance]]) -> None:
    """Check that solutions can be written to a folder, each to files of its own.

    Raises:
        ConfigError: they cannot.
    """
    name, count = max(Counter(instance.name for _, instance in found).items(), key=itemgetter(1), default=("", 0))
    if count > 1:
        raise ConfigError(f"several instances are called {name}, and so would be their tours; solve them apart")
    for path, instance in found:
        if solution_path(folder, instance).resolve() == path.with_suffix(".sol").resolve():
            raise ConfigError(
                f"--out {folder}: {path.stem}.sol would stand where a best known solution does; give another"
            )
    # The folder is made when there is something to write, so that an earlier failure leaves nothing behind.
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        cause = "may not be written to" if existing.is_dir() else "is no folder"
        raise ConfigError(f"--out {folder} cannot be made a folder ({existing} {cause}); give another")


def write_all(solutions: Sequence[Solution], folder: Path, costs: Costs | None) -> str:
    """Write every solution and say where; `costs` as for `picture_of`.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for solution in tqdm(solutions, desc="writing", delay=1, disable=None, leave=False):
            write(solution, folder, costs)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written to ({error.strerror or error}); give another") from error
    suffixes = sorted({solution_path(folder, solution.instance).suffix for solution in solutions})
    if len(solutions) == 1:
        return f"written: {solution_path(folder, solutions[0].instance)} and its picture (.png)"
    return f"written to {folder}: {len(solutions)} solutions ({' or '.join(suffixes)}) and their pictures (.png)"
