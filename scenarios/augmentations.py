"""Samples as they might have been: each augmentation is a function of a batch and of a random generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32

from scenarios.samples import Samples
from settings.scenarios import AugmentSettings

Augmentation = Callable[[Samples, np.random.Generator], Samples]

# Arrays of points: which of them are real, and where in their last axis are directions and speeds, as pairs (x, y), or
# a heading. All of them begin with x and y.
_POINTS: dict[str, tuple[str, tuple[int, ...], int | None]] = {
    "agents": ("agents_valid", (2, 4), None),
    "roads": ("roads_valid", (2,), None),
    "lines": ("lines_valid", (2,), None),
    "future": ("future_valid", (), 2),
}
# The place of the yaw rate in `ego`, the last of the numbers there that say how the ego moves.
YAW_RATE = 2


def chosen(settings: AugmentSettings) -> list[Augmentation]:
    """Those that settings ask for, in the order in which they are applied."""
    augmentations: list[Augmentation] = []
    if settings.drop_agents:
        augmentations.append(drop_agents(settings.drop_agents))
    if settings.shift or settings.turn:
        augmentations.append(displace(settings.shift, settings.turn))
    if settings.hide_motion:
        augmentations.append(hide_motion(settings.hide_motion))
    if settings.mirror:
        augmentations.append(mirror(settings.mirror))
    return augmentations


def augment(samples: Samples, augmentations: Sequence[Augmentation], rng: np.random.Generator) -> Samples:
    """All of them, one after the other; the samples given stay as they are."""
    for augmentation in augmentations:
        samples = augmentation(samples, rng)
    return samples


def mirror(share: float) -> Augmentation:
    """Left is right in a share of the samples: everything is seen in a mirror along the ego's axis.

    Which lines, modes and agents there are stays the same, and so does the choice.
    """

    def apply(samples: Samples, rng: np.random.Generator) -> Samples:
        chosen = rng.random(len(samples["ego"])) < share
        mirrored = dict(samples)
        for name, (_, pairs, heading) in _POINTS.items():
            if name in samples:
                sign = np.ones(samples[name].shape[-1], np.float32)
                sign[[1, *(pair + 1 for pair in pairs), *(() if heading is None else (heading,))]] = -1
                mirrored[name] = np.where(_rows(chosen, samples[name]), samples[name] * sign, samples[name])
        ego = samples["ego"].copy()
        ego[chosen, YAW_RATE] *= -1
        mirrored["ego"] = ego
        return mirrored

    return apply


def displace(shift: float, turn: float) -> Augmentation:
    """The ego stands beside its place, and in another direction, by uniform draws; all else is where it was.

    The future stays where it was driven, so that a model learns to come back to it, and the choice stays the same: the
    lines are the same, and so is the way along them.

    Args:
        shift: metres to the left or to the right at most.
        turn: radians at most.
    """

    def apply(samples: Samples, rng: np.random.Generator) -> Samples:
        count = len(samples["ego"])
        aside = rng.uniform(-shift, shift, count).astype(np.float32)
        turned = rng.uniform(-turn, turn, count).astype(np.float32)
        moved = dict(samples)
        for name, (valid, pairs, heading) in _POINTS.items():
            if name in samples:
                seen = _seen_from(samples[name], aside, turned, pairs=pairs, heading=heading)
                moved[name] = np.where(_valid(samples, name, valid)[..., None], seen, samples[name])
        return moved

    return apply


def drop_agents(share: float) -> Augmentation:
    """Some of the other agents are not seen: a share of them that is drawn for each sample, up to `share`.

    Those that are left close ranks, nearest first.
    """

    def apply(samples: Samples, rng: np.random.Generator) -> Samples:
        valid = samples["agents_valid"]
        shares = rng.uniform(0, share, len(valid))
        stays = rng.random(valid.shape[:2]) >= shares[:, None]
        kept = stays[..., None] & valid
        order = np.argsort(~kept.any(-1), axis=1, kind="stable")
        agents = np.where(kept[..., None], samples["agents"], np.float32(0))
        return {
            **samples,
            "agents": np.take_along_axis(agents, order[..., None, None], 1),
            "agents_valid": np.take_along_axis(kept, order[..., None], 1),
        }

    return apply


def hide_motion(share: float) -> Augmentation:
    """In a share of the samples nobody says how the ego moves: speed, acceleration and yaw rate are 0.

    Whoever drives as it drives already has imitated logs well, and in the closed loop never starts again
    (J. Cheng et al., "Rethinking imitation-based planner for autonomous driving", 2023).
    """

    def apply(samples: Samples, rng: np.random.Generator) -> Samples:
        ego = samples["ego"].copy()
        ego[rng.random(len(ego)) < share, : YAW_RATE + 1] = 0
        return {**samples, "ego": ego}

    return apply


def _seen_from(
    points: Float32[np.ndarray, "B *S D"],
    aside: Float32[np.ndarray, " B"],
    turned: Float32[np.ndarray, " B"],
    *,
    pairs: Sequence[int],
    heading: int | None,
) -> Float32[np.ndarray, "B *S D"]:
    """Points in the frame of an ego that stands `aside` metres to the left, turned to the left by so many radians."""
    seen = points.copy()
    aside, turned = _rows(aside, points[..., 0]), _rows(turned, points[..., 0])
    cos, sin = np.cos(turned), np.sin(turned)
    for pair in (0, *pairs):
        x, y = points[..., pair], points[..., pair + 1] - (0 if pair else aside)
        seen[..., pair], seen[..., pair + 1] = cos * x + sin * y, cos * y - sin * x
    if heading is not None:
        seen[..., heading] = points[..., heading] - turned
    return seen


def _valid(samples: Samples, name: str, valid: str) -> np.ndarray:
    return samples[valid] if valid in samples else np.ones(samples[name].shape[:-1], bool)


def _rows(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Values of rows, with as many axes as an array has."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
