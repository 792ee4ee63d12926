"""Encoder and decoder of images: DreamerV3's networks of convolutions (Nature 2025, as released)."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from parts.layers import BlockLinear, Normed
from parts.precision import rounded

# Channels of each stage, in units of `depth`; each stage halves or doubles the resolution.
STAGES = (2, 3, 4, 4)
SHRINK = 2 ** len(STAGES)
KERNEL = 5


class PixelNorm(nn.Module):
    """RMSNorm over the channels of each pixel, and SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels, eps=1e-4)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return functional.silu(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class UpsampledConv2d(nn.Conv2d):
    """Nearest upsampling by 2, then a convolution, computed at the resolution before.

    Pixels of an upsampled image come in equal squares of four. What the kernel's taps on equal ones add up to is a
    kernel of 3x3 on the small image, another for each of the four places in a square: a third of the products.
    """

    taps: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, KERNEL, padding=KERNEL // 2)
        self.compute = torch.float32
        # For the even and the odd place: which of 3 small pixels each of the kernel's 5 taps falls on.
        falls = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 2, 2]], device=torch.get_default_device())
        taps = (falls[:, None] == torch.arange(3, device=falls.device)[:, None]).float()
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O 2*h 2*w"]:
        kernels = torch.einsum("aip,bjq,ocpq->oabcij", self.taps, self.taps, self.weight).flatten(0, 2)
        assert self.bias is not None
        bias = rounded(self.bias, self.compute).repeat_interleave(4)
        places = functional.conv2d(x.to(self.compute), kernels.to(self.compute), bias, padding=1)
        return functional.pixel_shuffle(places, 2)


class Pooled(nn.Module):
    """A stage of the encoder: a convolution, 2x2 max pooling, norm and SiLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, KERNEL, padding=KERNEL // 2)
        self.norm = PixelNorm(channels_out)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        return self.norm(functional.max_pool2d(self.conv(x), 2))


class ImageEncoder(nn.Module):
    """From an image, whose sides are multiples of 16, to the smallest feature map, flat."""

    def __init__(self, shape: tuple[int, ...], *, depth: int) -> None:
        super().__init__()
        height, width, channels = shape
        sizes = [channels] + [depth * factor for factor in STAGES]
        self.stages = nn.Sequential(*(Pooled(a, b) for a, b in itertools.pairwise(sizes)))
        self.embed_size = sizes[-1] * (height // SHRINK) * (width // SHRINK)

    def forward(self, image: UInt8[Tensor, "*B H W C"]) -> Float[Tensor, "*B U"]:
        # Images stay in memory with their channels last, as they come, which is faster on a CPU.
        x = image.flatten(0, -4).permute(0, 3, 1, 2).float() / 255 - 0.5
        return self.stages(x).flatten(1).view(*image.shape[:-3], -1)


class ImageDecoder(nn.Module):
    """From a latent to the pixels of an image, each in [0, 1].

    The deterministic state is laid out as the smallest feature map by a block-diagonal layer, each block of it as
    channels of its own, and the stochastic state is added by two dense ones.
    """

    def __init__(
        self, shape: tuple[int, ...], *, deter: int, stoch_size: int, units: int, depth: int, blocks: int
    ) -> None:
        """Build the networks.

        Args:
            shape: height, width and channels of the image.
            deter: size of the deterministic state, with which a latent's features begin.
            stoch_size: numbers of the stochastic state, with which they end.
            units: half the width of the layer between the stochastic state and the feature map.
            depth: multiplies the channels of the convolutions.
            blocks: of the layer that reads the deterministic state.

        Raises:
            UserError: sizes that the blocks do not divide.
        """
        super().__init__()
        height, width, channels = shape
        sizes = [depth * factor for factor in reversed(STAGES)]
        self.parts = (deter, stoch_size)
        self.start = (sizes[0], height // SHRINK, width // SHRINK)
        cells = torch.Size(self.start).numel()
        self.from_deter = BlockLinear(deter, cells, blocks=blocks)
        self.from_stoch = nn.Sequential(Normed(stoch_size, 2 * units), nn.Linear(2 * units, cells))
        self.norm = PixelNorm(sizes[0])
        stages: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            stages += [UpsampledConv2d(a, b), PixelNorm(b)]
        self.stages = nn.Sequential(*stages)
        self.pixels = UpsampledConv2d(sizes[-1], channels)

    def forward(self, feat: Float[Tensor, "*B F"]) -> Float[Tensor, "*B H W C"]:
        deter, stoch = feat.flatten(0, -2).split(self.parts, -1)
        x = self.norm((self.from_deter(deter) + self.from_stoch(stoch)).unflatten(-1, self.start))
        x = torch.sigmoid(self.pixels(self.stages(x)).float())
        return x.permute(0, 2, 3, 1).unflatten(0, feat.shape[:-1])
