"""The networks of images: what each stage computes, against plain convolutions, pooling and upsampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from parts.images import ImageDecoder, ImageEncoder, PixelNorm, Pooled, UpsampledConv2d
from parts.precision import use_half_precision

DEPTH, DETER, STOCH = 2, 8, 4
SIZES = {"deter": DETER, "stoch_size": STOCH, "units": 6, "depth": DEPTH, "blocks": 4}


def test_image_encoder_scales_bytes_around_0():
    encoder = ImageEncoder((32, 16, 3), depth=DEPTH)
    seen: list[Tensor] = []
    encoder.stages.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.zeros(2, 32, 16, 3, dtype=torch.uint8)
    pixels[1, 20, 5] = torch.tensor([255, 0, 51], dtype=torch.uint8)
    encoder(pixels)
    (scaled,) = seen
    assert scaled.shape == (2, 3, 32, 16)
    assert (scaled[0] == -0.5).all()
    torch.testing.assert_close(scaled[1, :, 20, 5], torch.tensor([0.5, -0.5, -0.3]))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 16), (32, 48)])
def test_image_networks_shrink_and_grow_by_16(height: int, width: int):
    encoder = ImageEncoder((height, width, 3), depth=DEPTH)
    assert encoder.embed_size == (height // 16) * (width // 16) * 4 * DEPTH
    assert encoder(torch.zeros(1, height, width, 3, dtype=torch.uint8)).shape == (1, encoder.embed_size)
    pixels = ImageDecoder((height, width, 3), **SIZES)(torch.randn(2, 1, DETER + STOCH))
    assert pixels.shape == (2, 1, height, width, 3)
    assert (pixels > 0).all() and (pixels < 1).all()


def test_pixel_norm_is_over_the_channels_of_each_pixel():
    norm, x = PixelNorm(4), torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        norm.norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    size = (x.square().mean(1, keepdim=True) + 1e-4).sqrt()
    torch.testing.assert_close(norm(x), functional.silu(x / size * norm.norm.weight.view(4, 1, 1)))


def test_encoder_stage_pools_before_it_normalises():
    stage, x = Pooled(3, 4), torch.randn(2, 3, 8, 6)
    assert stage.conv.kernel_size == (5, 5) and stage.conv.stride == (1, 1)
    largest = stage.conv(x).unflatten(3, (3, 2)).unflatten(2, (4, 2)).amax((3, 5))
    torch.testing.assert_close(stage(x), stage.norm(largest))


def test_upsampled_convolution_equals_a_convolution_of_an_upsampled_image():
    layer, x = UpsampledConv2d(3, 4), torch.randn(2, 3, 5, 4, requires_grad=True)
    plain = nn.Conv2d(3, 4, 5, padding=2)
    plain.load_state_dict(layer.state_dict())
    ours, expected = layer(x), plain(functional.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(ours, expected)
    downstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, [x, *layer.parameters()], downstream)
    plainly = torch.autograd.grad(expected, [x, *plain.parameters()], downstream)
    for ours, expected in zip(gradients, plainly, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_decoder_lays_each_block_of_the_state_out_as_channels_of_its_own():
    """A change in a block of the deterministic state moves two of the eight channels of the smallest feature map."""
    decoder, seen = ImageDecoder((32, 16, 3), **SIZES), []
    decoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    feat = torch.randn(1, DETER + STOCH)
    for index in (None, 2, DETER):
        decoder(feat if index is None else feat + functional.one_hot(torch.tensor([index]), DETER + STOCH))
    before, block, stoch = seen
    assert before.shape == (1, 8, 2, 1)
    moved = (block != before).flatten(2).all(-1)[0]
    assert moved.tolist() == [False, False, True, True, False, False, False, False]
    assert (stoch != before).all()


def test_image_networks_in_half_precision_agree_to_two_digits():
    encoder, decoder = ImageEncoder((32, 32, 3), depth=4), ImageDecoder((32, 32, 3), **{**SIZES, "depth": 4})
    image, feat = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), torch.randn(4, DETER + STOCH)
    exact = encoder(image), decoder(feat)
    for network in (encoder, decoder):
        use_half_precision(network)
    rough = encoder(image), decoder(feat)
    assert rough[0].dtype == torch.bfloat16 and rough[1].dtype == torch.float32
    for ours, expected in zip(rough, exact, strict=True):
        assert 1e-5 < float(((ours - expected).norm() / expected.norm()).detach()) < 2e-2
    assert decoder.pixels(torch.randn(1, 8, 4, 4)).dtype == torch.bfloat16
