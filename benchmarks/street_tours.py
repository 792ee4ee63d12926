"""A picture of what streets ask: the shortest tour on the map beside the one that is quickest to drive.

    python -m benchmarks.street_tours --streets helsinki --out pictures

Both are of one validation instance, drawn along the streets that they drive, each in the cheaper of its directions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from benchmarks.flags import CONFIGS, number
from config import one_line_errors, parse_command_line
from envs.routing import TSPRules
from routing.drawing import draw_streets
from routing.instances import VALIDATION_SEED, cheapest_tours, euclidean_distances, tour_costs
from routing.street_costs import STREETS, street_costs
from system.terminal import show
from training import launch

ENTRY_KEYS = {
    "out": "the folder to write into (default: pictures)",
    "instance": "which of the validation instances (default 0, the first)",
}


def main(argv: list[str]) -> None:
    """Draw them."""
    with one_line_errors(Path(__file__).stem, *launch.USER_ERRORS):
        command = parse_command_line(argv, config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS)
        row = int(number(command.entry["instance"] or "0", "instance", least=0))
        costs = street_costs(STREETS, command.config.streets)
        instance = TSPRules.under(costs).field_instances(row + 1, command.config.nodes, seed=VALIDATION_SEED)
        matrix = costs.matrix(instance)[row:].double().numpy()
        shortest = cheapest_tours(euclidean_distances(instance.coords[row:].numpy()))
        # Both begin at the first node.
        backwards = np.roll(shortest[:, ::-1], 1, axis=1)
        shortest = min(shortest, backwards, key=lambda tour: float(tour_costs(matrix, tour)[0]))
        tours = (shortest, cheapest_tours(matrix))
        minutes = [float(tour_costs(matrix, tour)[0]) * costs.unit / 60 for tour in tours]
        titles = [f"shortest on the map: {minutes[0]:.1f} min", f"quickest: {minutes[1]:.1f} min"]
        places = instance.place[row].numpy()
        path = Path(command.entry["out"] or "pictures") / "streets.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, draw_streets(costs.network, [places[tour[0]] for tour in tours], titles=titles, inches=6.4))
        show(str(path))


if __name__ == "__main__":
    main(sys.argv[1:])
