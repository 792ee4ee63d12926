"""Whether exported graphs choose what the agents choose, and how long a tour takes without PyTorch.

  python -m benchmarks.onnx_agreement logdir/cartpole

plays 1,000 steps of CartPole with the run in that folder, and walks 1,000 tours of 20 nodes with a shipped agent, each
by PyTorch and by ONNX Runtime side by side, both with their own memory; then it times single tours of 50 nodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

import export
import solve
from config import one_line_errors
from dreamer import Dreamer, load
from exporting import files, solve_onnx
from exporting.graphs import NEXT, Arrays
from routing.instances import TEST_SEED
from solving.command_line import positive
from solving.decoding import Decoding
from system.terminal import Parser, show
from training import loading

CHECKPOINTS = Path(export.__file__).with_name("checkpoints")
CPU = torch.device("cpu")
TIMED_NODES = 50
# Runs in a process of its own, in which PyTorch cannot be imported.
TIMING = """
import json, runpy, sys, time
sys.modules["torch"] = None
import numpy as np
begin = time.perf_counter()
program = runpy.run_path(sys.argv[1])
imported = time.perf_counter()
encode, step = program["load"]("encode"), program["load"]("step")
loaded = time.perf_counter()
seconds = []
for nodes in np.random.RandomState(1234).uniform(size=(int(sys.argv[2]), int(sys.argv[3]), 2)):
    began = time.perf_counter()
    program["best_tour"](encode, step, nodes, augment=False)
    seconds.append(time.perf_counter() - began)
print(json.dumps({"imports": imported - begin, "load": loaded - imported, "tours": seconds}))
"""


class Found(NamedTuple):
    """How many decisions were compared, how many differ, and by how much logits differ at most."""

    decisions: int
    differing: int
    logits: float


def cartpole(run: Path, folder: Path, *, steps: int) -> Found:
    """Steps of CartPole by PyTorch's actions, which ONNX Runtime answers beside it with a memory of its own."""
    export.onnx_folder(run, folder)
    graph = files.runner(folder / "act.onnx")
    (made,) = files.export_of(_agent(run)).graphs
    agent, env = load(run, device="cpu"), gymnasium.make("CartPole-v1")
    memory = [name for name in made.inputs if not name.startswith("obs/")]
    blank = {name: np.zeros_like(made.inputs[name][:1].numpy()) for name in memory}
    differing, worst, over, episode = 0, 0.0, True, 0
    for _ in range(steps):
        if over:
            obs, _ = env.reset(seed=episode)
            ours, theirs = ({**blank, "is_first": np.ones(1, np.bool_)} for _ in range(2))
            state, episode = None, episode + 1
        observed = {"obs/observation": obs[None]}
        with torch.no_grad():
            inputs = {name: torch.from_numpy(part) for name, part in {**observed, **ours}.items()}
            own = {name: part.numpy() for name, part in made.module(inputs).items()}
        told = graph({**observed, **theirs})
        action, state = agent(obs, state)
        differing += not action == own["action"][0] == told["action"][0]
        worst = max(worst, float(np.abs(own["logits"] - told["logits"]).max()))
        ours, theirs = _remembered(own), _remembered(told)
        obs, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
    return Found(steps, differing, worst)


def tours(weights: Path, folder: Path, *, count: int, nodes: int) -> Found:
    """Greedy tours of the field's test set, by decoding as `solve.py` has it and by the program beside the graphs."""
    export.onnx_folder(weights, folder)
    agent = _agent(weights)
    instances = solve.random_instances(agent, count, nodes, TEST_SEED)
    solutions = solve.solve(agent, instances, Decoding())
    own = np.array([each.tour for each in solutions if isinstance(each, solve.Solution)])
    coords = np.stack([each.coords for each in instances]).astype(np.float32)
    start = np.zeros((count, 1), np.int64)
    encode, step = (_session(folder / f"{name}.onnx") for name in ("encode", "step"))
    found = solve_onnx.tours(encode, step, coords, start)[:, 0]
    logits = _along(agent, encode, step, coords, own)
    return Found(count, int((own != found).any(-1).sum()), logits)


def _along(agent: Dreamer, encode: Any, step: Any, coords: np.ndarray, own: np.ndarray) -> float:
    """The largest difference between legal logits of both along the tours."""
    modules = [graph.module for graph in files.export_of(agent).graphs]

    def by_torch(module: torch.nn.Module) -> Callable[[Arrays], Arrays]:
        def run(known: Arrays) -> Arrays:
            with torch.no_grad():
                told = module({name: torch.from_numpy(part) for name, part in known.items()})
            return {name.removeprefix(NEXT): part.numpy() for name, part in told.items()}

        return run

    start = own[:, :1]
    both = (
        (by_torch(modules[0]), by_torch(modules[1])),
        tuple(lambda known, session=session: solve_onnx.run(session, known) for session in (encode, step)),
    )
    states = [begin({"coords": coords, "start": start}) for begin, _ in both]
    worst = 0.0
    for index in range(own.shape[1] - 1):
        action = {"prev_action": own[:, index : index + 1], "is_first": np.full_like(start, index == 0, np.bool_)}
        states = [
            {**known, **move({name: part for name, part in {**known, **action}.items() if name in _taken(step)})}
            for (_, move), known in zip(both, states, strict=True)
        ]
        apart = np.abs(states[0]["logits"] - states[1]["logits"])
        # Those of illegal nodes stand for nothing, and are equal.
        worst = max(worst, float(apart.max()))
    return worst


def seconds_of_tours(folder: Path, *, count: int, nodes: int) -> dict[str, Any]:
    """Seconds that imports, loading and each of some tours take in a process without PyTorch, on one thread."""
    command = [sys.executable, "-c", TIMING, str(folder / "solve_onnx.py"), str(count), str(nodes)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    return json.loads(told.stdout)


def main(argv: list[str]) -> None:
    """Compare and time, and print what was found."""
    parser = Parser("benchmarks.onnx_agreement", description=__doc__)
    parser.add_argument("cartpole", type=Path, metavar="LOGDIR", help="a run of gym_CartPole-v1")
    parser.add_argument("--count", type=positive, default=1000, help="steps, and tours (default 1000)")
    arguments = parser.parse_args(argv)
    with one_line_errors("benchmarks.onnx_agreement", *loading.USER_ERRORS), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        count = arguments.count
        found = cartpole(arguments.cartpole, folder / "cartpole", steps=count)
        show(f"CartPole: {found.differing} of {count} actions differ, logits by {found.logits:.1e} at most")
        found = tours(CHECKPOINTS / "tsp20.pt", folder / "tsp20", count=count, nodes=20)
        show(f"TSP-20: {found.differing} of {count} tours differ, logits by {found.logits:.1e} at most")
        export.onnx_folder(CHECKPOINTS / "tsp50.pt", folder / "tsp50")
        took = seconds_of_tours(folder / "tsp50", count=min(count, 200), nodes=TIMED_NODES)
        middle, slow = (1e3 * float(np.quantile(took["tours"], share)) for share in (0.5, 0.95))
        first = 1e3 * (took["imports"] + took["load"])
        show(
            f"TSP-{TIMED_NODES}: a tour takes {middle:.1f} ms, one in twenty {slow:.1f} ms or longer; imports and"
            f" loading {first:.0f} ms, once"
        )


def _agent(run: Path) -> Dreamer:
    agent = loading.load_run(run, make_agent=Dreamer, device=CPU, defaults=solve.config.load_defaults(solve.CONFIGS))
    agent.setup.close()
    assert isinstance(agent.agent, Dreamer)
    return agent.agent


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _taken(session: Any) -> set[str]:
    return {each.name for each in session.get_inputs()}


def _remembered(told: Arrays) -> Arrays:
    """What the next step takes of what this one gave."""
    memory = {name.removeprefix(NEXT): part for name, part in told.items() if name.startswith(NEXT)}
    return {**memory, "prev_action": told["action"], "is_first": np.zeros(1, np.bool_)}


if __name__ == "__main__":
    main(sys.argv[1:])
