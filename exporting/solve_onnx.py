"""Solves TSPLIB files by an exported agent, with numpy and onnxruntime alone: python solve_onnx.py town.tsp

encode.onnx and step.onnx lie beside this file. --augment takes the best tour over the 8 symmetries of the square and up
to 100 first nodes; without it, node 1 is the first, and the square is as it is.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def load(name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = Path(__file__).with_name(f"{name}.onnx")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {each.name: known[each.name] for each in session.get_inputs()})
    # What one step calls next_current the following one takes as current.
    return {name.removeprefix("next_"): value for name, value in zip(names, values, strict=True)}


def tours(encode: Any, step: Any, coords: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Greedy tours [B, Q, N] of instances in the unit square [B, N, 2] that begin at nodes `start` [B, Q]."""
    start = start.astype(np.int64)
    known = run(encode, {"coords": coords.astype(np.float32), "start": start})
    known |= {"prev_action": start, "is_first": np.ones(start.shape, bool)}
    found = [start]
    # After so many actions every node is visited, and what is left is the way home.
    for _ in range(coords.shape[1] - 1):
        known |= run(step, known)
        known |= {"prev_action": known["logits"].argmax(-1), "is_first": np.zeros(start.shape, bool)}
        found.append(known["prev_action"])
    return np.stack(found, -1)


def best_tour(encode: Any, step: Any, nodes: np.ndarray, *, augment: bool) -> np.ndarray:
    """The shortest tour found of nodes [N, 2], by unrounded distances."""
    square = (nodes - nodes.min(0)) / (np.ptp(nodes, axis=0).max() or 1.0)
    flipped = [np.stack((x, y), -1) for x in (square[:, 0], 1 - square[:, 0]) for y in (square[:, 1], 1 - square[:, 1])]
    images = np.stack([image for each in flipped for image in (each, each[:, ::-1])] if augment else [square])
    starts = min(len(nodes), 100) if augment else 1
    start = np.tile(np.arange(starts) * len(nodes) // starts, (len(images), 1))
    found = tours(encode, step, images, start).reshape(-1, len(nodes))
    return found[np.linalg.norm(nodes[found] - nodes[np.roll(found, -1, -1)], axis=-1).sum(-1).argmin()]


def read(path: str | Path) -> np.ndarray:
    """Positions of a TSPLIB file with EUC_2D distances."""
    head, nodes = "", np.empty((0, 2))
    with contextlib.suppress(OSError, ValueError, IndexError):
        head, _, body = Path(path).read_text().partition("NODE_COORD_SECTION")
        nodes = np.array([line.split() for line in body.split("EOF")[0].splitlines() if line.strip()], float)[:, 1:]
    if "EUC_2D" not in head or len(nodes) < 3 or nodes.shape[1] != 2 or not np.isfinite(nodes).all():
        sys.exit(f"solve_onnx.py: {path} is no TSPLIB file of three nodes or more with EUC_2D distances; give another")
    return nodes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.tsp")
    parser.add_argument("--augment", action="store_true", help="look longer")
    arguments = parser.parse_args()
    encode, step = load("encode"), load("step")
    for path in arguments.files:
        nodes = read(path)
        tour = best_tour(encode, step, nodes, augment=arguments.augment)
        legs = np.linalg.norm(nodes[tour] - nodes[np.roll(tour, -1)], axis=-1)
        print(f"{path}: length {(legs + 0.5).astype(int).sum()}, tour {' '.join(map(str, tour + 1))}")
