import numpy as np
import pytest

from routing.drawing import MOST_FRAMES, MOST_LINES, draw_open_loop, draw_tour, draw_tour_pair
from routing.instances import field_test_coords

COORDS = field_test_coords(20, 1)[0]
TOUR = np.arange(20)


def colored_pixels(picture):
    return int((picture != 255).any(-1).sum())


def test_draw_tour_returns_a_picture_that_depends_on_the_tour():
    picture = draw_tour(COORDS, TOUR)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert np.array_equal(picture, draw_tour(COORDS, TOUR))
    assert not np.array_equal(picture, draw_tour(COORDS, TOUR[::-2]))


def test_draw_tour_leaves_the_closing_leg_out_on_request():
    assert colored_pixels(draw_tour(COORDS, TOUR, visited_only=True)) < colored_pixels(draw_tour(COORDS, TOUR))


def test_draw_tour_marks_the_start():
    assert not np.array_equal(draw_tour(COORDS, TOUR), draw_tour(COORDS, np.roll(TOUR, 1)))


def test_draw_tour_takes_tours_that_repeat_and_omit_nodes():
    assert draw_tour(COORDS, np.array([3, 3, 5])).shape == draw_tour(COORDS, TOUR).shape


def test_draw_tour_writes_the_title():
    assert colored_pixels(draw_tour(COORDS, TOUR, title="20 nodes")) > colored_pixels(draw_tour(COORDS, TOUR))


def test_draw_tour_pair_puts_two_pictures_side_by_side():
    picture = draw_tour_pair(COORDS, TOUR, TOUR[::2], left_title="real", right_title="imagined")
    height, width, _ = draw_tour(COORDS, TOUR).shape
    assert picture.shape == (height, 2 * width, 3)
    assert colored_pixels(picture[:, :width]) > colored_pixels(picture[:, width:])


VECTORS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "truth",
    [
        VECTORS,
        VECTORS[:, :1] > 0,
        np.arange(40).reshape(20, 2) % 4,
        np.random.default_rng(0).normal(size=(20, 5, 2)),
        IMAGES,
        IMAGES[..., :1],
        IMAGES[:3],
    ],
    ids=["vector", "validity", "classes", "set", "image", "grey image", "short"],
)
def test_draw_open_loop_draws_every_kind_of_key(truth):
    picture = draw_open_loop(truth, truth, seen=2)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3 and picture.shape[-1] == 3
    assert picture.std() > 0


@pytest.mark.parametrize(("channels", "drawn"), [(2, 1), (4, 1), (6, 3), (12, 3)])
def test_draw_open_loop_draws_the_last_channels_of_stacked_frames(channels, drawn):
    stacked = np.random.default_rng(0).integers(0, 256, (4, 16, 16, channels), dtype=np.uint8)
    expected = draw_open_loop(stacked[..., -drawn:], stacked[..., -drawn:], seen=2)
    np.testing.assert_array_equal(draw_open_loop(stacked, stacked, seen=2), expected)


def test_draw_open_loop_draws_a_small_difference_of_grey_faintly():
    truth = np.full((4, 16, 16, 1), 200, np.uint8)
    truth[:, :2], truth[:, 2:4] = 0, 255
    slight, great = truth.copy(), truth.copy()
    slight[:, 8], great[:, 8] = 199, 60
    dark = [(draw_open_loop(truth, predicted, seen=2) < 5).sum() for predicted in (slight, great)]
    assert dark[0] > dark[1]


@pytest.mark.parametrize("truth", [VECTORS, IMAGES], ids=["lines", "strips"])
def test_draw_open_loop_shows_where_the_model_differs(truth):
    predicted = truth.copy()
    predicted[-1] = 0
    perfect, wrong = (draw_open_loop(truth, guess, seen=2) for guess in (truth, predicted))
    assert perfect.shape == wrong.shape
    differs = (perfect != wrong).any((0, 2))
    # The last of the steps is drawn at the right, and nothing left of it changes.
    assert differs.any() and not differs[: len(differs) // 2].any()


def test_draw_open_loop_marks_what_was_seen():
    for truth in (VECTORS, IMAGES):
        assert not np.array_equal(draw_open_loop(truth, truth, seen=2), draw_open_loop(truth, truth, seen=4))


def test_draw_open_loop_stays_readable_however_much_there_is():
    many = np.zeros((200, MOST_LINES + 40), np.float32)
    assert (
        draw_open_loop(many, many, seen=8).shape
        == draw_open_loop(many[:, :MOST_LINES], many[:, :MOST_LINES], seen=8).shape
    )
    long = np.zeros((200, 16, 16, 3), np.uint8)
    width = draw_open_loop(long[:MOST_FRAMES], long[:MOST_FRAMES], seen=8).shape[1]
    assert draw_open_loop(long, long, seen=8).shape[1] == width


def test_draw_tour_takes_any_name_of_a_file_as_title():
    picture = draw_tour(np.eye(3, 2), np.arange(3), title="$x^{$ \x1b[2J\n$\\frac$")
    assert picture.ndim == 3
