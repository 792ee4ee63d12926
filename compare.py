"""Compare runs: a table with interquartile means over seeds and their intervals, and a picture of the curves.

    python compare.py logdir/tsp_attn-seed* logdir/tsp_few_steps-seed*

Runs whose configs differ in the seed alone are one group; keys that only the one of two configs has are not compared.
Of runs without config the names tell. A cell is the
interquartile mean over a group's seeds (of fewer than four seeds the mean) and, in brackets, its 95 % bootstrap
interval. "(2 of 3)" after it: only two of three seeds have a value.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comparing import published, runs
from comparing.curves import draw
from comparing.markdown import markdown
from comparing.runs import Run, Series, UnreadableRunError
from comparing.summary import Asked, Quantity, is_measured_by_gap, over_seeds, quantities, return_name, score_name
from config import ConfigError, one_line_errors
from system.terminal import Parser, show, tell

# Keys that may differ within a group.
RUN_KEYS = ("seed", "logdir")
MOST_DIFFERENCES = 12
# The share of their keys that two configs must have in common for their runs to be of one group.
LEAST_COMMON = 0.5


class Group(NamedTuple):
    """Runs that differ in their seed, or that the user calls one group."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int | None]:
        """The seed of each run; None where it is not known."""
        return [run.seed for run in self.runs]

    @property
    def states(self) -> dict[str, int]:
        """How many of the runs are finished, running, stopped."""
        return dict(Counter(run.status for run in self.runs))

    @property
    def return_names(self) -> list[str]:
        """The metrics that the runs' returns are taken from."""
        return sorted({name for run in self.runs if (name := return_name(run)) is not None})


class Released(NamedTuple):
    """Published figures beside which runs are shown."""

    suite: str
    task: str
    scores: published.Scores


class Member(NamedTuple):
    """A run that waits for its group: its place on the command line, its name without the seed, its config as texts."""

    place: int
    name: str
    run: Run
    settings: dict[str, str]

    def is_of_one_kind(self, other: Member) -> bool:
        """Whether the two differ in their seeds alone, as far as one can tell."""
        if self.run.config is None or other.run.config is None:
            return self.run.config is other.run.config and self.name == other.name
        common = self.settings.keys() & other.settings.keys()
        # Configs that share few keys come from different programs.
        related = len(common) >= LEAST_COMMON * len(self.settings.keys() | other.settings.keys())
        equal = all(self.settings[key] == other.settings[key] for key in common)
        return related and equal and self.run.made_by == other.run.made_by


def load(patterns: Sequence[str], left_out: dict[str, str]) -> list[Run]:
    """The runs that paths and globs lead to, each once; what leads to none is entered in `left_out` with the reason."""
    found: dict[Path, Run] = {}
    for pattern in patterns:
        # A folder may have brackets in its own name.
        for path in [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern)) or [pattern]:
            try:
                folders = runs.find(Path(path))
            except (UnreadableRunError, OSError) as error:
                left_out[path] = str(error)
                continue
            for folder in folders:
                if folder.resolve() not in found:
                    try:
                        found[folder.resolve()] = runs.read(folder)
                    except (UnreadableRunError, OSError) as error:
                        left_out[str(folder)] = str(error)
    return list(found.values())


def group_runs(loaded: Sequence[Run]) -> list[Group]:
    """Runs of one program in groups whose configs, or names where there is no config, differ in the seed alone.

    A key that a config lacks, being older, may have had any value. Where that leaves several groups to choose from, the
    name decides, or the run has a group of its own.
    """
    members = [
        Member(place, name, run, {key: json.dumps(value, default=str) for key, value in _config(run).items()})
        for place, (name, run) in enumerate(zip(_names(loaded), loaded, strict=True))
    ]
    kinds: list[list[Member]] = []
    # Those with the most keys come first, since these tell most kinds apart.
    for member in sorted(members, key=lambda member: -len(member.settings)):
        fitting = [kind for kind in kinds if all(map(member.is_of_one_kind, kind))]
        equal = [kind for kind in fitting if any(other.settings == member.settings for other in kind)]
        namesakes = [kind for kind in fitting if any(other.name == member.name for other in kind)]
        chosen = equal or namesakes or fitting
        if len(chosen) == 1:
            chosen[0].append(member)
        else:
            kinds.append([member])
    groups: list[Group] = []
    for kind in sorted(map(sorted, kinds), key=lambda kind: kind[0].place):
        label = " = ".join(dict.fromkeys(member.name for member in kind))
        others = sum(group.name == label or group.name.startswith(f"{label} (") for group in groups)
        groups.append(_group(f"{label} ({others + 1})" if others else label, [member.run for member in kind]))
    return groups


def named_groups(arguments: Sequence[str], left_out: dict[str, str]) -> list[Group]:
    """Groups as `--group NAME=PATH` makes them; a name given again gets more runs.

    Raises:
        ConfigError: an argument is no NAME=PATH.
    """
    patterns: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        if not (name and equals and pattern):
            raise ConfigError(f"--group is {argument!r}; write NAME=PATH, such as --group 'dreamer=logdir/tsp_attn*'")
        patterns.setdefault(name, []).append(pattern)
    return [_group(name, loaded) for name, paths in patterns.items() if (loaded := load(paths, left_out))]


def config_differences(groups: Sequence[Group]) -> dict[str, dict[str, str]]:
    """Keys whose values are not the same in all configs that have them, with the values of each group that has any.

    A program's own flag that a run was not given is a value of its own.
    """
    not_given = dict.fromkeys(flag for group in groups for run in group.runs for flag in run.made_by)
    flats = {
        group.name: [{**not_given, **run.made_by, **_config(run)} for run in group.runs if run.config is not None]
        for group in groups
    }
    values = {
        key: {
            name: sorted({str(settings[key]) for settings in flat if key in settings})
            for name, flat in flats.items()
            if any(key in settings for settings in flat)
        }
        for key in dict.fromkeys(key for flat in flats.values() for settings in flat for key in settings)
    }
    return {
        key: {name: " or ".join(texts) for name, texts in of_groups.items()}
        for key, of_groups in values.items()
        if len({text for texts in of_groups.values() for text in texts}) > 1
    }


def uncompared(groups: Sequence[Group]) -> list[str]:
    """Config keys that some configs have and some have not."""
    configs = [_config(run) for group in groups for run in group.runs if run.config is not None]
    counts = Counter(key for settings in configs for key in settings)
    return [key for key, count in counts.items() if count < len(configs)]


def remarks(groups: Sequence[Group]) -> list[str]:
    """What a reader should know before believing the table, a line each."""
    lines = [f"{run.path}: {note}" for group in groups for run in group.runs for note in run.notes]
    lines += [
        f"{run.path}: went on at step {change['step']:,} with {change['key']} {change['now']} (was {change['was']})"
        for group in groups
        for run in group.runs
        for change in run.changes
    ]
    for group in groups:
        repeated = [seed for seed, count in Counter(group.seeds).items() if seed is not None and count > 1]
        if repeated:
            seeds = ", ".join(map(str, repeated))
            lines.append(f"{group.name}: several runs have seed {seeds}, and count as if they were independent")
    metrics = {name for group in groups for name in group.return_names}
    if len(metrics) > 1:
        lines.append(f"returns are taken from different metrics: {', '.join(sorted(metrics))}")
    if keys := uncompared(groups):
        shown = ", ".join(keys[:MOST_DIFFERENCES])
        more = f" and {len(keys) - MOST_DIFFERENCES} more" if len(keys) > MOST_DIFFERENCES else ""
        lines.append(f"not compared where a run's config lacks them, being older perhaps: {shown}{more}")
    return lines


def table(groups: Sequence[Group], rows: Sequence[Quantity], differences: dict[str, dict[str, str]]) -> str:
    """The comparison as a table in markdown, a column for each group."""
    lines = [
        ["", *(group.name for group in groups)],
        ["seeds", *(", ".join("?" if seed is None else str(seed) for seed in group.seeds) for group in groups)],
        ["runs", *(", ".join(f"{count} {state}" for state, count in group.states.items()) for group in groups)],
        ["return is", *(", ".join(group.return_names) or "-" for group in groups)],
    ]
    for key, values in list(differences.items())[:MOST_DIFFERENCES]:
        lines.append([key, *(values.get(group.name, "-") for group in groups)])
    for row in rows:
        cells = [_cell([row.of(run) for run in group.runs], row.form) for group in groups]
        if row.asked or set(cells) != {"-"}:
            lines.append([row.name, *cells])
    return markdown(lines)


def as_json(groups: Sequence[Group], rows: Sequence[Quantity]) -> list[dict[str, Any]]:
    """The comparison as plain lists and dicts; null is what a run does not have."""
    return [
        {
            "name": group.name,
            "seeds": group.seeds,
            "logdirs": [str(run.path) for run in group.runs],
            "status": [run.status for run in group.runs],
            "return_metrics": group.return_names,
            "quantities": {row.name: _numbers([row.of(run) for run in group.runs]) for row in rows},
        }
        for group in groups
    ]


def _draw(groups: Sequence[Group], path: Path, released: Released | None) -> None:
    if released is not None:
        drawn = {group.name: [curve for run in group.runs if (curve := published.curve_of(run))] for group in groups}
        label = f"return of training episodes in {released.task}"
        draw(drawn, path, label=label, log_scale=False, behind=(f"published {released.suite}", released.scores))
        return
    by_gap = is_measured_by_gap([run for group in groups for run in group.runs])
    scores: dict[str, list[Series]] = {}
    for group in groups:
        names = [(run, score_name(run, by_gap=by_gap)) for run in group.runs]
        scores[group.name] = [run.series[name] for run, name in names if name is not None]
    metrics = sorted({name for group in groups for name in group.return_names})
    label = "gap on validation instances, %" if by_gap else f"return ({', '.join(metrics)})"
    draw(scores, path, label=label, log_scale=by_gap)


def _names(loaded: Sequence[Run]) -> list[str]:
    """What tells the runs apart in their paths, without the seed."""
    if not loaded:
        return []
    paths = [run.path.resolve() for run in loaded]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    names = [runs.without_seed(path.relative_to(common).as_posix())[0].strip("-_./") for path in paths]
    return [name or common.name for name in names]


def _group(name: str, loaded: Sequence[Run]) -> Group:
    ordered = sorted(loaded, key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))
    return Group(name, tuple(ordered))


def _config(run: Run) -> dict[str, Any]:
    """What of the config makes a run another kind of run."""
    settings = {} if run.config is None else run.config.flat()
    settings = {key: value for key, value in settings.items() if key not in RUN_KEYS}
    texts: dict[str, str] = {}
    for change in run.changes:
        if (key := change["key"]) in settings:
            texts[key] = f"{texts.get(key, change['was'])}, from step {change['step']:,} on {change['now']}"
    return settings | texts


def _cell(values: Sequence[float | None], form: str) -> str:
    found = over_seeds(values)
    if found is None:
        return "-"
    count = sum(value is not None and math.isfinite(value) for value in values)
    text = f"{found.mean:{form}}"
    if count > 1 and found.low != found.high:
        text += f" [{found.low:{form}} to {found.high:{form}}]"
    return text if count == len(values) else f"{text} ({count} of {len(values)})"


def _numbers(values: Sequence[float | None]) -> dict[str, Any]:
    found = over_seeds(values)
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    if found is None:
        return {"iqm": None, "low": None, "high": None, "values": finite}
    return {"iqm": found.mean, "low": found.low, "high": found.high, "values": finite}


def _list_of_numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 10,5,2")
    return values


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("compare.py", description=__doc__)
    numbers: dict[str, Any] = {"type": _list_of_numbers, "metavar": "A,B,..."}
    parser.add_argument("logdirs", nargs="*", metavar="LOGDIR", help="runs, folders with runs below them, or globs")
    parser.add_argument("--group", action="append", default=[], metavar="NAME=PATH", help="a group of your own; repeat")
    parser.add_argument(
        "--gaps", **numbers, help="tell env steps and minutes to these gaps in %% (of 10,5,2,1 those reached)"
    )
    parser.add_argument("--returns", **numbers, default=(), help="the same for returns, as in --returns=-200,-150")
    parser.add_argument("--at-steps", **numbers, default=(), help="the gap or return at these env steps")
    parser.add_argument("--at-minutes", **numbers, default=(), help="the gap or return at these minutes of training")
    parser.add_argument("--bands", **numbers, help="limits between bands of training returns (quartiles over all runs)")
    parser.add_argument(
        "--phases", type=_count, default=3, metavar="N", help="equal parts of a run, with a mean of each (3)"
    )
    parser.add_argument(
        "--published", choices=published.SUITES, help="also DreamerV3's released figures of the task, at the same steps"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.png"), metavar="FILE", help="the picture (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Read the command line, the runs, and compare."""
    arguments = parse(argv)
    with one_line_errors("compare.py", OSError):
        if not arguments.logdirs and not arguments.group:
            raise ConfigError("nothing to compare; give logdirs, such as logdir/*")
        left_out: dict[str, str] = {}
        groups = group_runs(load(arguments.logdirs, left_out))
        taken = {group.name for group in groups}
        groups += named_groups(arguments.group, left_out)
        for path, reason in left_out.items():
            tell(f"compare.py: {path} is left out: {reason}")
        if not groups:
            raise ConfigError("no run is left to compare; give logdirs with metrics.jsonl or event files")
        if twice := taken.intersection(group.name for group in groups[len(taken) :]):
            raise ConfigError(f"another group is called {min(twice)} already; choose another name for --group")
        bands = None if arguments.bands is None else tuple(sorted(set(arguments.bands)))
        asked = Asked(
            arguments.gaps, arguments.returns, arguments.at_steps, arguments.at_minutes, bands, arguments.phases
        )
        rows = quantities([run for group in groups for run in group.runs], asked)
        differences, notes = config_differences(groups), remarks(groups)
        released = None if arguments.published is None else _released(arguments.published, groups)
        if arguments.json:
            facts: dict[str, Any] = {"config_differences": differences, "left_out": left_out}
            if released is not None:
                facts["published"] = published.as_json(*released)
            _print_json(groups, rows, facts, notes, arguments.out, released)
            return
        show(table(groups, rows, differences))
        if released is not None:
            by_group = {group.name: group.runs for group in groups}
            show(f"\n{markdown(published.table(*released, by_group))}\nPublished: {published.SOURCE}.")
        if len(differences) > MOST_DIFFERENCES:
            notes.append(f"{len(differences) - MOST_DIFFERENCES} more config keys differ; --json lists them all")
        show("".join(f"\nNote: {note}." for note in notes))
        # The table is printed first, so that it is there even where the picture fails.
        _draw(groups, arguments.out, released)
        show(f"Picture: {arguments.out}")


def _released(suite: str, groups: Sequence[Group]) -> Released:
    """What was released of the groups' task.

    Raises:
        ConfigError: they have several tasks, or nothing was.
    """
    task = published.task_of([run for group in groups for run in group.runs])
    return Released(suite, task, published.scores_of(suite, task))


def _print_json(
    groups: Sequence[Group],
    rows: Sequence[Quantity],
    facts: dict[str, Any],
    notes: Sequence[str],
    out: Path,
    released: Released | None,
) -> None:
    """Draw, and print the comparison as one object, which tells of a picture that could not be drawn.

    Raises:
        ConfigError, OSError: it could not be drawn.
    """
    failure: ConfigError | OSError | None = None
    try:
        _draw(groups, out, released)
    except (ConfigError, OSError) as error:
        failure, notes = error, [*notes, f"there is no picture: {error}"]
    picture = str(out) if failure is None else None
    told = {"groups": as_json(groups, rows), **facts, "notes": list(notes), "picture": picture}
    show(json.dumps(told, indent=2, allow_nan=False))
    if failure is not None:
        raise failure


if __name__ == "__main__":
    main(sys.argv[1:])
