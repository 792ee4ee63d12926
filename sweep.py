"""Many runs by one command: every combination of some values with every seed, or a search for good settings.

    python sweep.py --configs tsp_attn --seeds 0..4 --actor.entropy 1e-4,3e-4,1e-3 --logdir logdir/entropy
    python sweep.py --configs tsp_attn --search optuna --minimize valid_gap --trials 30 --model.lr 1e-4..1e-2:log \\
        --workers 2 --logdir logdir/search

Keys are those of the program that trains. A value may be a list (a,b,c), a range of whole numbers (0..4), or, in a
search, any range (LOW..HIGH, LOW..HIGH:log). The same command goes on where a sweep was stopped or killed.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import checkpoint
import dreamer
import grpo
import sac
from checkpoint import CheckpointError
from comparing.runs import CONFIG_FILE
from config import CommandLine, ConfigError, UserError, one_line_errors, read, to_yaml
from settings.command_line import read_flags
from settings.run import RunSettings
from sweeping.axes import Range, listed, range_of, values_of
from sweeping.jobs import CLUSTERS, Cluster, Processes, Workers
from sweeping.plans import Grid, Plan, Run, Template
from sweeping.runner import Sweep
from system.terminal import show, tell
from training.logdirs import claimed
from training.run_lock import LogdirInUseError

PROGRAMS = {"dreamer.py": dreamer, "sac.py": sac, "grpo.py": grpo}
FLAGS = {
    "program": f"which trains: {', '.join(PROGRAMS)} (dreamer.py)",
    "logdir": "the sweep's folder, with a folder for each run",
    "seeds": "a list or range: 0..4 (0)",
    "workers": "runs at the same time (1)",
    "search": "optuna: look for good settings by it, in place of every combination",
    "minimize": "of a search: a metric of metrics.jsonl whose last value is to be small, such as valid_gap",
    "maximize": "of a search: one that is to be large, such as valid_return",
    "trials": "of a search: how many settings are tried (20)",
    "startup": "of a search: trials before it goes by what it has found (5)",
    "cluster": "slurm: submit the runs to SLURM, by submitit; local: to submitit's stand-in on this machine",
    "cluster_options": "of submitit, as in timeout_min=240,slurm_partition=gpu,gpus_per_node=1",
}
LOGS = "logs"


class Request(NamedTuple):
    """What a command line asks for: the sweep's own flags, sections, what is the same in all runs, what is varied."""

    flags: dict[str, str]
    sections: list[str]
    fixed: dict[str, str]
    varied: dict[str, Sequence[str] | Range]

    @property
    def lists(self) -> dict[str, Sequence[str]]:
        """What a grid varies, which has no ranges."""
        return {key: axis for key, axis in self.varied.items() if not isinstance(axis, Range)}

    @property
    def seeds(self) -> list[str]:
        """The seeds of every setting."""
        return listed("seeds", self.flags["seeds"])


def read_request(argv: Sequence[str]) -> Request:
    """What a command line asks for.

    Raises:
        ConfigError: a flag has no value, or one that is none of its own.
    """
    sections, keys, given = read_flags(argv, FLAGS)
    beginnings = {"program": "dreamer.py", "seeds": "0", "workers": "1", "trials": "20", "startup": "5"}
    flags = {**beginnings, **{name: value for name, value in given.items() if value is not None}}
    if flags["program"] not in PROGRAMS:
        raise ConfigError(f"--program is {flags['program']}; choose one of {', '.join(PROGRAMS)}")
    if "logdir" not in flags:
        raise ConfigError("a sweep needs --logdir FOLDER, for its runs")
    if "seed" in keys:
        raise ConfigError("a sweep has --seeds, as in --seeds 0..4, and no --seed")
    if flags.get("search", "optuna") != "optuna":
        raise ConfigError(f"--search is {flags['search']}; there is optuna, or leave it out for every combination")
    _whole(flags, "workers")
    if flags.get("cluster", CLUSTERS[0]) not in CLUSTERS:
        raise ConfigError(f"--cluster is {flags['cluster']}; choose one of {', '.join(CLUSTERS)}")
    if "cluster_options" in flags and "cluster" not in flags:
        raise ConfigError("--cluster_options goes with --cluster slurm")
    searching = "search" in flags
    if searching and importlib.util.find_spec("optuna") is None:
        raise ConfigError('--search optuna needs its package: pip install -e ".[sweep]"')
    varied: dict[str, Sequence[str] | Range] = {}
    fixed: dict[str, str] = {}
    for key, text in keys.items():
        span = range_of(key, text) if searching else None
        values = [] if span else listed(key, text)
        if span or len(values) > 1:
            varied[key] = span or values
        else:
            fixed[key] = values_of(text)[0]
    return Request(flags, sections, fixed, varied)


def _whole(flags: Mapping[str, str], name: str) -> int:
    if not flags[name].isdecimal() or int(flags[name]) < 1:
        raise ConfigError(f"--{name} is {flags[name]}; it takes a whole number from 1 on")
    return int(flags[name])


def make_plan(request: Request, folder: Path) -> Plan:
    """The trials, in an existing folder.

    Raises:
        ConfigError: what a search needs is missing, or a grid is given what a search alone takes.
    """
    flags, template = request.flags, Template(tuple(request.sections), request.fixed, folder)
    directions: list[Literal["minimize", "maximize"]] = ["minimize", "maximize"]
    asked = [direction for direction in directions if direction in flags]
    if "search" not in flags:
        if asked:
            raise ConfigError(f"--{asked[0]} is for a search: add --search optuna")
        return Grid(template, request.lists, seeds=request.seeds)
    if len(asked) != 1:
        raise ConfigError("a search needs --minimize METRIC (valid_gap, say) or --maximize METRIC (valid_return)")
    if not request.varied:
        raise ConfigError("a search needs something to vary, such as --model.lr 1e-4..1e-2:log")
    # Whoever searches for nothing needs no Optuna.
    from sweeping.search import Search

    return Search(
        template,
        request.varied,
        seeds=request.seeds,
        metric=flags[asked[0]],
        direction=asked[0],
        trials=_whole(flags, "trials"),
        startup=_whole(flags, "startup"),
    )


def make_workers(flags: Mapping[str, str], logs: Path) -> Workers:
    """Who runs the runs.

    Raises:
        ConfigError: submitit is missing, or refuses its options.
    """
    count = _whole(flags, "workers")
    if "cluster" not in flags:
        return Processes(count, logs=logs)
    options = dict(part.partition("=")[::2] for part in values_of(flags.get("cluster_options", "")) if part)
    return Cluster(count, logs=logs, kind=flags["cluster"], options=options)


def require_commands(request: Request, folder: Path) -> None:
    """Check the settings of all runs as their program will, before the first one begins.

    Raises:
        ConfigError: one is refused.
    """
    template = Template(tuple(request.sections), request.fixed, folder)
    if "search" in request.flags:
        from sweeping.search import corners

        samples = corners(request.varied)
        runs = [template.run("sample", settings, request.seeds[0]) for settings in samples]
    else:
        axes = request.lists
        # A seed is checked with the first setting, and each setting with the first seed.
        runs = [trial.runs[0] for trial in Grid(template, axes, seeds=request.seeds[:1]).trials]
        runs += [template.run("sample", {key: axis[0] for key, axis in axes.items()}, seed) for seed in request.seeds]
    for run in runs:
        RunSettings.of(_command(request.flags["program"], run).config)


def _command(program: str, run: Run) -> CommandLine:
    """A run's command line, as its program reads it."""
    return PROGRAMS[program].read_command(list(run.arguments))


def was_finished(program: str, run: Run) -> bool:
    """Whether a run has come to its end, under just the settings that it has now."""
    config = run.logdir / CONFIG_FILE
    if not config.exists():
        return False
    try:
        state = checkpoint.load(run.logdir / checkpoint.LATEST, torch.device("cpu"))
        return bool(state.get("finished")) and to_yaml(read(config)) == to_yaml(_command(program, run).config)
    except (CheckpointError, ConfigError):
        return False


def _told(plan: Plan, sweep: Sweep, folder: Path) -> None:
    """Print what has come of a sweep.

    Raises:
        UserError: trials have failed.
    """
    best: tuple[str, float, dict[str, Any]] | None = getattr(plan, "best", lambda: None)()
    if best is not None:
        name, score, settings = best
        flags = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in settings.items())
        show(f"best: {name}, {plan.metric} {score:.4g}, {flags}")
    failed = [name for name, ending in sweep.endings.items() if ending == "failed"]
    show(f"python compare.py {shlex.quote(str(folder))}")
    if failed:
        names = ", ".join([*failed[:3], *(["..."] if failed[3:] else [])])
        raise UserError(f"{len(failed)} of {plan.total} trials failed ({names}); {folder / LOGS} has what they said")


def main(argv: list[str]) -> None:
    """Read the command line, and work the sweep off."""
    with one_line_errors("sweep.py", LogdirInUseError, OSError):
        if {"-h", "--help"} & set(argv):
            flags = "\n".join(f"  --{name:17}{line}" for name, line in FLAGS.items())
            show(f"{(__doc__ or '').strip()}\n\nflags, beside the keys of the program:\n{flags}")
            return
        request = read_request(argv)
        program, folder = request.flags["program"], Path(request.flags["logdir"]).absolute()
        require_commands(request, folder)
        with claimed(folder):
            plan = make_plan(request, folder)
            (folder / LOGS).mkdir(exist_ok=True)
            workers = make_workers(request.flags, folder / LOGS)
            tell(f"{plan.total} trials of {program} in {folder}, {workers.count} at a time")
            sweep = Sweep(plan, workers, program=program, is_done=lambda run: was_finished(program, run))
            if (stopped_by := sweep.work()) is not None:
                tell(f"stopped by {stopped_by}; runs are saved. The same command goes on from there.")
                return
            _told(plan, sweep, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
