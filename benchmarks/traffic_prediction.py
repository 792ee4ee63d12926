"""How far ahead a world model foresees traffic: where the ego and others will be after 1, 2 and 3 s.

    python dreamer.py --configs drive_dreamer --replay cache/drive/train.txt --steps 0 --updates 1000 \\
        --imag_policy 0 --imag_imitation 1 --imag_horizon 1 --eval_every 0 --eval_episodes 0 --logdir logdir/traffic
    python -m benchmarks.traffic_prediction logdir/traffic --cache cache/drive --out traffic.png

The model observes the first rows of cached scenarios, and imagines on. That is compared, in metres, with where
everybody went, as the logs have it. The ego acts as it was logged, by candidates that are named after what it went on
to do, or as the trained actor chooses, who knows nothing of that. Constant velocity stands beside both. The last column
is the share of egos that are foreseen to touch somebody by their own fault within these seconds; of logged actions
nearly all of that is the model's error, as logs have hardly a contact.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from config import UserError, load_defaults, one_line_errors
from dreamer import CONFIGS, Dreamer
from driving.features import Poses
from driving.scene import STEP, Log
from envs.tasks import ACTION_MASK
from imagining.contacts import own_fault
from imagining.traffic import Traffic, features, observed
from imagining.traffic_model import TrafficModel
from networks import Latent
from parts.candidates import Agents, Candidates
from routing.rules import each_part
from scenarios.cache import Cache
from scenarios.logs import LogFolder
from scenarios.manifest import Entry
from system.terminal import Parser, show
from tools import uniform
from training import episode_files, launch
from training.loading import load_run

CPU = torch.device("cpu")
# Rows that are observed before; steps that are imagined; those that are told of, in seconds.
SEEN, STEPS, SECONDS = 5, 6, (1.0, 2.0, 3.0)
# Scenarios that are imagined together.
TOGETHER = 64
# Who is so near to where an observation has somebody, in metres, is it.
SAME = 0.2
WAYS = ("model, logged actions", "model, own actions", "constant velocity")
COLOURS = dict(zip(WAYS, ("tab:blue", "tab:cyan", "tab:orange"), strict=True))


class Case(NamedTuple):
    """A scenario: its first rows, and where ego and others went, in the ego's frame of the last of these.

    Attributes:
        rows: as replay has them, with the actions of the steps that follow.
        truth: places of the ego, then of the others as the observation has them.
        known: where somebody was still there.
    """

    rows: dict[str, np.ndarray]
    truth: Float[np.ndarray, "H N 2"]
    known: Bool[np.ndarray, "H N"]


def cases(cache: Path, logs: LogFolder, entries: list[Entry], keys: list[str]) -> Iterator[Case]:
    """Scenarios of a cache that are long enough, log by log."""
    for name in sorted({entry.scenario.log for entry in entries}):
        log, _ = logs.open(name)
        for entry in entries:
            scenario = entry.scenario
            if scenario.log == name:
                rows = episode_files.read(scenario.path(cache))
                truth, known = _truth(log, scenario.agent, scenario.frame + SEEN - 1, rows)
                yield Case({key: rows[key][: SEEN + STEPS] for key in keys}, truth, known)


def _truth(
    log: Log, agent: int, frame: int, rows: dict[str, np.ndarray]
) -> tuple[Float[np.ndarray, "H N 2"], Bool[np.ndarray, "H N"]]:
    row = log.find(np.array([agent]), np.array([frame]))
    pose = Poses(np.stack((log.x[row], log.y[row]), 1), log.heading[row])
    present = np.arange(*log.rows(frame).indices(len(log.id)))
    places = pose.seen(np.stack((log.x[present], log.y[present]), 1)[None])[0]
    shown = rows["agents"][SEEN - 1, :, -1, :2]
    apart = np.linalg.norm(shown[:, None] - places, axis=-1)
    nearest = apart.argmin(1)
    there = rows["agents_valid"][SEEN - 1, :, -1] & (apart.min(1) < SAME)
    ids = np.concatenate(([agent], log.id[present][nearest]))
    moments = frame + np.arange(1, STEPS + 1)[:, None]
    found = log.find(np.broadcast_to(ids, (STEPS, len(ids))), np.broadcast_to(moments, (STEPS, len(ids))))
    truth = pose.seen(np.stack((log.x[found], log.y[found]), -1).reshape(1, -1, 2))[0].reshape(STEPS, -1, 2)
    return truth, (found >= 0) & np.concatenate(([True], there))


def foreseen(agent: Dreamer, batch: list[Case], *, seed: int) -> dict[str, list[Traffic]]:
    """The traffic of some cases when they are last observed and after each step, in every way."""
    model = agent.model
    assert isinstance(model, TrafficModel)
    rows = {key: torch.from_numpy(np.stack([case.rows[key] for case in batch])) for key in batch[0].rows}
    rows = {key: value.flatten(2) if value.ndim > 3 else value for key, value in rows.items()}
    rows["prev_action"] = torch.cat((torch.zeros_like(rows["action"][:, :1]), rows["action"][:, :-1]), 1)
    seen = {key: value[:, :SEEN] for key, value in rows.items()}

    def logged(step: int, latent: Latent, traffic: Traffic) -> Tensor:
        return rows["action"][:, SEEN - 1 + step]

    def own(step: int, latent: Latent, traffic: Traffic) -> Tensor:
        feat = latent.feat()[:, None]
        if step:
            view = Candidates(model.predict_mask(feat, None), model.predict_lines(feat))
        else:
            last = {key: value[:, -1:] for key, value in seen.items()}
            view = Candidates(last[ACTION_MASK], model.observed_lines(last))
        around = each_part(traffic, lambda part: part[:, None])
        view = view._replace(agents=Agents(features(around), around.valid))
        return agent.behavior.actor(feat, None, view).mode()[:, 0]

    still = [observed({key: value[:, -1] for key, value in seen.items()})]
    for _ in range(STEPS):
        still.append(still[-1].after(torch.zeros(*still[-1].valid.shape, 3)))
    noise = uniform((len(batch), SEEN + STEPS, model.rssm.stoch_size), torch.Generator().manual_seed(seed))
    imagined = (model.foresee(seen, steps=STEPS, choose=choose, noise=noise) for choose in (logged, own))
    return dict(zip(WAYS, (*([still[0], *moments] for moments in imagined), still), strict=True))


class Foresight(NamedTuple):
    """What was foreseen of C cases, N agents in each.

    Attributes:
        errors: metres between where everybody was foreseen and where they were, NaN where nobody was.
        contact: whether the ego was foreseen to touch somebody by its own fault.
    """

    errors: Float[np.ndarray, "C H N"]
    contact: Bool[np.ndarray, " C"]


def foresight(agent: Dreamer, found: list[Case], *, seed: int) -> dict[str, Foresight]:
    """What is foreseen of cases, in every way."""
    parts: dict[str, list[Foresight]] = {way: [] for way in WAYS}
    for begin in range(0, len(found), TOGETHER):
        batch = found[begin : begin + TOGETHER]
        truth, known = (np.stack([getattr(case, name) for case in batch]) for name in ("truth", "known"))
        for way, traffic in foreseen(agent, batch, seed=seed + begin).items():
            places = torch.stack([moment.place for moment in traffic[1:]], 1).numpy()
            errors = np.where(known, np.linalg.norm(places - truth, axis=-1), np.nan)
            contact = torch.stack([own_fault(*pair) for pair in itertools.pairwise(traffic)]).any(0)
            parts[way].append(Foresight(errors, contact.numpy()))
    return {way: Foresight(*(np.concatenate(each) for each in zip(*part, strict=True))) for way, part in parts.items()}


def table(measured: dict[str, Foresight]) -> list[str]:
    """Mean errors of the ego and of the others, and how often the ego touches somebody, one line each."""
    steps = [round(seconds / STEP) - 1 for seconds in SECONDS]
    seconds = ", ".join(f"{each:g}" for each in SECONDS)
    lines = [f"| metres after {seconds} s | ego | others | contact by own fault, % |", "|---|---|---|---|"]
    for way, found in measured.items():
        ego, others = (
            ", ".join(f"{np.nanmean(found.errors[:, step, who]):.2f}" for step in steps)
            for who in (slice(1), slice(1, None))
        )
        lines.append(f"| {way} | {ego} | {others} | {100 * found.contact.mean():.1f} |")
    return lines


def draw(agent: Dreamer, case: Case, out: Path, *, seed: int) -> None:
    """Where everybody of a scenario went and was foreseen to go, seen from above."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    last = {key: value[SEEN - 1] for key, value in case.rows.items()}
    for line, valid in zip(last["lines"], last["lines_valid"], strict=True):
        axes.plot(*line[valid][:, :2].T, color="0.85", linewidth=6, zorder=0)
    start = np.concatenate((np.zeros((1, 2)), last["agents"][:, -1, :2]))
    for who in np.flatnonzero(case.known.any(0)):
        there = case.known[:, who]
        way = np.concatenate((start[None, who], case.truth[there, who]))
        axes.plot(*way.T, color="black", linewidth=3, alpha=0.4, label="logged" if who == 0 else None)
        axes.plot(*start[who], "o", color="tab:red" if who == 0 else "black", markersize=5, zorder=5)
    for name, traffic in foreseen(agent, [case], seed=seed).items():
        places = np.stack([moment.place[0].numpy() for moment in traffic[1:]])
        for who in np.flatnonzero(case.known.any(0)):
            way = np.concatenate((start[None, who], places[case.known[:, who], who]))
            axes.plot(*way.T, color=COLOURS[name], linewidth=1.2, marker=".", label=name if who == 0 else None)
    axes.set(xlim=(-30, 70), ylim=(-30, 30), aspect="equal", xlabel="metres ahead", ylabel="metres to the left")
    axes.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _telling(case: Case) -> float:
    """How much happens in a case near the ego: metres by which others change their ways, beside its own."""
    moved = np.diff(case.truth, 2, axis=0)
    near = np.linalg.norm(case.truth[0], axis=-1) < 50
    return float(np.where(case.known[2:] & case.known[:-2] & near, np.linalg.norm(moved, axis=-1), 0).sum())


def main(argv: list[str]) -> None:
    """Print the tables of the sets, and draw one scenario."""
    parser = Parser("python -m benchmarks.traffic_prediction", description=__doc__)
    parser.add_argument("run", type=Path, help="a run of dreamer.py with model.loss_scales.motion")
    parser.add_argument("--cache", type=Path, required=True, help="that planner.py has filled")
    parser.add_argument("--logs", type=Path, help="of the cache, where it was filled from a folder of logs")
    parser.add_argument("--sets", nargs="+", default=["test", "held_out"], help="lists of the cache's scenarios")
    parser.add_argument("--most", type=int, default=1000, help="scenarios of each set, spread over it")
    parser.add_argument("--seed", type=int, default=0, help="of the latents that are drawn")
    parser.add_argument("--out", type=Path, help="a picture of one scenario")
    arguments = parser.parse_args(argv)
    with one_line_errors("benchmarks.traffic_prediction", *launch.USER_ERRORS):
        loaded = load_run(arguments.run, make_agent=Dreamer, device=CPU, defaults=load_defaults(CONFIGS))
        loaded.setup.close()
        agent: Any = loaded.agent
        if not isinstance(agent.model, TrafficModel):
            raise UserError(f"{arguments.run} foresees no traffic; train with model.loss_scales.motion above 0")
        keys = [*agent.task.spaces, "is_first", "is_last"]
        logs = LogFolder(arguments.logs or arguments.cache / ".logs")
        for name in arguments.sets:
            entries = _listed(arguments.cache, name, arguments.most)
            found = list(cases(arguments.cache, logs, entries, keys))
            others = sum(int(case.known[-1, 1:].sum()) for case in found)
            show(f"{name}: {len(found):,} scenarios, {others:,} others that are still there in the end")
            show("\n".join(table(foresight(agent, found, seed=arguments.seed))))
            if arguments.out and name == arguments.sets[0]:
                draw(agent, max(found, key=_telling), arguments.out, seed=arguments.seed)


def _listed(cache: Path, name: str, most: int) -> list[Entry]:
    """Scenarios of a set that are long enough, evenly spread over it."""
    listed = set(episode_files.EpisodeList(cache / f"{name}.txt").names)
    entries = [
        entry
        for entry in Cache(cache).manifest()
        if str(entry.scenario.path(Path())) in listed and entry.scenario.rows >= SEEN + STEPS
    ]
    if not entries:
        raise UserError(f"{cache}/{name}.txt names no scenario of {SEEN + STEPS} rows")
    places = np.linspace(0, len(entries) - 1, min(most, len(entries))).round().astype(int)
    return [entries[place] for place in places]


if __name__ == "__main__":
    main(sys.argv[1:])
