"""How arrays are read as images: their axes, their scale, and the frame that makes their sides fit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gymnasium import Space, spaces
from jaxtyping import UInt8

# The encoder and the decoder halve and double an image four times.
IMAGE_MULTIPLE = 16
# What has fewer pixels a side is a grid of a few cells, and no image.
LEAST_SIDE = 16


class Pixels(NamedTuple):
    """How an array becomes an image: its axes in the order [H, W, channels], its shape then, what 255 is divided by.

    Stacked frames [K, ...] are an axis of their own right before the channels: the last channels are the last frame.
    """

    order: tuple[int, ...]
    shape: tuple[int, int, int]
    scale: float
    notes: tuple[str, ...]

    @classmethod
    def of(cls, space: Space) -> Pixels | None:
        """How a space is read as an image; None where it holds none."""
        if not isinstance(space, spaces.Box):
            return None
        floats = np.issubdtype(space.dtype, np.floating)
        if not (space.low == 0).all() or not ((space.high == 255).all() or (floats and (space.high == 1).all())):
            return None
        shape = space.shape
        if len(shape) == 2 and space.dtype == np.uint8 and min(shape) >= LEAST_SIDE:
            return cls((0, 1), (*shape, 1), 1.0, ())
        if len(shape) not in (3, 4):
            return None
        frames, base = shape[0] if len(shape) == 4 else 1, len(shape) - 3
        channels_first = shape[base] < shape[-1]
        height, width, channels = (base + 1, base + 2, base) if channels_first else (base, base + 1, base + 2)
        if min(shape[height], shape[width]) < LEAST_SIDE:
            return None
        scale = 255.0 if floats and space.high.flat[0] == 1 else 1.0
        notes: tuple[str, ...] = (f"{frames} frames, the last one last",) if len(shape) == 4 else ()
        if space.dtype != np.uint8:
            notes += (f"{space.dtype} of 0 to {space.high.flat[0]:g}, kept as bytes",)
        order = (height, width, *range(base), channels)
        return cls(order, (shape[height], shape[width], frames * shape[channels]), scale, notes)

    @property
    def framed_shape(self) -> tuple[int, int, int]:
        """The shape with sides that are multiples of 16."""
        height, width, channels = self.shape
        return height + -height % IMAGE_MULTIPLE, width + -width % IMAGE_MULTIPLE, channels

    @property
    def note(self) -> str:
        """What a reader of the space would not expect; a few words, or none."""
        height, width, _ = self.shape
        framed = (f"{height} x {width} in a black frame",) if self.framed_shape != self.shape else ()
        return "; ".join((*framed, *self.notes))

    def scaled(self, value: np.ndarray) -> np.ndarray:
        """Whole numbers of 0 to 255, of floats with the axes as they came."""
        return np.rint(value * self.scale)

    def arranged(self, value: UInt8[np.ndarray, "*S"]) -> UInt8[np.ndarray, "h w c"]:
        """An image, from bytes with the axes as they came."""
        return value.transpose(self.order).reshape(self.shape)

    def framed(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "H W c"]:
        """The image in the middle of a black frame, where its sides are no multiples of 16."""
        missing = [whole - side for whole, side in zip(self.framed_shape, self.shape, strict=True)]
        if not any(missing):
            return image
        return np.pad(image, [(gap // 2, gap - gap // 2) for gap in missing])
