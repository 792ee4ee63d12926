"""Encoders and decoders of observations, chosen for each key by what the observation's space says of it."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from config import UserError, compiled
from envs.tasks import ACTION_MASK, ObservationKey, ObservationTask
from parts.images import ImageDecoder, ImageEncoder
from parts.latents import Feat
from parts.layers import MLP, Normed
from parts.sets import PointsEncoder
from tools import BernoulliDist, OneHotDist, SymlogGaussian, symlog

# These are for a set of observed elements: routing's encoders have settings of their own.
SET_LAYERS, SET_HEADS = 1, 4


def select(keys: dict[str, ObservationKey], pattern: str) -> dict[str, ObservationKey]:
    """The keys whose whole name matches a regular expression; a set brings the key of its validity.

    Raises:
        UserError: the pattern is no regular expression, or matches none of the keys.
    """
    chosen = {name: key for name, key in keys.items() if compiled(pattern).fullmatch(name)}
    if not chosen:
        raise UserError(f"no key of the observation matches {pattern!r}; there are {', '.join(sorted(keys))}")
    validities = {key.validity: keys[key.validity] for key in chosen.values() if key.validity is not None}
    return chosen | validities


def readings(task: ObservationTask, *, encode_keys: str, decode_keys: str) -> list[str]:
    """How each key of the observation is read, one line a key, for the user to see before training.

    For example `camera: image of 64 x 64 with 3 channels (floats of 0 to 1, kept as bytes)`, `speed: 4 numbers`,
    `gear: 1 of 5 classes`, `note: left out, ...`.

    Args:
        task: its observations, and what was left out of them.
        encode_keys: the config's regular expression; a key that is not encoded is said to be none of the inputs.
        decode_keys: likewise, of what is predicted.
    """
    lines = []
    for name, key in sorted(task.observations.items()):
        unused = [
            use
            for use, pattern in (("encoded", encode_keys), ("decoded", decode_keys))
            if not compiled(pattern).fullmatch(name) and key.kind != "validity"
        ]
        notes = [key.note] if key.note else []
        notes += [f"not {' and not '.join(unused)}"] if unused else []
        lines.append(f"{name}: {_reading(key)}" + (f" ({'; '.join(notes)})" if notes else ""))
    if task.actions.masked:
        lines.append(f"{ACTION_MASK}: which of {task.num_actions} actions are legal")
    return lines + [f"{name}: left out, {why}" for name, why in task.left_out]


def _reading(key: ObservationKey) -> str:
    if key.kind == "image":
        height, width, channels = key.shape
        return f"image of {height} x {width} with {_counted(channels, 'channel')}"
    if key.kind == "classes":
        sizes = sorted(set(key.classes))
        spread = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return f"1 of {spread} classes" if len(key.classes) == 1 else f"{len(key.classes)} times 1 of {spread} classes"
    if key.kind == "set":
        elements, features = key.shape
        told = "" if key.validity is None else f", the real ones marked by {key.validity}"
        return f"set of {_counted(elements, 'element')} with {_counted(features, 'number')} each{told}"
    if key.kind == "validity":
        return f"marks the real ones of {_counted(key.shape[0], 'element')}"
    return _counted(key.shape[0], "number")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class ObservationEncoder(nn.Module):
    """Encodes an observation: vectors and classes in one MLP, each image by convolutions, each set by attention."""

    def __init__(self, keys: dict[str, ObservationKey], *, units: int, layers: int, depth: int) -> None:
        """Build what the keys ask for.

        Args:
            keys: what to encode.
            units: width of the MLP, and of each element of a set.
            layers: of the MLP.
            depth: multiplies the channels of the convolutions.

        Raises:
            UserError: all keys are validities, which are only read with their sets.
        """
        super().__init__()
        if all(key.kind == "validity" for key in keys.values()):
            raise UserError(f"there is nothing to encode in {', '.join(sorted(keys))} without the set it belongs to")
        self.vectors = sorted(name for name, key in keys.items() if key.kind == "vector")
        self.classes = {name: key.classes for name, key in sorted(keys.items()) if key.kind == "classes"}
        self.validity = {name: key.validity for name, key in sorted(keys.items()) if key.kind == "set"}
        self.image_names = sorted(name for name, key in keys.items() if key.kind == "image")
        flat_size = sum(keys[name].shape[0] for name in self.vectors)
        flat_size += sum(sum(sizes) for sizes in self.classes.values())
        sizes = [flat_size] + [units] * layers if flat_size else []
        # What is observed may tell by its fourth digit.
        layers_of = (Normed(a, b, exact=index == 0) for index, (a, b) in enumerate(itertools.pairwise(sizes)))
        self.flat = nn.Sequential(*layers_of)
        images = [ImageEncoder(keys[name].shape, depth=depth) for name in self.image_names]
        self.images = nn.ModuleList(images)
        self.sets = nn.ModuleList(
            PointsEncoder(keys[name].shape[1], width=units, layers=SET_LAYERS, heads=SET_HEADS, hidden=2 * units)
            for name in self.validity
        )
        self.embed_size = (units if flat_size else 0) + units * len(self.sets)
        self.embed_size += sum(image.embed_size for image in images)

    def forward(self, obs: dict[str, Tensor]) -> Float[Tensor, "*B U"]:
        parts, flat = [], [symlog(obs[name].float()) for name in self.vectors]
        flat += [one_hot(obs[name].long(), sizes) for name, sizes in self.classes.items()]
        if flat:
            parts.append(self.flat(torch.cat(flat, -1)))
        for image, name in zip(self.images, self.image_names, strict=True):
            parts.append(image(obs[name]))
        for encoder, (name, validity) in zip(self.sets, self.validity.items(), strict=True):
            parts.append(encoder(symlog(obs[name].float()), None if validity is None else obs[validity]))
        return torch.cat(parts, -1)


class ObservationDecoder(nn.Module):
    """Predicts each key of an observation from a latent: what the world model's latents must not forget."""

    def __init__(
        self,
        keys: dict[str, ObservationKey],
        *,
        deter: int,
        stoch_size: int,
        units: int,
        layers: int,
        depth: int,
        blocks: int,
    ) -> None:
        """Build a trunk with an output for every key that is no image, and a decoder for each image.

        Args:
            keys: what to decode.
            deter: size of the latent's deterministic state.
            stoch_size: numbers of its stochastic state.
            units: width of the trunk.
            layers: of the trunk.
            depth: multiplies the channels of the convolutions.
            blocks: of the layer by which an image's decoder reads the deterministic state.

        Raises:
            UserError: sizes that the blocks do not divide.
        """
        super().__init__()
        self.keys = dict(sorted(keys.items()))
        images = {name: key for name, key in self.keys.items() if key.kind == "image"}
        self.sizes = {name: _outputs(key) for name, key in self.keys.items() if name not in images}
        self.trunk: MLP | None = None
        if self.sizes:
            outputs = sum(self.sizes.values())
            self.trunk = MLP(deter + stoch_size, outputs, units=units, layers=layers, exact_output=True)
        self.image_names = list(images)
        sizes = {"deter": deter, "stoch_size": stoch_size, "units": units, "depth": depth, "blocks": blocks}
        self.images = nn.ModuleList(ImageDecoder(key.shape, **sizes) for key in images.values())

    def losses(self, feat: Float[Tensor, "*B F"], obs: dict[str, Tensor]) -> dict[str, Float[Tensor, "*B"]]:
        """The loss of each key, summed over its entries (DreamerV3, eq. 4).

        Squared errors of numbers, in symlog space, and of pixels; minus the log-likelihood of classes and validities.
        """
        outputs, losses = self._outputs(feat), {}
        for name, key in self.keys.items():
            output, target = outputs[name], obs[name]
            if key.kind == "image":
                losses[name] = (output - target.float() / 255).square().sum((-3, -2, -1))
            elif key.kind == "classes":
                losses[name] = -log_probs(output, target.long(), key.classes).sum(0)
            elif key.kind == "validity":
                losses[name] = -BernoulliDist(output).log_prob(target).sum(-1)
            elif key.kind == "set":
                elements = output.unflatten(-1, key.shape)
                if key.validity is not None:
                    # Both are filled before the error is taken: 0 times a NaN in the padding would be a NaN gradient.
                    padding = ~obs[key.validity][..., None]
                    elements, target = elements.masked_fill(padding, 0.0), target.masked_fill(padding, 0.0)
                losses[name] = SymlogGaussian(elements).squared_error(target).sum(-1)
            else:
                losses[name] = SymlogGaussian(output).squared_error(target)
        return losses

    def predict(self, feat: Feat, *, only: Collection[str] | None = None) -> dict[str, Tensor]:
        """What each key is expected to be, as replay stores it: the mean of numbers, the likeliest class.

        Args:
            feat: of latents; images need numbers.
            only: some of the keys, none of them an image; None: all.
        """
        chosen = self.keys if only is None else {name: self.keys[name] for name in only}
        outputs, predicted = self._outputs(feat, images=only is None), {}
        for name, key in chosen.items():
            output = outputs[name]
            if key.kind == "image":
                predicted[name] = (255 * output).round().to(torch.uint8)
            elif key.kind == "classes":
                predicted[name] = likeliest(output, key.classes)
            elif key.kind == "validity":
                predicted[name] = BernoulliDist(output).mode()
            else:
                predicted[name] = SymlogGaussian(output).mean().unflatten(-1, key.shape)
        return predicted

    def _outputs(self, feat: Feat, *, images: bool = True) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        if self.trunk is not None:
            outputs = dict(zip(self.sizes, self.trunk(feat).split(list(self.sizes.values()), -1), strict=True))
        if not images:
            return outputs
        for image, name in zip(self.images, self.image_names, strict=True):
            outputs[name] = image(feat)
        return outputs


def _outputs(key: ObservationKey) -> int:
    return sum(key.classes) if key.kind == "classes" else torch.Size(key.shape).numel()


def one_hot(values: Int[Tensor, "*B M"], sizes: tuple[int, ...]) -> Float[Tensor, "*B C"]:
    """One-hot vectors of M variables, one after another."""
    if len(set(sizes)) == 1:
        return functional.one_hot(values, sizes[0]).float().flatten(-2)
    parts = zip(values.unbind(-1), sizes, strict=True)
    return torch.cat([functional.one_hot(value, size).float() for value, size in parts], -1)


def log_probs(
    logits: Float[Tensor, "*B C"], values: Int[Tensor, "*B M"], sizes: tuple[int, ...]
) -> Float[Tensor, "M *B"]:
    """The log-probability of each of M variables' values."""
    if len(set(sizes)) == 1:
        return OneHotDist(logits.unflatten(-1, (len(sizes), -1))).log_prob(values).movedim(-1, 0).contiguous()
    parts = zip(logits.split(sizes, -1), values.unbind(-1), strict=True)
    return torch.stack([OneHotDist(part).log_prob(value) for part, value in parts])


def likeliest(logits: Float[Tensor, "*B C"], sizes: tuple[int, ...]) -> Int[Tensor, "*B M"]:
    """The likeliest class of each of M variables."""
    if len(set(sizes)) == 1:
        return logits.unflatten(-1, (len(sizes), -1)).argmax(-1)
    return torch.stack([part.argmax(-1) for part in logits.split(sizes, -1)], -1)
