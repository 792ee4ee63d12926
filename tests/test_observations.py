from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from envs.spaces import left_out, observation_keys
from envs.tasks import ActionSpec, ObservationKey, ObservationTask
from parts import observations
from parts.images import ImageDecoder
from parts.observations import ObservationDecoder, ObservationEncoder, readings, select
from tools import OneHotDist, symlog

UNITS, LAYERS, DEPTH, DETER, STOCH = 16, 2, 2, 8, 4
FEAT = DETER + STOCH
ELEMENTS = 5


def vector(size: int) -> ObservationKey:
    return ObservationKey("vector", (size,), torch.float32)


def image(*shape: int) -> ObservationKey:
    return ObservationKey("image", shape, torch.uint8)


CARDS = {
    "cards": ObservationKey("set", (ELEMENTS, 3), torch.float32, validity="cards_mask"),
    "cards_mask": ObservationKey("validity", (ELEMENTS,), torch.bool),
}
CLASSES = ObservationKey("classes", (2,), torch.int64, classes=(3, 4))
KEYS = {"speed": vector(2), "gear": CLASSES, **CARDS, "camera": image(16, 32, 3), "angle": vector(1)}
KINDS = pytest.mark.parametrize(
    "names",
    [("speed", "angle"), ("gear",), ("camera",), ("cards", "cards_mask"), tuple(KEYS)],
    ids=["vectors", "classes", "image", "set", "all"],
)


def random_obs(keys: dict[str, ObservationKey], *lead: int, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)

    def entry(key: ObservationKey) -> Tensor:
        if key.kind == "image":
            return torch.randint(256, (*lead, *key.shape), generator=draws, dtype=torch.uint8)
        if key.kind == "classes":
            return torch.stack([torch.randint(size, lead, generator=draws) for size in key.classes], -1)
        if key.kind == "validity":
            return torch.rand(*lead, *key.shape, generator=draws) < 0.5
        return 3 * torch.randn(*lead, *key.shape, generator=draws)

    return {name: entry(key) for name, key in keys.items()}


def make_encoder(keys: dict[str, ObservationKey]) -> ObservationEncoder:
    torch.manual_seed(0)
    return ObservationEncoder(keys, units=UNITS, layers=LAYERS, depth=DEPTH)


def make_decoder(keys: dict[str, ObservationKey]) -> ObservationDecoder:
    torch.manual_seed(0)
    sizes = {"deter": DETER, "stoch_size": STOCH, "units": UNITS, "layers": LAYERS, "depth": DEPTH, "blocks": 4}
    return ObservationDecoder(keys, **sizes)


def constant_decoder(keys: dict[str, ObservationKey], outputs: list[float]) -> ObservationDecoder:
    """Whatever the latent is, these are the outputs for the keys that are no images, in the order of their names."""
    decoder = make_decoder(keys)
    assert decoder.trunk is not None
    nn.init.zeros_(decoder.trunk.output.weight)
    with torch.no_grad():
        decoder.trunk.output.bias.copy_(torch.tensor(outputs))
    return decoder


def constant_pixels(shape: tuple[int, int, int], brightness: float) -> ObservationDecoder:
    decoder = make_decoder({"camera": image(*shape)})
    (images,) = decoder.images
    assert isinstance(images, ImageDecoder) and images.pixels.bias is not None
    nn.init.zeros_(images.pixels.weight)
    nn.init.constant_(images.pixels.bias, math.log(brightness / (1 - brightness)))
    return decoder


# Selection


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (".*", set(KEYS)),
        ("speed", {"speed"}),
        ("s.*|gear", {"speed", "gear"}),
        ("cards", {"cards", "cards_mask"}),
    ],
)
def test_select_matches_whole_names(pattern: str, expected: set[str]):
    chosen = select(KEYS, pattern)
    assert chosen == {name: KEYS[name] for name in expected}


def test_select_refuses_a_pattern_that_is_no_regular_expression():
    with pytest.raises(ValueError, match=r"^'\(speed' is no regular expression: .*$"):
        select(KEYS, "(speed")


def test_select_refuses_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="no key of the observation matches 'spee'; there are angle, camera, cards"):
        select(KEYS, "spee")


# Encoder


@KINDS
def test_encoder_gives_embed_size_numbers_for_any_leading_dimensions(names: tuple[str, ...]):
    keys = {name: KEYS[name] for name in names}
    encoder, obs = make_encoder(keys), random_obs(keys, 2, 3)
    embedded = encoder(obs)
    assert embedded.shape == (2, 3, encoder.embed_size) and embedded.dtype == torch.float32
    rows = encoder({name: value.flatten(0, 1) for name, value in obs.items()})
    torch.testing.assert_close(embedded.flatten(0, 1), rows)


def test_encoder_does_not_care_for_the_order_of_keys():
    obs = random_obs(KEYS, 4)
    backwards = dict(reversed(KEYS.items()))
    assert torch.equal(make_encoder(KEYS)(obs), make_encoder(backwards)(obs))


@KINDS
def test_encoder_passes_gradient_to_every_parameter(names: tuple[str, ...]):
    keys = {name: KEYS[name] for name in names}
    encoder = make_encoder(keys)
    embedded = encoder(random_obs(keys, 16))
    gradients = torch.autograd.grad((embedded * torch.randn_like(embedded)).sum(), list(encoder.parameters()))
    for (name, _), gradient in zip(encoder.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-4, name


def test_encoder_squashes_vectors_and_spells_out_classes():
    encoder = make_encoder({"speed": vector(2), "gear": CLASSES, "angle": vector(1)})
    encoder.flat = nn.Sequential()
    obs = {
        "speed": torch.tensor([[math.e - 1, 1 - math.e**2]]),
        "gear": torch.tensor([[2, 1]]),
        "angle": torch.tensor([[0.0]]),
    }
    torch.testing.assert_close(encoder(obs), torch.tensor([[0.0, 1, -2, 0, 0, 1, 0, 1, 0, 0]]))


def test_encoder_refuses_a_validity_without_its_set():
    with pytest.raises(ValueError, match="nothing to encode in cards_mask without the set"):
        make_encoder({"cards_mask": CARDS["cards_mask"]})


def test_encoder_sees_a_set_in_no_order():
    encoder, obs = make_encoder(CARDS), random_obs(CARDS, 8)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(encoder(obs), encoder({name: value[:, order] for name, value in obs.items()}))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("members", [1, 3])
def test_encoder_tells_sets_apart(masked: bool, members: int):
    """The mean of what is normalised over a set is the same for every set, and so is a normalised set of one."""
    cards = ObservationKey("set", (members, 3), torch.float32, validity="cards_mask" if masked else None)
    validity = {"cards_mask": ObservationKey("validity", (members,), torch.bool)} if masked else {}
    encoder, one = make_encoder({"cards": cards, **validity}), torch.randn(16, members, 3)
    others = {"other": torch.randn(16, members, 3), "shifted": one + 0.5, "scaled": 2 * one}
    mask = {name: torch.ones(16, members, dtype=torch.bool) for name in validity}
    embedded = encoder({"cards": one, **mask})
    for name, other in others.items():
        change = (encoder({"cards": other, **mask}) - embedded).norm(dim=-1)
        # Not relative: what is constant but for rounding differs much from itself where it is close to 0.
        assert (change > 0.01).all(), f"{name} looks the same"


@pytest.mark.parametrize("filling", [1e6, math.nan])
def test_encoder_never_reads_padding(filling: float):
    encoder, obs = make_encoder(CARDS), random_obs(CARDS, 8)
    padded = torch.where(obs["cards_mask"][..., None], obs["cards"], filling)
    embedded = encoder({**obs, "cards": padded})
    assert torch.equal(embedded, encoder(obs))
    gradients = torch.autograd.grad(embedded.sum(), list(encoder.parameters()), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_encoder_gives_zeros_for_an_empty_set():
    encoder, obs = make_encoder(CARDS), random_obs(CARDS, 2)
    obs["cards_mask"] = torch.tensor([[False] * ELEMENTS, [True] * ELEMENTS])
    embedded = encoder(obs)
    assert not embedded[0].any() and embedded[1].any()


def test_encoder_of_a_set_without_padding_takes_all_of_it():
    whole = make_encoder({"cards": CARDS["cards"]._replace(validity=None)})
    masked, obs = make_encoder(CARDS), random_obs(CARDS, 4)
    full = {"cards": obs["cards"], "cards_mask": torch.ones_like(obs["cards_mask"])}
    torch.testing.assert_close(whole({"cards": obs["cards"]}), masked(full), atol=1e-5, rtol=1e-5)


# Decoder


def test_decoder_vector_by_hand():
    decoder = constant_decoder({"speed": vector(2)}, [1.0, -2.0])
    feat, obs = torch.randn(1, FEAT), {"speed": torch.tensor([[math.e**3 - 1, 0.0]])}
    # The squares of 1 - 3 and -2 - 0.
    assert decoder.losses(feat, obs)["speed"].item() == pytest.approx(8.0, rel=1e-5)
    torch.testing.assert_close(decoder.predict(feat)["speed"], torch.tensor([[math.e - 1, 1 - math.e**2]]))


def test_decoder_classes_by_hand():
    shares = [0.2, 0.5, 0.3, 0.1, 0.1, 0.1, 0.7]
    decoder = constant_decoder({"gear": CLASSES}, [math.log(share) for share in shares])
    feat, obs = torch.randn(1, FEAT), {"gear": torch.tensor([[2, 0]])}
    assert decoder.losses(feat, obs)["gear"].item() == pytest.approx(-math.log(0.3) - math.log(0.1), rel=1e-5)
    assert decoder.predict(feat)["gear"].tolist() == [[1, 3]]


def test_decoder_set_by_hand():
    elements = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, -2.0, 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, 1.0]])
    present = [True, True, False, False, True]
    decoder = constant_decoder(CARDS, [*elements.flatten().tolist(), 2.0, 1.0, -1.0, -2.0, -3.0])
    feat, obs = torch.randn(1, FEAT), {"cards": torch.zeros(1, ELEMENTS, 3), "cards_mask": torch.tensor([present])}
    losses = decoder.losses(feat, obs)
    # The squares of elements 1 and 4; what is predicted for the padding costs nothing.
    assert losses["cards"].item() == pytest.approx(2.0, rel=1e-5)
    surprises = [-2.0, -1.0, -1.0, -2.0, 3.0]
    expected = sum(math.log1p(math.exp(surprise)) for surprise in surprises)
    assert losses["cards_mask"].item() == pytest.approx(expected, rel=1e-5)
    predicted = decoder.predict(feat)
    assert predicted["cards_mask"].tolist() == [[True, True, False, False, False]]
    torch.testing.assert_close(symlog(predicted["cards"][0]), elements, atol=1e-5, rtol=1e-5)


def test_decoder_image_by_hand():
    decoder = constant_pixels((16, 16, 1), brightness=0.2)
    obs = {"camera": torch.zeros(1, 16, 16, 1, dtype=torch.uint8)}
    obs["camera"][0, :4] = 255
    feat = torch.randn(1, FEAT)
    # 64 pixels are white and 192 are black.
    expected = 64 * 0.8**2 + 192 * 0.2**2
    assert decoder.losses(feat, obs)["camera"].item() == pytest.approx(expected, rel=1e-5)
    assert (decoder.predict(feat)["camera"] == 51).all()


@KINDS
def test_decoder_predicts_what_replay_stores(names: tuple[str, ...]):
    keys = {name: KEYS[name] for name in names}
    decoder, obs = make_decoder(keys), random_obs(keys, 2, 3)
    feat = torch.randn(2, 3, FEAT)
    predicted, losses = decoder.predict(feat), decoder.losses(feat, obs)
    assert predicted.keys() == losses.keys() == keys.keys()
    for name in keys:
        assert predicted[name].shape == obs[name].shape and predicted[name].dtype == obs[name].dtype
        assert losses[name].shape == (2, 3) and (losses[name] > 0).all()


def test_decoder_losses_are_those_of_their_own_key():
    decoder, obs, other = make_decoder(KEYS), random_obs(KEYS, 4), random_obs(KEYS, 4, seed=1)
    feat = torch.randn(4, FEAT)
    losses = decoder.losses(feat, obs)
    for name in KEYS:
        changed = decoder.losses(feat, {**obs, name: other[name]})
        differ = {key for key in KEYS if not torch.equal(changed[key], losses[key])}
        # A set's own validity says which of its elements count.
        assert differ == ({"cards", "cards_mask"} if name == "cards_mask" else {name})


@KINDS
def test_decoder_passes_gradient_to_latent_and_every_parameter(names: tuple[str, ...]):
    keys = {name: KEYS[name] for name in names}
    decoder, feat = make_decoder(keys), torch.randn(16, FEAT, requires_grad=True)
    total = torch.stack(list(decoder.losses(feat, random_obs(keys, 16)).values())).sum()
    inputs = {"feat": feat, **dict(decoder.named_parameters())}
    for name, gradient in zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-4, name


@pytest.mark.parametrize("filling", [1e6, math.nan])
def test_decoder_never_reads_padding(filling: float):
    decoder, obs = make_decoder(CARDS), random_obs(CARDS, 8)
    padded = {**obs, "cards": torch.where(obs["cards_mask"][..., None], obs["cards"], filling)}
    feat = torch.randn(8, FEAT, requires_grad=True)
    losses = [decoder.losses(feat, each)["cards"] for each in (padded, obs)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), feat)[0] for loss in losses))


def test_encoder_and_decoder_learn_to_copy():
    """A few observations pass through a latent and come out as they were: nothing is flipped, shifted or mixed up."""
    obs = random_obs(KEYS, 3)
    # Large even patches, as a few steps of a tiny network do not learn noise.
    patches = torch.randint(2, (3, 4, 8, 3), generator=torch.Generator().manual_seed(3)) * 204 + 25
    obs["camera"] = patches.to(torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    encoder, decoder = make_encoder(KEYS), make_decoder(KEYS)
    to_feat = nn.Linear(encoder.embed_size, FEAT)
    modules = nn.ModuleList((encoder, to_feat, decoder))
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)
    for _ in range(200):
        losses = decoder.losses(to_feat(encoder(obs)), obs)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        predicted = decoder.predict(to_feat(encoder(obs)))
    assert torch.equal(predicted["gear"], obs["gear"])
    assert torch.equal(predicted["cards_mask"], obs["cards_mask"])
    assert ((predicted["camera"] > 127) == (obs["camera"] > 127)).float().mean() > 0.98
    for name in ("speed", "angle"):
        torch.testing.assert_close(symlog(predicted[name]), symlog(obs[name]), atol=0.2, rtol=0)
    error = (symlog(predicted["cards"]) - symlog(obs["cards"]))[obs["cards_mask"]]
    assert error.abs().max() < 0.3


def test_readings_say_how_each_key_is_read():
    space = spaces.Dict(
        action_mask=spaces.MultiBinary(3),
        camera=spaces.Box(0, 1, (64, 64, 3)),
        frames=spaces.Box(0, 255, (4, 64, 64, 3), np.uint8),
        gear=spaces.Discrete(5),
        flags=spaces.MultiBinary(2),
        speed=spaces.Box(-1, 1, (1,)),
        grid=spaces.Box(0, 9, (7, 7), np.int64),
        points=spaces.Box(-1, 1, (4, 2)),
        points_mask=spaces.MultiBinary(4),
        mission=spaces.Text(5),
    )
    task = ObservationTask(
        actions=ActionSpec("discrete", (3,), masked=True),
        observations=observation_keys(space, wanted=("camera",)),
        left_out=tuple(left_out(space).items()),
    )
    *lines, last = readings(task, encode_keys="(?!speed$).*", decode_keys="(?!speed|gear).*")
    assert lines == [
        "camera: image of 64 x 64 with 3 channels (float32 of 0 to 1, kept as bytes)",
        "flags: 2 times 1 of 2 classes",
        "frames: image of 64 x 64 with 12 channels (4 frames, the last one last)",
        "gear: 1 of 5 classes (not decoded)",
        "grid: 49 numbers (of [7, 7])",
        "points: set of 4 elements with 2 numbers each, the real ones marked by points_mask",
        "points_mask: marks the real ones of 4 elements",
        "speed: 1 number (not encoded and not decoded)",
        "action_mask: which of 3 actions are legal",
    ]
    assert last.startswith("mission: left out, ")


def test_variables_of_the_same_number_of_classes_are_read_like_one_at_a_time():
    sizes = (3, 3, 3, 3)
    draws = torch.Generator().manual_seed(2)
    logits, values = torch.randn(5, 2, 12, generator=draws), torch.randint(3, (5, 2, 4), generator=draws)
    alone = list(zip(logits.split(sizes, -1), values.unbind(-1), strict=True))
    expected = torch.stack([OneHotDist(part).log_prob(value) for part, value in alone])
    # Bit for bit, so that a task's numbers do not depend on how many variables it has.
    assert torch.equal(observations.log_probs(logits, values, sizes), expected)
    assert torch.equal(observations.log_probs(logits, values, sizes).sum(0), expected.sum(0))
    assert torch.equal(observations.likeliest(logits, sizes), torch.stack([part.argmax(-1) for part, _ in alone], -1))
    shown = torch.cat([torch.nn.functional.one_hot(value, 3) for _, value in alone], -1).float()
    assert torch.equal(observations.one_hot(values, sizes), shown)
    # The same functions also take variables of different numbers of classes.
    assert observations.log_probs(logits[..., :7], values[..., :2] % 3, (3, 4)).shape == (2, 5, 2)
    assert observations.one_hot(values[..., :2], (3, 4)).shape == (5, 2, 7)
