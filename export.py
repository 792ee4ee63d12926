"""Exports a run: its weights alone in one small file to solve with, and beside it how they came about.

  python export.py logdir/tsp_attn-seed0 checkpoints/tsp20.pt

writes tsp20.pt (config, format number, and the weights of world model and actor in half precision) and tsp20.json
(command, commit, seed, steps, validation curve, and, of a routing problem, gaps on the field's test set, measured with
the written file).

  python export.py checkpoints/tsp50.pt tsp50-onnx --format onnx

writes one step of acting as ONNX graphs into a folder, compared with the agent, for programs without PyTorch.
"""

from __future__ import annotations

import argparse
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
from exporting import files as onnx_files
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
# What validation tells of routing and of other tasks.
CURVES = ("valid_gap", "valid_return")


def weights_file(run: Path, path: Path, *, trust: bool = False) -> None:
    """Write the weights of a run's latest checkpoint, or of one of its checkpoint files, to `path`.

    `trust` is as in `loading.load_run`.

    Raises:
        ConfigError, CheckpointError: as `loading.load_run`; or the file cannot be written.
    """
    loaded, agent = _loaded(run, trust=trust)
    # The run's own folder and device are of no use to others.
    settings = {**loaded.config.to_dict(), "logdir": None, "device": "auto", "logger": "tensorboard"}
    state = {"config": settings, "agent": agent.acting_weights(), "step": loaded.step}
    if loaded.log is not None:
        state["log"] = loaded.log
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, state)


def _loaded(run: Path, *, trust: bool, **changes: str) -> tuple[loading.LoadedRun, Dreamer]:
    """A run and its agent, on the host; `changes` are of its config."""
    loaded = loading.load_run(
        run,
        make_agent=Dreamer,
        device=torch.device("cpu"),
        defaults=config.load_defaults(solve.CONFIGS),
        changes=changes,
        trust=trust,
    )
    loaded.setup.close()
    assert isinstance(loaded.agent, Dreamer)
    return loaded, loaded.agent


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
    """What made a run: command and commit, seed, steps and seconds, and the curve of validation.

    Raises:
        ConfigError: the run's folder does not hold them.
    """
    if not run.exists():
        raise ConfigError(f"{run} does not exist; give a run's folder, or a checkpoint in one")
    folder = run if run.is_dir() else run.parent
    try:
        made = json.loads(read_text(folder / RUN_FILE, most=MOST_FACTS))
        rows = [json.loads(line) for line in read_text(folder / METRICS, most=MOST_LOG).splitlines()]
        score = next((name for name in CURVES if any(name in row for row in rows)), CURVES[0])
        curve = [[row["step"], round(row[score], 4)] for row in rows if row.get(score) is not None]
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


def onnx_folder(run: Path, folder: Path, *, trust: bool = False) -> str:
    """Write the ONNX graphs of a run into a folder. Returns what has come of it, as a line to read.

    Raises:
        ConfigError, CheckpointError: as `loading.load_run`; or there is nothing to write ONNX with, or nowhere.
        UserError: the run has no graphs.
    """
    onnx_files.require_packages()
    if folder.is_file() or (folder / CONFIG_FILE).exists():
        raise ConfigError(f"{folder} is a file or a run's own folder; give the path of another folder")
    # Graphs hold float32, whatever updates computed with.
    loaded, agent = _loaded(run, trust=trust, compile="none", precision="float32")
    made_from = {"run": run.name, "task": loaded.config.task, "seed": loaded.config.seed, "steps": loaded.step}
    with _writing(folder):
        found = onnx_files.write(agent, folder, made_from)
    return (
        f"{folder}: the graphs chose the agent's actions in {found.steps - found.ties} decisions, and logits differ by"
        f" {found.logits:.1e} at most"
    )


def main(argv: list[str]) -> None:
    """Read the command line; write weights and facts, or graphs."""
    parser = Parser("export.py", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="LOGDIR", help="a run's folder, or a checkpoint file in one")
    path_help = "where the weights go, with the facts beside them, or the folder for graphs; here, named after the run"
    add("path", type=Path, nargs="?", metavar="PATH", help=path_help)
    add("--format", choices=("pt", "onnx"), default="pt", help="weights (default), or ONNX graphs")
    add("--instances", type=positive, default=1000, help="of the test set, to measure gaps on (default 1000)")
    decode_help = "ways to measure; what suits the run where not given"
    add("--decode", nargs="+", choices=(*Decoding.METHODS, Decoding.PLAN), help=decode_help)
    add("--device", default="auto", help="to measure on; auto (the default) is CUDA where there is one")
    add("--trust", action="store_true", help=TRUST_HELP)
    arguments = parser.parse_args(argv)
    with one_line_errors("export.py", *loading.USER_ERRORS):
        run = arguments.run.resolve()
        name = run.name if run.is_dir() else run.stem
        if arguments.format == "onnx":
            show(onnx_folder(arguments.run, arguments.path or Path(f"{name}-onnx"), trust=arguments.trust))
        else:
            show(_weights_and_facts(arguments, arguments.path or Path(f"{name}.pt")))


def _weights_and_facts(arguments: argparse.Namespace, path: Path) -> str:
    """Write both. Returns what has come of it, as a line to read."""
    run, trust = arguments.run, arguments.trust
    if path.suffix != ".pt":
        raise ConfigError(f"{path} is no name for weights; let it end in .pt")
    record = facts(run)
    _require_free(path, run)
    device = devices.choose_device(arguments.device)
    agent = None
    # A run whose gaps cannot be measured is refused here, before anything is written.
    if _loaded(run, trust=trust)[1].task.has_references:
        agent = solve.load_agent(run, device, trust=trust)
    weights_file(run, path, trust=trust)
    state = checkpoint.load(path, torch.device("cpu"))
    record |= {"seed": state["config"]["seed"], "steps": state["step"]}
    if agent is not None and solve.rules_of(agent).costs.known:
        methods = arguments.decode or suitable(agent)
        record |= measured(path, instances=arguments.instances, methods=methods, device=device, trust=trust)
    beside = path.with_suffix(".json")
    # A line for each entry: the curve is long.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    with _writing(beside):
        write_text(beside, f"{{\n{lines}\n}}\n")
    told = f"{path} at step {record['steps']}: {path.stat().st_size / 1e6:.2f} MB"
    if agent is None:
        return told
    # What moves cost is known from a log alone at times, and then nobody can say how good tours are.
    gaps = ", ".join(f"{method} {value:.2f} %" for method, value in record.get("gaps", {}).items()) or "unknown"
    return f"{told}, gap {gaps}"


if __name__ == "__main__":
    main(sys.argv[1:])
