import numpy as np

from envs.drawing import draw_tour, draw_tour_pair
from envs.instances import field_test_coords

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
