"""Exports a run: its weights alone in one small file to solve with, and beside it how they came about.

  python export.py logdir/tsp_attn-seed0 checkpoints/tsp20.pt

writes tsp20.pt (config, format number, and the weights of world model and actor in half precision) and tsp20.json
(command, commit, seed, steps, validation curve, and gaps on the field's test set, measured with the written file).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import checkpoint
import config
import solve
from comparing.runs import CONFIG_FILE, METRICS, MOST_FACTS, MOST_LOG, RUN_FILE
from config import ConfigError, one_line_errors
from dreamer import Dreamer
from routing.instances import TEST_SEED
from solving.command_line import TRUST_HELP, positive
from solving.decoding import Decoding
from solving.given_costs import SOLVERS
from solving.references import references
from system.safe_files import read_text, write_text
from system.terminal import Parser, show
from training import devices, loading
from training.tours import percent_above

LONGEST_CURVE = 200


def weights_file(run: Path, path: Path, *, trust: bool = False) -> None:
    """Write the weights of a run's latest checkpoint, or of one of its checkpoint files, to `path`.

    `trust` is as in `loading.load_run`.

    Raises:
        ConfigError, CheckpointError: as `loading.load_run`; or the file cannot be written.
    """
    defaults = config.load_defaults(solve.CONFIGS)
    loaded = loading.load_run(run, make_agent=Dreamer, device=torch.device("cpu"), defaults=defaults, trust=trust)
    assert isinstance(loaded.agent, Dreamer)
    # The run's own folder and device are of no use to others.
    settings = {**loaded.config.to_dict(), "logdir": None, "device": "auto"}
    state = {"config": settings, "agent": loaded.agent.acting_weights(), "step": loaded.step}
    if loaded.log is not None:
        state["log"] = loaded.log
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, state)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in one line that a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give another") from error


def _require_free(path: Path, run: Path) -> None:
    """Check that a path is not of a file that a run needs, nor of a folder.

    Raises:
        ConfigError: it is.
    """
    folder = run if run.is_dir() else run.parent
    if path.resolve().parent == folder.resolve() or (path.parent / CONFIG_FILE).exists():
        raise ConfigError(f"{path} lies in a run's folder, among its checkpoints; give a path in another")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the path of a file")


def facts(run: Path) -> dict[str, Any]:
    """What made a run: command and commit, seed, steps and seconds, and the curve of the validation gap.

    Raises:
        ConfigError: the run's folder does not hold them.
    """
    if not run.exists():
        raise ConfigError(f"{run} does not exist; give a run's folder, or a checkpoint in one")
    folder = run if run.is_dir() else run.parent
    try:
        made = json.loads(read_text(folder / RUN_FILE, most=MOST_FACTS))
        rows = [json.loads(line) for line in read_text(folder / METRICS, most=MOST_LOG).splitlines()]
        curve = [[row["step"], round(row["valid_gap"], 4)] for row in rows if row.get("valid_gap") is not None]
        told = {"command": made.get("command"), "commit": made.get("commit")}
        seconds = rows[-1].get("seconds") if rows else None
    # A file by others may be JSON and hold no such rows.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{folder} does not say how it was made ({error}); give a run's own folder") from error
    every = -(-len(curve) // LONGEST_CURVE) or 1
    return {**told, "seconds": seconds, "curve": curve[::-every][::-1]}


def measured(
    path: Path, *, instances: int, methods: list[str], device: torch.device, trust: bool = False
) -> dict[str, Any]:
    """Gaps, in percent of the references' mean, of a weights file on the first instances of the field's test set."""
    agent = solve.load_agent(path, device, trust=trust)
    cases = solve.random_instances(agent, instances, agent.task.num_actions, TEST_SEED, method=methods[0])
    known = references(cases, SOLVERS[cases[0].problem])
    mean_reference = sum(known) / len(known)
    gaps = {method: gap(agent, cases, mean_reference, method) for method in methods}
    return {"instances": instances, "test_seed": TEST_SEED, "mean_reference": mean_reference, "gaps": gaps}


def suitable(agent: Dreamer) -> list[str]:
    """The ways to look for tours that a run is measured by where nobody says which."""
    if not agent.trains_policy:
        return [Decoding.PLAN]
    return ["greedy", "augment"] if solve.rules_of(agent).costs.symmetric else ["greedy"]


def gap(agent: Dreamer, cases: list[solve.RoutingInstance], mean_reference: float, method: str) -> float:
    """How much longer the mean solution is than the mean reference, in percent.

    Raises:
        ValueError: an instance does not fit the agent.
    """
    lengths = []
    for outcome in solve.solve(agent, cases, Decoding(method=method)):
        if isinstance(outcome, ValueError):
            raise outcome
        assert outcome.length is not None, "gaps are of worlds that are known"
        lengths.append(outcome.length)
    return percent_above(sum(lengths) / len(lengths), mean_reference)


def main(argv: list[str]) -> None:
    """Read the command line; write weights and facts."""
    parser = Parser("export.py", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="LOGDIR", help="a run's folder, or a checkpoint file in one")
    add("path", type=Path, metavar="FILE.pt", help="where the weights go; the facts go beside them")
    add("--instances", type=positive, default=1000, help="of the test set, to measure gaps on (default 1000)")
    decode_help = "ways to measure; what suits the run where not given"
    add("--decode", nargs="+", choices=(*Decoding.METHODS, Decoding.PLAN), help=decode_help)
    add("--device", default="auto", help="to measure on; auto (the default) is CUDA where there is one")
    add("--trust", action="store_true", help=TRUST_HELP)
    arguments = parser.parse_args(argv)
    with one_line_errors("export.py", *loading.USER_ERRORS):
        if arguments.path.suffix != ".pt":
            raise ConfigError(f"{arguments.path} is no name for weights; let it end in .pt")
        record = facts(arguments.run)
        _require_free(arguments.path, arguments.run)
        device = devices.choose_device(arguments.device)
        # A run whose gaps cannot be measured is refused here, before anything is written.
        agent = solve.load_agent(arguments.run, device, trust=arguments.trust)
        methods = arguments.decode or suitable(agent)
        weights_file(arguments.run, arguments.path, trust=arguments.trust)
        state = checkpoint.load(arguments.path, torch.device("cpu"))
        record |= {"seed": state["config"]["seed"], "steps": state["step"]}
        if solve.rules_of(agent).costs.known:
            record |= measured(
                arguments.path,
                instances=arguments.instances,
                methods=methods,
                device=device,
                trust=arguments.trust,
            )
        beside = arguments.path.with_suffix(".json")
        # A line for each entry: the curve is long.
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
        with _writing(beside):
            write_text(beside, f"{{\n{lines}\n}}\n")
        # What moves cost is known from a log alone at times, and then nobody can say how good tours are.
        gaps = ", ".join(f"{method} {value:.2f} %" for method, value in record.get("gaps", {}).items()) or "unknown"
        show(f"{arguments.path} at step {record['steps']}: {arguments.path.stat().st_size / 1e6:.2f} MB, gap {gaps}")


if __name__ == "__main__":
    main(sys.argv[1:])
