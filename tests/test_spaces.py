import shlex
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs.spaces import action_spec, flattener, left_out, observation_keys, to_env_action
from envs.tasks import ActionSpec, ObservationKey

IMAGE = spaces.Box(0, 255, (32, 48, 3), np.uint8)
MOVES = spaces.Discrete(3)
BOOL: Any = np.bool_


def vector(size, note=""):
    return ObservationKey("vector", (size,), torch.float32, note=note)


def classes(*sizes):
    return ObservationKey("classes", (len(sizes),), torch.int64, classes=sizes)


def image(*shape, note=""):
    return ObservationKey("image", shape, torch.uint8, note=note)


def points(validity, *, low=-1.0):
    return spaces.Dict(points=spaces.Box(low, 1, (4, 2)), points_mask=validity)


@pytest.mark.parametrize(
    ("space", "keys"),
    [
        (spaces.Box(-1, 1, (3,)), {"observation": vector(3)}),
        (spaces.Box(-np.inf, np.inf, (2, 3, 4), np.float64), {"observation": vector(24, "of [2, 3, 4]")}),
        (spaces.Box(-1, 1, ()), {"observation": vector(1)}),
        (spaces.Box(0, 9, (2, 2), np.int32), {"observation": vector(4, "of [2, 2]")}),
        (spaces.Box(0, 255, (128,), np.uint8), {"observation": vector(128)}),
        (spaces.Box(0, 1, (3,), BOOL), {"observation": vector(3)}),
        (IMAGE, {"observation": image(32, 48, 3)}),
        (spaces.Box(0, 255, (3, 32, 48), np.uint8), {"observation": image(32, 48, 3)}),
        (spaces.Box(0, 255, (16, 16, 12), np.uint8), {"observation": image(16, 16, 12)}),
        (spaces.Box(0, 255, (32, 48), np.uint8), {"observation": image(32, 48, 1)}),
        (
            spaces.Box(0, 255, (32, 40), np.uint8),
            {"observation": image(32, 48, 1, note="32 x 40 in a black frame")},
        ),
        (spaces.Box(0, 255, (15, 40), np.uint8), {"observation": vector(600, "of [15, 40]")}),
        (spaces.Box(0, 9, (16, 16), np.uint8), {"observation": vector(256, "of [16, 16]")}),
        (spaces.Box(0, 255, (7, 7, 3), np.uint8), {"observation": vector(147, "of [7, 7, 3]")}),
        (spaces.Box(0, 9, (20, 20, 3), np.uint8), {"observation": vector(1200, "of [20, 20, 3]")}),
        (spaces.Box(-1, 1, (64, 64, 3)), {"observation": vector(12288, "of [64, 64, 3]")}),
        (spaces.Box(0, 1, (64, 64, 3)), {"observation": image(64, 64, 3, note="float32 of 0 to 1, kept as bytes")}),
        (spaces.Box(0, 255, (1, 64, 32)), {"observation": image(64, 32, 1, note="float32 of 0 to 255, kept as bytes")}),
        (
            spaces.Box(0, 255, (64, 64, 4), np.int64),
            {"observation": image(64, 64, 4, note="int64 of 0 to 255, kept as bytes")},
        ),
        (spaces.Box(0, 255, (8, 64, 64), np.uint8), {"observation": image(64, 64, 8)}),
        (
            spaces.Box(0, 255, (4, 64, 48, 3), np.uint8),
            {"observation": image(64, 48, 12, note="4 frames, the last one last")},
        ),
        (
            spaces.Box(0, 255, (4, 3, 64, 48), np.uint8),
            {"observation": image(64, 48, 12, note="4 frames, the last one last")},
        ),
        (
            spaces.Box(0, 1, (2, 16, 16, 3)),
            {"observation": image(16, 16, 6, note="2 frames, the last one last; float32 of 0 to 1, kept as bytes")},
        ),
        (spaces.Discrete(5, start=2), {"observation": classes(5)}),
        (spaces.MultiDiscrete([2, 3]), {"observation": classes(2, 3)}),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), {"observation": classes(2, 3, 4, 5)}),
        (spaces.MultiBinary(3), {"observation": classes(2, 2, 2)}),
        (spaces.MultiBinary((2, 2)), {"observation": classes(2, 2, 2, 2)}),
        (
            spaces.Dict(a=spaces.Dict(b=MOVES, reward=MOVES), c=spaces.Tuple((MOVES, spaces.Box(-1, 1, (2,))))),
            {"a/b": classes(3), "a/reward": classes(3), "c/0": classes(3), "c/1": vector(2)},
        ),
        (spaces.Dict(x=MOVES, action_mask=spaces.MultiBinary(3)), {"x": classes(3)}),
        (spaces.Dict(x=spaces.Dict(action_mask=spaces.MultiBinary(2))), {"x/action_mask": classes(2, 2)}),
        (spaces.Dict(x=spaces.Box(-1, 1, (4, 2))), {"x": vector(8, "of [4, 2]")}),
    ],
)
def test_observation_keys_reads_each_space(space, keys):
    assert observation_keys(space) == keys


@pytest.mark.parametrize(
    "flags", [spaces.MultiBinary(4), spaces.Box(0, 1, (4,), BOOL), spaces.Box(0, 1, (4,), np.int8)]
)
def test_observation_keys_pairs_a_set_with_its_validity(flags):
    keys = observation_keys(spaces.Dict(inner=points(flags)))
    assert keys == {
        "inner/points": ObservationKey("set", (4, 2), torch.float32, validity="inner/points_mask"),
        "inner/points_mask": ObservationKey("validity", (4,), torch.bool),
    }


@pytest.mark.parametrize(
    ("space", "kinds"),
    [
        (points(spaces.MultiBinary(5)), ["vector", "classes"]),
        (points(spaces.Box(0, 2, (4,), np.int8)), ["vector", "vector"]),
        (points(spaces.Box(0, 1, (4,), np.float32)), ["vector", "vector"]),
        (spaces.Dict(x=spaces.Box(0, 1, (4,)), x_mask=spaces.MultiBinary(4)), ["vector", "classes"]),
        (spaces.Dict(x=spaces.Box(0, 9, (4, 2), np.int64), x_mask=spaces.MultiBinary(4)), ["vector", "classes"]),
        (spaces.Dict(x=spaces.Dict(y=spaces.Box(0, 1, (4, 2))), y_mask=spaces.MultiBinary(4)), ["vector", "classes"]),
    ],
)
def test_observation_keys_sees_no_set_without_flags_that_fit(space, kinds):
    assert [key.kind for key in observation_keys(space).values()] == kinds


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Dict(note=spaces.Text(5)), r"'note' has the space Text.*not supported \(Box, Discrete"),
        (spaces.Sequence(MOVES), r"'observation' has the space Sequence"),
        (spaces.Graph(MOVES, None), r"'observation' has the space Graph"),
        (spaces.OneOf((MOVES, MOVES)), r"'observation' has the space OneOf"),
        (spaces.Dict(reward=MOVES, is_last=MOVES), r"'reward' has a name .*replay.*rename"),
        (spaces.Dict(context_stoch=MOVES), "context_stoch"),
        (spaces.Dict(env=MOVES, column=MOVES), "'env' has a name .*replay"),
        (spaces.Dict({"a/b": MOVES, "a": spaces.Dict(b=MOVES)}), "two observations are called 'a/b'"),
        (spaces.Dict(action_mask=spaces.MultiBinary(3)), "nothing to observe"),
        (spaces.Box(-1, 1, (0,)), "holds no number"),
    ],
)
def test_observation_keys_refuses_what_cannot_be_read(space, message):
    with pytest.raises(ValueError, match=message) as refusal:
        observation_keys(space)
    assert "\n" not in str(refusal.value)


UNSUPPORTED = {
    "mission": spaces.Text(9),
    "none": spaces.Box(-1, 1, (0,)),
    "reward": MOVES,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_observation_keys_leaves_out_what_cannot_be_read_and_is_not_wanted(name):
    space = spaces.Dict({name: UNSUPPORTED[name], "speed": spaces.Box(-1, 1, (2,))})
    assert observation_keys(space, wanted=("speed", "spe.*")) == {"speed": vector(2)}
    assert left_out(space).keys() == {name}
    assert flattener(space)(space.sample()).keys() == {"speed"}
    with pytest.raises(ValueError, match=f"'{name}'"):
        observation_keys(space, wanted=("speed", f"speed|{name}"))


def test_observation_keys_refusal_is_followed_by_leaving_all_of_it_out():
    space = spaces.Dict({**UNSUPPORTED, "speed": spaces.Box(-1, 1, (2,))})
    with pytest.raises(ValueError, match="leave it out") as refusal:
        observation_keys(space)
    advice = shlex.split(str(refusal.value).partition("leave it out with ")[2])
    assert advice[::2] == ["--model.encode_keys", "--model.decode_keys"]
    assert observation_keys(space, wanted=advice[1::2]) == {"speed": vector(2)}


@pytest.mark.parametrize(
    ("shape", "framed", "corner"),
    [((84, 84, 3), (96, 96, 3), (6, 6)), ((1, 25, 64), (32, 64, 1), (3, 0)), ((4, 84, 64, 3), (96, 64, 12), (6, 0))],
)
@pytest.mark.parametrize(("high", "dtype"), [(255, np.uint8), (1, np.float32)])
def test_images_of_any_size_get_a_black_frame(shape, framed, corner, high, dtype):
    space = spaces.Dict(eye=spaces.Box(0, high, shape, dtype), speed=MOVES)
    key = observation_keys(space)["eye"]
    sides = shape[:2] if shape[-1] == 3 and len(shape) == 3 else shape[1:3]
    assert (key.kind, key.shape) == ("image", framed) and f"{sides[0]} x {sides[1]} in a black frame" in key.note
    white = flattener(space)({"eye": np.full(shape, high, dtype), "speed": 0})["eye"]
    assert white.dtype == np.uint8 and white.shape == framed
    (top, left), (height, width) = corner, sides
    expected = np.zeros(framed, np.uint8)
    expected[top : top + height, left : left + width] = 255
    np.testing.assert_array_equal(white, expected)


@pytest.mark.parametrize(
    ("space", "obs", "flat"),
    [
        (spaces.Box(0, 9, (2, 2), np.int64), np.array([[1, 2], [3, 4]]), np.array([1, 2, 3, 4], np.float32)),
        (spaces.Box(-1, 1, ()), 0.5, np.array([0.5], np.float32)),
        (spaces.Discrete(5, start=2), 6, np.array([4])),
        (spaces.MultiDiscrete(np.array([[2, 3]]), start=np.array([[1, -1]])), [[2, 1]], np.array([1, 2])),
        (spaces.MultiBinary(3), np.array([1, 0, 1], np.int8), np.array([1, 0, 1])),
    ],
)
def test_flattener_gives_the_value_worked_out_by_hand(space, obs, flat):
    (found,) = flattener(space)(obs).values()
    np.testing.assert_array_equal(found, flat, strict=True)


def test_flattener_puts_channels_last():
    pixels = np.arange(3 * 32 * 48).reshape(3, 32, 48).astype(np.uint8)
    flat = flattener(spaces.Box(0, 255, (3, 32, 48), np.uint8))(pixels)["observation"]
    np.testing.assert_array_equal(flat[5, 7], pixels[:, 5, 7])


@pytest.mark.parametrize("channels_first", [False, True])
def test_flattener_puts_stacked_frames_behind_one_another(channels_first):
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), np.uint8)
    given = frames.transpose(0, 3, 1, 2) if channels_first else frames
    flat = flattener(spaces.Box(0, 255, given.shape, np.uint8))(given)["observation"]
    np.testing.assert_array_equal(flat[..., -3:], frames[-1], strict=True)
    np.testing.assert_array_equal(flat, np.concatenate(frames, -1), strict=True)


@pytest.mark.parametrize(("high", "pixels"), [(1, [0.0, 0.5, 1.0]), (255, [0.0, 127.7, 255.0])])
def test_flattener_reads_floats_as_pixels(high, pixels):
    obs = np.zeros((16, 16, 3), np.float32) + np.array(pixels, np.float32)
    flat = flattener(spaces.Box(0, high, (16, 16, 3)))(obs)["observation"]
    np.testing.assert_array_equal(flat[3, 4], np.array([0, 128, 255], np.uint8), strict=True)


@pytest.mark.parametrize("value", [1.1, -0.1, np.nan])
def test_flattener_refuses_floats_that_are_no_pixels(value):
    with pytest.raises(ValueError, match="has a value outside its space"):
        flattener(spaces.Box(0, 1, (16, 16, 3)))(np.full((16, 16, 3), value, np.float32))


def test_flattener_refuses_fractions_where_the_space_has_bytes():
    with pytest.raises(ValueError, match="'observation' holds fractions"):
        flattener(IMAGE)(np.full(IMAGE.shape, 0.5, np.float32))


@pytest.mark.parametrize("obs", [np.array(["a", "b"]), [None, 1.0], None, [[1.0], [1.0, 2.0]]])
def test_flattener_refuses_what_is_no_number(obs):
    with pytest.raises(ValueError, match="^observation 'observation' is"):
        flattener(spaces.Box(-1, 1, (2,)))(obs)


def test_flattener_gives_grey_pixels_a_channel():
    pixels = np.arange(32 * 48).reshape(32, 48).astype(np.uint8)
    flat = flattener(spaces.Box(0, 255, (32, 48), np.uint8))(pixels)["observation"]
    np.testing.assert_array_equal(flat, pixels[..., None], strict=True)


@pytest.mark.parametrize("space", [IMAGE, points(spaces.MultiBinary(4)), spaces.Dict(a=spaces.Tuple((MOVES, IMAGE)))])
def test_flattener_fits_the_keys(space):
    space = spaces.Dict(part=space, action_mask=spaces.Box(0, 1, (3,), np.int8), hint=spaces.Discrete(2))
    flat = flattener(space)(space.sample())
    mask = flat.pop("action_mask")
    assert (mask.shape, mask.dtype) == ((3,), BOOL)
    keys = observation_keys(space)
    assert flat.keys() == keys.keys()
    for name, key in keys.items():
        assert (flat[name].shape, torch.from_numpy(flat[name]).dtype) == (key.shape, key.dtype)


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({"x": np.zeros(3), "k": 0}, r"'x' has shape \(3,\), but its space is Box"),
        ({"k": 0}, "'x' is missing"),
        (None, "'x' is missing"),
        ({"x": np.zeros(2), "k": 3}, r"'k' has a value outside its space Discrete\(3\)"),
        ({"x": np.zeros(2), "k": -1}, "'k' has a value outside"),
        ({"x": np.zeros(2), "k": 0, "action_mask": np.ones(4)}, r"'action_mask' has shape \(4,\)"),
    ],
)
def test_flattener_refuses_what_its_space_does_not_hold(obs, message):
    space = spaces.Dict(x=spaces.Box(-1, 1, (2,)), k=MOVES, action_mask=spaces.MultiBinary(3))
    with pytest.raises(ValueError, match=message):
        flattener(space)(obs)


def test_flattener_lets_through_what_is_not_finite_as_float32():
    obs = np.array([np.nan, -np.inf, 1e300, 3e38])
    (found,) = flattener(spaces.Box(-np.inf, np.inf, (4,), np.float64))(obs).values()
    np.testing.assert_array_equal(found, np.array([np.nan, -np.inf, np.inf, 3e38], np.float32), strict=True)


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (MOVES, np.nan),
        (spaces.MultiDiscrete([2, 2], start=[1, 1]), np.array([1, np.inf])),
        (spaces.MultiBinary(2), np.array([0, np.nan])),
        (IMAGE, np.full(IMAGE.shape, np.nan)),
        (points(spaces.MultiBinary(4)), {"points": np.zeros((4, 2)), "points_mask": np.full(4, np.nan)}),
        (spaces.Dict(k=MOVES, action_mask=spaces.Box(0, 1, (3,))), {"k": 0, "action_mask": np.array([1, np.nan, 0])}),
    ],
)
def test_flattener_refuses_nan_where_there_are_no_fractions(space, obs):
    with pytest.raises(ValueError, match="has a value outside its space"):
        flattener(space)(obs)


@pytest.mark.parametrize(
    ("space", "spec"),
    [
        (spaces.Discrete(4, start=-2), ActionSpec("discrete", (4,))),
        (spaces.MultiDiscrete([2, 5]), ActionSpec("multi_discrete", (2, 5))),
        (spaces.MultiBinary(3), ActionSpec("multi_discrete", (2, 2, 2))),
        (spaces.Box(-2, 2, (2, 3)), ActionSpec("continuous", (6,))),
        (spaces.Box(-np.inf, np.inf, (), np.float64), ActionSpec("continuous", (1,))),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), ActionSpec("multi_discrete", (2, 3, 4, 5))),
        (spaces.MultiBinary((2, 2)), ActionSpec("multi_discrete", (2, 2, 2, 2))),
        (spaces.Box(np.array([-1, 5]), np.array([3, 7]), dtype=np.int64), ActionSpec("multi_discrete", (5, 3))),
        (spaces.Box(0, 255, (1,), np.uint8), ActionSpec("multi_discrete", (256,))),
        (
            spaces.Dict(move=MOVES, tools=spaces.Tuple((spaces.MultiBinary(2), spaces.Box(0, 4, (), np.int8)))),
            ActionSpec("multi_discrete", (3, 2, 2, 5)),
        ),
        (
            spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Dict(grip=spaces.Box(0, 1, (1, 1))))),
            ActionSpec("continuous", (3,)),
        ),
    ],
)
def test_action_spec_reads_each_space(space, spec):
    assert action_spec(space, IMAGE) == spec


@pytest.mark.parametrize(
    "mask", [spaces.MultiBinary(3), spaces.Box(0, 1, (3,), BOOL), spaces.Box(0, 1, (3,), np.float32)]
)
def test_action_spec_is_masked_by_a_mask_at_the_top(mask):
    assert action_spec(MOVES, spaces.Dict(x=IMAGE, action_mask=mask)).masked
    assert not action_spec(MOVES, spaces.Dict(inner=spaces.Dict(action_mask=mask))).masked


@pytest.mark.parametrize(
    ("space", "mask", "message"),
    [
        (spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(4), "cannot be masked; only Discrete can"),
        (spaces.Box(-1, 1, (2,)), spaces.MultiBinary(2), "cannot be masked"),
        (MOVES, spaces.MultiBinary(4), r"MultiBinary\(4\), but there are 3 actions"),
        (MOVES, MOVES, "but there are 3 actions"),
        (spaces.Sequence(MOVES), None, "not supported; Discrete, MultiDiscrete.* and Dict and Tuple of these are$"),
        (spaces.Dict(say=spaces.Text(3), move=MOVES), None, "the action space Text.* is not supported"),
        (spaces.Dict(move=MOVES, force=spaces.Box(-1, 1, (2,))), None, "mixes choices and real numbers; .* levels"),
        (spaces.Box(0, 256, (2,), np.int64), None, "whole numbers of 257 values.* 256; declare narrower bounds"),
        (spaces.Box(-1, 1, (0,)), None, "holds no action"),
        (spaces.Tuple(()), None, "holds no action"),
        (spaces.Dict(a=MOVES), spaces.MultiBinary(3), "cannot be masked"),
    ],
)
def test_action_spec_refuses_what_no_actor_can_do(space, mask, message):
    observations = spaces.Dict(x=IMAGE) if mask is None else spaces.Dict(x=IMAGE, action_mask=mask)
    with pytest.raises(ValueError, match=message):
        action_spec(space, observations)


@pytest.mark.parametrize(
    ("space", "row", "action"),
    [
        (spaces.Discrete(4, start=-2), np.array(3), 1),
        (spaces.MultiDiscrete([2, 5], start=[0, 10]), np.array([1, 4]), [1, 14]),
        (spaces.MultiBinary(3), np.array([1, 0, 1]), [1, 0, 1]),
        (spaces.MultiDiscrete(np.array([[2, 3]])), np.array([1, 2]), [[1, 2]]),
        (spaces.Box(np.array([-1, 5]), np.array([3, 7]), dtype=np.int64), np.array([0, 2]), [-1, 7]),
        (spaces.Box(0, 255, (1,), np.uint8), np.array([200]), [200]),
        (spaces.Box(-2, 6, (3,)), np.array([-1, 0, 0.5], np.float32), [-2, 2, 4]),
        (spaces.Box(-2, 6, (2,)), np.array([-3, 1.5], np.float32), [-2, 6]),
        (spaces.Box(-2, 6, (2, 1), np.float64), np.array([1, 0], np.float32), [[6], [2]]),
        (spaces.Box(-2, 6, ()), np.array([0.5], np.float32), 4),
        (spaces.Box(-np.inf, np.inf, (2,)), np.array([-3, 7.5], np.float32), [-3, 7.5]),
        (spaces.Box(0, np.inf, (2,)), np.array([-3, 7.5], np.float32), [0, 7.5]),
        (
            spaces.Box(np.array([-np.inf, 0], np.float32), np.array([2, 10], np.float32)),
            np.array([5, 0], np.float32),
            [2, 5],
        ),
        (spaces.Box(-3e38, 3e38, (2,)), np.array([-1, 0], np.float32), [np.float32(-3e38), 0]),
        (spaces.Box(-1.7e308, 1.7e308, (1,), np.float64), np.array([1], np.float32), [1.7e308]),
    ],
)
def test_to_env_action_gives_the_action_worked_out_by_hand(space, row, action):
    found = to_env_action(space, row)
    assert found in space
    np.testing.assert_array_equal(found, action)


def test_to_env_action_puts_dicts_and_tuples_together():
    choices = spaces.Dict(
        move=spaces.Discrete(3, start=4),
        tools=spaces.Tuple((spaces.MultiBinary((1, 2)), spaces.Box(-2, 4, (), np.int8), spaces.MultiDiscrete([3]))),
    )
    action = to_env_action(choices, np.array([2, 1, 0, 5, 1]))
    assert action in choices and action["move"] == 6
    flags, level, choice = action["tools"]
    assert (flags.tolist(), int(level), choice.tolist()) == ([[1, 0]], 3, [1])
    numbers = spaces.Tuple((spaces.Box(-2, 6, (2,)), spaces.Dict(grip=spaces.Box(0, 1, (1, 1)))))
    arm, hand = to_env_action(numbers, np.array([-1, 0.5, 0], np.float32))
    assert (arm, hand) in numbers and arm.tolist() == [-2, 4] and hand["grip"].tolist() == [[0.5]]


def test_to_env_action_keeps_to_the_bounds_for_any_row():
    space = spaces.Box(np.array([-0.1, 1 / 3], np.float32), np.array([0.7, 0.9], np.float32))
    for row in np.random.default_rng(0).normal(0, 1, (200, 2)).astype(np.float32):
        assert to_env_action(space, row) in space
