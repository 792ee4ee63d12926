"""What gymnasium's spaces mean to an agent: observations as flat keys, actions as rows of numbers."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space, spaces

from config import UserError
from envs.tasks import ACTION_MASK, ActionSpec, ObservationKey

# The key of an observation that is no dict.
PLAIN_KEY = "observation"

# The encoder and the decoder halve and double an image four times.
IMAGE_MULTIPLE = 16

# What a replayed batch holds besides observations.
RESERVED_KEYS = frozenset(
    {"reward", "is_first", "is_last", "is_terminal", "action", "prev_action", "episode_start"}
    | {"context_deter", "context_stoch", "env", "column"}
)

NUMPY_DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.int64: np.dtype(np.int64),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}


class _Leaf(NamedTuple):
    """A space without parts, and the indices that lead to its value in an observation."""

    space: Space
    path: tuple[str | int, ...]


def observation_keys(space: Space) -> dict[str, ObservationKey]:
    """How each part of an observation is read, by flat key; the top-level `action_mask` is left out.

    A plain space has the one key "observation"; parts of dicts and tuples are called "a/b" and "a/0". An array of
    floats [N, F] called "x" beside N flags called "x_mask" is a set, and the flags say which elements are real.

    Raises:
        UserError: a part cannot be read, has a reserved name, or there is none. The message says what would do.
    """
    leaves = _leaves(space)
    if not leaves:
        raise UserError(f"the observation space {space} holds nothing to observe; one part at least is needed")
    reserved = sorted(leaves.keys() & RESERVED_KEYS)
    if reserved:
        raise UserError(f"observations may not be called {', '.join(reserved)}: replay stores others so; rename them")
    return {name: _key(name, leaves) for name in leaves}


def flattener(space: Space) -> Callable[[Any], dict[str, np.ndarray]]:
    """What reads an observation of `space`: as arrays under the keys of `observation_keys`, and its bool `action_mask`.

    It raises `UserError` where a part is missing, has another shape than its space, or a class that its space does
    not have, or is NaN where its space has no such thing. In what is read as float32, NaN passes, and what float32
    cannot hold becomes infinite.
    """
    leaves = _leaves(space)
    keys = {name: _key(name, leaves) for name in leaves}
    mask_space = _mask_space(space)
    mask = None if mask_space is None else _Leaf(mask_space, (ACTION_MASK,))

    def flatten(obs: Any) -> dict[str, np.ndarray]:
        flat = {name: _read(name, leaf, keys[name], obs) for name, leaf in leaves.items()}
        if mask is not None:
            flat[ACTION_MASK] = _cast(ACTION_MASK, mask, _value(ACTION_MASK, mask, obs), np.dtype(np.bool_))
        return flat

    return flatten


def action_spec(action_space: Space, observation_space: Space) -> ActionSpec:
    """What can be done; masked where observations hold an `action_mask` at the top.

    Raises:
        UserError: the actions are of an unsupported kind, or the mask does not fit them.
    """
    spec = _unmasked_spec(action_space)
    mask_space = _mask_space(observation_space)
    if mask_space is None:
        return spec
    if spec.kind != "discrete":
        raise UserError(f"observations hold an {ACTION_MASK}, but {action_space} cannot be masked; only Discrete can")
    if not isinstance(mask_space, spaces.Box | spaces.MultiBinary) or mask_space.shape != spec.sizes:
        raise UserError(f"{ACTION_MASK} is {mask_space}, but there are {spec.sizes[0]} actions: one flag each")
    return spec._replace(masked=True)


def to_env_action(space: Space, row: np.ndarray | np.generic) -> Any:
    """One action of an agent as `space` has it.

    Args:
        space: what `action_spec` was made from.
        row: one action, with the shape of the spec. Numbers are clipped to [-1, 1] and scaled to the bounds; one
            without two finite bounds is taken as it is, clipped at the finite one if any.
    """
    if isinstance(space, spaces.Discrete):
        return space.start + np.int64(row)
    if isinstance(space, spaces.MultiDiscrete):
        return (space.start + row).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return row.astype(space.dtype)
    assert isinstance(space, spaces.Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    row = row.astype(np.float64).reshape(space.shape)
    scaled = np.isfinite(low) & np.isfinite(high)
    share = (np.clip(row, -1, 1) + 1) / 2
    # The bounds are weighted, not their difference taken: bounds at the ends of the number range would overflow.
    inside = np.where(scaled, low, 0) * (1 - share) + np.where(scaled, high, 0) * share
    return np.clip(np.where(scaled, inside, row), low, high).astype(space.dtype)


def _unmasked_spec(space: Space) -> ActionSpec:
    if isinstance(space, spaces.Discrete):
        return ActionSpec("discrete", (int(space.n),))
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return ActionSpec("multi_discrete", tuple(space.nvec.tolist()))
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return ActionSpec("multi_discrete", (2,) * space.shape[0])
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating) and math.prod(space.shape) > 0:
        return ActionSpec("continuous", (math.prod(space.shape),))
    raise UserError(
        f"the action space {space} is not supported; "
        "Discrete, MultiDiscrete and MultiBinary of one dimension, and Box of floats are"
    )


def _mask_space(space: Space) -> Space | None:
    return space.spaces.get(ACTION_MASK) if isinstance(space, spaces.Dict) else None


def _leaves(space: Space) -> dict[str, _Leaf]:
    """Parts of a space without the top-level mask, by flat name."""
    leaves: dict[str, _Leaf] = {}

    def visit(part: Space, path: tuple[str | int, ...]) -> None:
        if isinstance(part, spaces.Dict | spaces.Tuple):
            named = part.items() if isinstance(part, spaces.Dict) else enumerate(part.spaces)
            for name, child in named:
                if (*path, name) != (ACTION_MASK,):
                    visit(child, (*path, name))
            return
        flat_name = "/".join(map(str, path)) or PLAIN_KEY
        if flat_name in leaves:
            raise UserError(f"two observations are called '{flat_name}'; rename one of them")
        leaves[flat_name] = _Leaf(part, path)

    visit(space, ())
    return leaves


def _key(name: str, leaves: dict[str, _Leaf]) -> ObservationKey:
    space = leaves[name].space
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise UserError(
            f"observation '{name}' has the space {space}, which is not supported; "
            "Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these are"
        )
    shape = space.shape
    assert shape is not None
    size = math.prod(shape)
    if size == 0:
        raise UserError(f"observation '{name}' has the space {space}, which holds no number; leave it out")
    if _is_validity(name, leaves):
        return ObservationKey("validity", shape, torch.bool)
    if isinstance(space, spaces.Discrete):
        return ObservationKey("classes", (1,), torch.int64, classes=(int(space.n),))
    if isinstance(space, spaces.MultiDiscrete):
        return ObservationKey("classes", (size,), torch.int64, classes=tuple(space.nvec.ravel().tolist()))
    if isinstance(space, spaces.MultiBinary):
        return ObservationKey("classes", (size,), torch.int64, classes=(2,) * size)
    if space.dtype == np.uint8 and (len(shape) == 3 or _is_grey_image(space)):
        return ObservationKey("image", _image_shape(name, shape), torch.uint8)
    if _is_validity(f"{name}_mask", leaves):
        return ObservationKey("set", shape, torch.float32, validity=f"{name}_mask")
    return ObservationKey("vector", (size,), torch.float32)


def _is_validity(name: str, leaves: dict[str, _Leaf]) -> bool:
    """Whether `name` says which elements of a set are real."""
    elements = leaves.get(name.removesuffix("_mask"))
    if name not in leaves or not name.endswith("_mask") or elements is None:
        return False
    space = leaves[name].space
    if isinstance(space, spaces.Box) and space.dtype != np.bool_:
        flags = np.issubdtype(space.dtype, np.integer) and (space.low == 0).all() and (space.high == 1).all()
    else:
        flags = isinstance(space, spaces.Box | spaces.MultiBinary)
    return (
        bool(flags)
        and isinstance(elements.space, spaces.Box)
        and np.issubdtype(elements.space.dtype, np.floating)
        and len(elements.space.shape) == 2
        and space.shape == elements.space.shape[:1]
    )


def _is_grey_image(space: spaces.Box) -> bool:
    """Whether bytes [H, W] are pixels: they take all values, and the size is one of images."""
    sized = len(space.shape) == 2 and not any(side % IMAGE_MULTIPLE for side in space.shape)
    return sized and bool((space.low == 0).all() and (space.high == 255).all())


def _image_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels, from an image's shape in either order; grey ones may have no channels."""
    if len(shape) == 2:
        return *shape, 1
    channels_first = shape[0] <= 4 < shape[2]
    height, width, channels = (*shape[1:], shape[0]) if channels_first else shape
    if height % IMAGE_MULTIPLE or width % IMAGE_MULTIPLE:
        raise UserError(
            f"observation '{name}' is an image of {height} x {width}; both must be multiples of {IMAGE_MULTIPLE}: "
            "wrap the environment in gymnasium.wrappers.ResizeObservation(env, (64, 64))"
        )
    return height, width, channels


def _value(name: str, leaf: _Leaf, obs: Any) -> np.ndarray:
    try:
        value = np.asarray(functools.reduce(operator.getitem, leaf.path, obs))
    except (LookupError, TypeError):
        raise UserError(f"observation '{name}' is missing; its space is {leaf.space}") from None
    if value.shape != leaf.space.shape:
        raise UserError(f"observation '{name}' has shape {value.shape}, but its space is {leaf.space}")
    return value


def _read(name: str, leaf: _Leaf, key: ObservationKey, obs: Any) -> np.ndarray:
    value = _value(name, leaf, obs)
    if key.kind == "image" and value.ndim == 3 and value.shape != key.shape:
        value = value.transpose(1, 2, 0)
    elif isinstance(leaf.space, spaces.Discrete | spaces.MultiDiscrete):
        value = np.asarray(value - leaf.space.start)
    value = _cast(name, leaf, value, NUMPY_DTYPES[key.dtype]).reshape(key.shape)
    # A class out of range would only fail in the encoder, on a GPU without a word on where.
    if key.kind == "classes" and ((value < 0) | (value >= key.classes)).any():
        raise UserError(f"observation '{name}' has a value outside its space {leaf.space}")
    return value


def _cast(name: str, leaf: _Leaf, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float32 and value.dtype == np.float64:
        with np.errstate(over="ignore"):
            return value.astype(dtype)
    # As a flag, NaN would pass for True.
    if dtype != np.float32 and value.dtype.kind == "f" and not np.isfinite(value).all():
        raise UserError(f"observation '{name}' has a value outside its space {leaf.space}")
    return value.astype(dtype)
