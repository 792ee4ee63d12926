"""What gymnasium's spaces mean to an agent: observations as flat keys, actions as rows of numbers."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space, spaces
from jaxtyping import UInt8

from config import UserError, compiled
from envs.pixels import Pixels
from envs.tasks import ACTION_MASK, ActionSpec, ObservationKey

# The key of an observation that is no dict.
PLAIN_KEY = "observation"

# Whole numbers of an action's Box are choices; with more values than these they were meant as a quantity.
MOST_LEVELS = 256
# Regular expressions over the keys that are to be read, where a user leaves out none.
ALL_KEYS = (".*",)
READABLE = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these are"

# The keys of a replayed batch that are no observations.
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


class _Unreadable(NamedTuple):
    """Why a part of an observation cannot be read, and what would do besides leaving it out."""

    cause: str
    remedy: str = ""


def observation_keys(space: Space, *, wanted: Sequence[str] = ALL_KEYS) -> dict[str, ObservationKey]:
    """How each part of an observation is read, by flat key; the top-level `action_mask` is left out.

    A plain space has the one key "observation"; parts of dicts and tuples are called "a/b" and "a/0".

    - A `Box` is an image where it has three axes, the shorter one of the first and the last being the channels (the
      last, where they are equal), both others of 16 pixels at least, and its bounds are those of pixels: 0 and 255, or
      0 and 1 of floats. With four axes the first one counts stacked frames. Bytes of two axes, both of 16 at least,
      are a grey image. Sides that are no multiples of 16 get a black frame.
    - An array of floats [N, F] called "x" beside N flags called "x_mask" is a set, and the flags say which elements
      are real.
    - Any other `Box` is numbers, whole ones included, such as a grid of 7 x 7 cells.
    - `Discrete`, `MultiDiscrete` and `MultiBinary` are classes.

    Args:
        space: of an environment's observations.
        wanted: regular expressions. A part that cannot be read is left out where none of them matches its whole key.

    Raises:
        UserError: a part cannot be read, has a reserved name, or there is none. The message says what would do.
    """
    leaves = _leaves(space)
    unreadable = _unreadable(leaves)
    refused = [name for name in unreadable if any(compiled(pattern).fullmatch(name) for pattern in wanted)]
    readable = {name: leaf for name, leaf in leaves.items() if name not in unreadable}
    if refused:
        cause, remedy = unreadable[refused[0]]
        # A lookahead lets all other keys pass, however many there are.
        others = f"(?!({'|'.join(map(re.escape, refused))})$).*"
        leave_out = f"leave it out with --model.encode_keys '{others}' --model.decode_keys '{others}'" * bool(readable)
        remedies = "; or ".join(filter(None, (remedy, leave_out)))
        raise UserError(f"observation '{refused[0]}' {cause}" + (f"; {remedies}" if remedies else ""))
    if not readable:
        raise UserError(f"the observation space {space} holds nothing to observe; one part at least is needed")
    return {name: _key(name, readable) for name in readable}


def left_out(space: Space) -> dict[str, str]:
    """The parts of an observation that `observation_keys` cannot read, each with the reason."""
    return {name: found.cause for name, found in _unreadable(_leaves(space)).items()}


def flattener(space: Space) -> Callable[[Any], dict[str, np.ndarray]]:
    """What reads an observation of `space`: as arrays under the keys of `observation_keys`, and its bool `action_mask`.

    What `observation_keys` cannot read is passed over.

    It raises `UserError` where a part is missing, has another shape than its space, holds no numbers, fractions where
    its space has whole ones, or a class or pixel that its space does not have, or is NaN where its space has no such
    thing. In what is read as float32, NaN passes, and what float32 cannot hold becomes infinite.
    """
    parts = _leaves(space)
    unreadable = _unreadable(parts)
    leaves = {name: leaf for name, leaf in parts.items() if name not in unreadable}
    keys = {name: _key(name, leaves) for name in leaves}
    images = {name: Pixels.of(leaf.space) for name, leaf in leaves.items() if keys[name].kind == "image"}
    mask_space = _mask_space(space)
    mask = None if mask_space is None else _Leaf(mask_space, (ACTION_MASK,))

    def flatten(obs: Any) -> dict[str, np.ndarray]:
        flat = {name: _read(name, leaf, keys[name], obs, images.get(name)) for name, leaf in leaves.items()}
        if mask is not None:
            flat[ACTION_MASK] = _cast(ACTION_MASK, mask, _value(ACTION_MASK, mask, obs), np.dtype(np.bool_))
        return flat

    return flatten


def action_spec(action_space: Space, observation_space: Space) -> ActionSpec:
    """What can be done; masked where observations hold an `action_mask` at the top.

    One `Discrete` is a discrete action. Dicts and tuples are flattened: all their parts are choices (`Discrete`,
    `MultiDiscrete`, `MultiBinary`, `Box` of whole numbers), or all of them are `Box` of floats.

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
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return _composed(
            space, iter(np.split(row, np.cumsum([len(_choices(leaf)[0]) for leaf in leaf_spaces(space)])[:-1]))
        )
    if isinstance(space, spaces.Discrete):
        return space.start + np.int64(row.reshape(()))
    if isinstance(space, spaces.MultiDiscrete):
        return (space.start + row.reshape(space.shape)).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return row.reshape(space.shape).astype(space.dtype)
    assert isinstance(space, spaces.Box)
    if not np.issubdtype(space.dtype, np.floating):
        return np.asarray(space.low + row.reshape(space.shape), space.dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    row = row.astype(np.float64).reshape(space.shape)
    scaled = np.isfinite(low) & np.isfinite(high)
    share = (np.clip(row, -1, 1) + 1) / 2
    # The bounds are weighted, since their difference would overflow at the ends of the number range.
    inside = np.where(scaled, low, 0) * (1 - share) + np.where(scaled, high, 0) * share
    return np.asarray(np.clip(np.where(scaled, inside, row), low, high), space.dtype)


def _composed(space: Space, rows: Iterator[np.ndarray]) -> Any:
    """An action of a space with parts, from the rows of its parts without parts, in order."""
    if isinstance(space, spaces.Dict):
        return {name: _composed(part, rows) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_composed(part, rows) for part in space.spaces)
    return to_env_action(space, next(rows))


def leaf_spaces(space: Space) -> list[Space]:
    """The parts of a space that have no parts themselves, in its order."""
    if isinstance(space, spaces.Dict):
        return [leaf for part in space.values() for leaf in leaf_spaces(part)]
    if isinstance(space, spaces.Tuple):
        return [leaf for part in space.spaces for leaf in leaf_spaces(part)]
    return [space]


def _unmasked_spec(space: Space) -> ActionSpec:
    if isinstance(space, spaces.Discrete):
        return ActionSpec("discrete", (int(space.n),))
    choices = [_choices(leaf) for leaf in leaf_spaces(space)]
    sizes = tuple(size for part, _ in choices for size in part)
    if not sizes:
        raise UserError(f"the action space {space} holds no action")
    kinds = {chosen for part, chosen in choices if part}
    if kinds == {True}:
        return ActionSpec("multi_discrete", sizes)
    if kinds == {False}:
        return ActionSpec("continuous", (len(sizes),))
    raise UserError(
        f"the action space {space} mixes choices and real numbers; one kind is needed: give the numbers a few levels to"
        " choose from in a gymnasium.ActionWrapper, or take Box of floats throughout"
    )


def _choices(space: Space) -> tuple[tuple[int, ...], bool]:
    """How many values each entry of an action has (1 where it is a real number), and whether they are chosen from.

    Raises:
        UserError: no actor knows such actions. The message says which would do.
    """
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), True
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(space.nvec.ravel().tolist()), True
    if isinstance(space, spaces.MultiBinary):
        return (2,) * math.prod(space.shape), True
    if not isinstance(space, spaces.Box):
        raise UserError(
            f"the action space {space} is not supported; "
            "Discrete, MultiDiscrete, MultiBinary, Box, and Dict and Tuple of these are"
        )
    if np.issubdtype(space.dtype, np.floating):
        return (1,) * math.prod(space.shape), False
    sizes = [int(high) - int(low) + 1 for low, high in zip(space.low.ravel(), space.high.ravel(), strict=True)]
    if max(sizes, default=1) > MOST_LEVELS:
        raise UserError(
            f"the action space {space} has whole numbers of {max(sizes)} values, which are chosen among as far as"
            f" {MOST_LEVELS}; declare narrower bounds, or take a Box of floats and round them in the environment"
        )
    return tuple(sizes), True


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


def _unreadable(leaves: dict[str, _Leaf]) -> dict[str, _Unreadable]:
    """The parts that cannot be read, by flat name."""
    found = {}
    for name, leaf in leaves.items():
        space = leaf.space
        if name in RESERVED_KEYS:
            found[name] = _Unreadable("has a name under which replay stores something else", "rename it")
        elif not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            found[name] = _Unreadable(f"has the space {space}, which is not supported ({READABLE})")
        elif math.prod(space.shape or ()) == 0:
            found[name] = _Unreadable(f"has the space {space}, which holds no number")
    return found


def _key(name: str, leaves: dict[str, _Leaf]) -> ObservationKey:
    space = leaves[name].space
    shape = space.shape
    assert shape is not None
    size = math.prod(shape)
    if _is_validity(name, leaves):
        return ObservationKey("validity", shape, torch.bool)
    if isinstance(space, spaces.Discrete):
        return ObservationKey("classes", (1,), torch.int64, classes=(int(space.n),))
    if isinstance(space, spaces.MultiDiscrete):
        return ObservationKey("classes", (size,), torch.int64, classes=tuple(space.nvec.ravel().tolist()))
    if isinstance(space, spaces.MultiBinary):
        return ObservationKey("classes", (size,), torch.int64, classes=(2,) * size)
    if (pixels := Pixels.of(space)) is not None:
        return ObservationKey("image", pixels.framed_shape, torch.uint8, note=pixels.note)
    if _is_validity(f"{name}_mask", leaves):
        return ObservationKey("set", shape, torch.float32, validity=f"{name}_mask")
    return ObservationKey("vector", (size,), torch.float32, note=f"of {list(shape)}" if len(shape) > 1 else "")


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


def _value(name: str, leaf: _Leaf, obs: Any) -> np.ndarray:
    try:
        part = functools.reduce(operator.getitem, leaf.path, obs)
    except (LookupError, TypeError):
        raise UserError(f"observation '{name}' is missing; its space is {leaf.space}") from None
    try:
        value = np.asarray(part)
    except ValueError as error:
        raise UserError(f"observation '{name}' is no array ({error}); its space is {leaf.space}") from error
    if value.dtype.kind not in "biuf":
        # numpy turns a missing value into an object without a shape.
        held = "missing" if part is None else f"of type {value.dtype}, which is no number"
        raise UserError(f"observation '{name}' is {held}; its space is {leaf.space}")
    if value.shape != leaf.space.shape:
        raise UserError(f"observation '{name}' has shape {value.shape}, but its space is {leaf.space}")
    return value


def _read(name: str, leaf: _Leaf, key: ObservationKey, obs: Any, pixels: Pixels | None) -> np.ndarray:
    value = _value(name, leaf, obs)
    if pixels is not None:
        return _image(name, leaf, pixels, value)
    if isinstance(leaf.space, spaces.Discrete | spaces.MultiDiscrete):
        value = np.asarray(value - leaf.space.start)
    value = _cast(name, leaf, value, NUMPY_DTYPES[key.dtype]).reshape(key.shape)
    # A class out of range would otherwise fail in the encoder, on a GPU without saying where.
    if key.kind == "classes" and ((value < 0) | (value >= key.classes)).any():
        raise _outside(name, leaf)
    return value


def _image(name: str, leaf: _Leaf, pixels: Pixels, value: np.ndarray) -> UInt8[np.ndarray, "H W C"]:
    """Bytes, from pixels of any type that the space may have."""
    if np.issubdtype(leaf.space.dtype, np.floating):
        value = pixels.scaled(value)
    # Numbers that do not fit a byte would wrap around, and NaN fits none.
    if value.dtype != np.uint8 and not ((value >= 0) & (value <= 255)).all():
        raise _outside(name, leaf)
    return pixels.framed(pixels.arranged(_cast(name, leaf, value, np.dtype(np.uint8))))


def _cast(name: str, leaf: _Leaf, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float32 and value.dtype == np.float64:
        with np.errstate(over="ignore"):
            return value.astype(dtype)
    if dtype != np.float32 and value.dtype.kind == "f":
        # As a flag, NaN would pass for True.
        if not np.isfinite(value).all():
            raise _outside(name, leaf)
        if (value != np.rint(value)).any():
            raise UserError(f"observation '{name}' holds fractions, but its space is {leaf.space}")
    return value.astype(dtype)


def _outside(name: str, leaf: _Leaf) -> UserError:
    return UserError(f"observation '{name}' has a value outside its space {leaf.space}")
