"""What rows without any reference line do to a planner's training, and to that of a decoder as it is often written.

    python -m benchmarks.reference_lines --configs drive --batches 500

trains a planner on batches of 8 rows, and counts the batches in which an output, a loss or a gradient is not finite.
The rows are of everybody on the road in the logs of a cache, cyclists and pedestrians among them; those without a line
are drawn as often as `--without` says. Beside the planner stand two decoders in which lines attend to one another with
faults, and the planner's first weights in every batch, since one NaN would stay in them: the mask of rows is repeated
in another order than the rows are laid out in, and a softmax is taken of nothing but minus infinity; and that softmax
alone. With `--made_up true` rows are made up, for which no simulator is needed.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import planner
from benchmarks.flags import CONFIGS, number
from config import one_line_errors, parse_command_line
from driving.candidates import ACTIONS, MODES, STEPS
from driving.features import features
from driving.lines import LINES
from guard import Guard
from imitation.batches import NEEDS, as_driven, as_features
from imitation.decoder import DecoderLayer
from imitation.losses import Driven, imitation_losses
from imitation.network import PlanningNetwork
from imitation.scene_encoder import Gathering
from imitation.task import PlanningTask
from scenarios.cache import Cache
from scenarios.known_parts import KNOWN
from scenarios.logs import prepared
from scenarios.parts import chosen
from scenarios.samples import Samples
from scenarios.work import workers_of
from settings.imitation import ImitationSettings
from settings.scenarios import ScenarioSettings
from system.terminal import show
from training.devices import make_generators, prepare_torch

ROWS = 8
# Every so many frames of a log are read.
EVERY = 10
ENTRY_KEYS = {
    "batches": f"how many batches of {ROWS} rows (500)",
    "without": "share of rows without a line that batches are drawn with (0.16)",
    "made_up": "true: rows are made up instead of read from logs (false)",
}
CPU = torch.device("cpu")


class AsOftenWritten(nn.Module):
    """Attention of lines to one another, in place of a `Gathering`, with its mask made the wrong way round."""

    def __init__(self, gathering: Gathering, *, order_mended: bool) -> None:
        super().__init__()
        self.gathering, self.order_mended = gathering, order_mended

    def forward(self, queries: Float[Tensor, "B M R E"], valid: Bool[Tensor, "B M R"]) -> Float[Tensor, "B M R E"]:
        batch, modes, lines, _ = queries.shape
        attention = self.gathering.attention
        # Rows are ordered (batch, mode).
        normed = self.gathering.norm(queries).flatten(0, 1)
        query = attention.query(normed)
        key, value = attention.key_value(normed).chunk(2, -1)
        of_line = valid.any(1)
        if self.order_mended:
            mask = of_line[:, None].expand(-1, modes, -1).flatten(0, 1)
        else:
            # `repeat` orders them (mode, batch).
            mask = of_line.repeat(modes, 1)
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        weights = torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), -1)
        gathered = attention.out(weights @ value).view(batch, modes, lines, -1)
        return queries + gathered.masked_fill(~valid[..., None], 0.0)


class Bad(NamedTuple):
    """Whether, of one batch, an output, a loss or a gradient is not finite."""

    output: bool
    loss: bool
    gradient: bool


def judged(network: PlanningNetwork, features: Mapping[str, Tensor], driven: Driven) -> Bad:
    """What comes of one batch."""
    plans = network(features)
    losses, _ = imitation_losses(plans, driven)
    loss = torch.stack(list(losses.values())).sum()
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    legal = plans.action_mask
    return Bad(
        output=not_finite(plans.scores[legal], plans.trajectories[legal]),
        loss=not_finite(loss),
        gradient=not_finite(*(gradient for gradient in gradients if gradient is not None)),
    )


def not_finite(*tensors: Tensor) -> bool:
    """Whether a number in one of them is not."""
    return not all(bool(tensor.isfinite().all()) for tensor in tensors)


def as_often_written(network: PlanningNetwork, *, order_mended: bool) -> PlanningNetwork:
    """The same network with the same weights, in which lines attend to one another with faults."""
    faulty = copy.deepcopy(network)
    for layer in faulty.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.along_lines = AsOftenWritten(layer.along_lines, order_mended=order_mended)  # type: ignore[assignment]
    return faulty


def made_up(count: int, seed: int) -> Samples:
    """Rows in the layout of a cache; a fourth of them has no line."""
    rng = np.random.default_rng(seed)
    shapes = {name: spec for part in chosen(NEEDS, KNOWN) for name, spec in part.arrays.items()}
    samples: Samples = {}
    for name, spec in shapes.items():
        if spec.dtype == np.bool_:
            samples[name] = rng.random((count, *spec.shape)) < 0.6
        else:
            samples[name] = (5 * rng.standard_normal((count, *spec.shape))).astype(spec.dtype)
    lines = rng.integers(0, 4, count)
    present = np.arange(LINES) < lines[:, None]
    samples["lines_valid"] = np.broadcast_to(present[..., None], samples["lines_valid"].shape).copy()
    for name in ("agents", "roads", "lines"):
        samples[name] *= samples[f"{name}_valid"][..., None]
    samples["action_mask"] = np.concatenate((present.repeat(MODES, 1), np.ones((count, 1), bool)), 1)
    samples["action"] = np.where(lines, rng.integers(0, MODES, count), ACTIONS - 1)
    return samples


def logged(settings: ScenarioSettings) -> dict[str, Samples]:
    """The features of everybody in the logs of a cache, by the map; simulations are recorded where there is none yet.

    Raises:
        UserError: there is no log, and no simulator.
    """
    with workers_of(settings.cache.workers) as workers:
        folder, names = prepared(settings.logs, Cache(Path(settings.cache.path)).logs, workers)
    found: dict[str, list[Samples]] = {}
    for name in names:
        log, road_map = folder.open(name)
        for frame in range(0, log.frames, EVERY):
            if len(agents := log.id[log.rows(frame)]):
                found.setdefault(log.map_name, []).append(features(log, road_map, agents, frame))
    return {map_name: joined(parts) for map_name, parts in found.items()}


def joined(parts: list[Samples]) -> Samples:
    """All rows of some samples."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batches(samples: Samples, count: int, *, share: float, seed: int) -> Iterator[Samples]:
    """Batches of rows drawn at random, of which a share has no line, where there are such rows."""
    rng, has_line = np.random.default_rng(seed), samples["lines_valid"].any((1, 2))
    kinds = [np.flatnonzero(has_line), np.flatnonzero(~has_line)]
    for _ in range(count):
        wanted = (rng.random(ROWS) < share).astype(int)
        drawn = [rng.choice(kinds[kind] if len(kinds[kind]) else kinds[1 - kind]) for kind in wanted]
        yield {name: values[drawn] for name, values in samples.items()}


def count_bad(
    samples: Samples, count: int, settings: ImitationSettings, *, share: float, seed: int
) -> dict[str, list[Bad]]:
    """What each decoder makes of some batches; the planner learns from them."""
    generators = make_generators(seed, CPU)
    guard = Guard(CPU)
    ours = planner.Imitator(PlanningTask(MODES, STEPS), settings, device=CPU, generators=generators, guard=guard)
    others = {
        "the mask in another order, a softmax of nothing": as_often_written(ours.network, order_mended=False),
        "a softmax of nothing alone": as_often_written(ours.network, order_mended=True),
    }
    found: dict[str, list[Bad]] = {"planner.py": [], **{name: [] for name in others}}
    for samples_of_batch in batches(samples, count, share=share, seed=seed):
        given, driven = as_features(samples_of_batch, CPU), as_driven(samples_of_batch, CPU)
        for name, network in {"planner.py": ours.network, **others}.items():
            found[name].append(judged(network, given, driven))
        ours.learn(given, driven, progress=0.0)
    return found


def main(argv: list[str]) -> None:
    """Read the command line, and print a row for each map and decoder."""
    with one_line_errors("benchmarks.reference_lines"):
        command = parse_command_line(
            argv,
            config_path=CONFIGS,
            description=__doc__ or "",
            entry_keys=ENTRY_KEYS,
            base=[planner.SECTION],
            foreign_keys=planner.FOREIGN_KEYS,
        )
        prepare_torch(command.config)
        count = int(number(command.entry["batches"] or "500", "batches", least=1))
        share = number(command.entry["without"] or "0.16", "without", least=0)
        seed = command.config.seed
        if command.entry["made_up"] == "true":
            sets = {"made up": made_up(count * ROWS, seed)}
        else:
            sets = logged(ScenarioSettings.of(command.config))
        show("| rows of | without a line | drawn | decoder | batches | outputs | losses | gradients not finite |")
        show("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, samples in sets.items():
            without = 100 * float((~samples["lines_valid"].any((1, 2))).mean())
            for decoder, bad in count_bad(
                samples, count, ImitationSettings.of(command.config), share=share, seed=seed
            ).items():
                output, loss, gradient = (sum(column) for column in zip(*bad, strict=True))
                rows = f"{name} | {without:.1f} % | {100 * share:.0f} %"
                show(f"| {rows} | {decoder} | {count} | {output} | {loss} | {gradient} |")


if __name__ == "__main__":
    main(sys.argv[1:])
