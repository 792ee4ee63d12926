"""Episodes are cut and put together again so that no step is lost, none comes twice, and none follows another's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.pieces import Cutter, Finished, Origin, Slots, fault_of, joined, split
from training.ring import REWARD_AND_ENDS

SPACES = {"time": ((), torch.int64), "action": ((), torch.int64), **REWARD_AND_ENDS}
SOMEONE = Origin("someone", 0)


def column(*rows: tuple[int, str]) -> dict[str, Tensor]:
    """A row for each environment: its time, which is its reward and its action, too, and F or L for its flags."""
    times = torch.tensor([time for time, _ in rows])
    first, last = (torch.tensor([letter in flags for _, flags in rows]) for letter in "FL")
    return {
        "time": times,
        "action": times,
        "reward": torch.where(first, 0.0, times.float()),
        "is_first": first,
        "is_last": last,
        "is_terminal": last,
    }


def episode(*lengths: int) -> list[tuple[int, str]]:
    """The rows of one environment, by the lengths of its episodes; time goes on."""
    rows: list[tuple[int, str]] = []
    for length in lengths:
        flags = ["F", *[""] * (length - 2), "L"]
        rows += [(len(rows) + index, flag) for index, flag in enumerate(flags)]
    return rows


def cut(cutter: Cutter, *envs: list[tuple[int, str]]) -> list[dict[str, Tensor]]:
    pieces = []
    for rows in zip(*envs, strict=True):
        pieces += cutter.add(column(*rows))
    return pieces


def times(pieces: list[dict[str, Tensor]]) -> list[list[int]]:
    return [piece["time"].tolist() for piece in pieces]


def test_cutter_gives_each_episode_when_it_ends():
    cutter = Cutter(SPACES, num_envs=2, longest=9)
    pieces = cut(cutter, episode(3, 4), episode(5, 2))
    assert times(pieces) == [[0, 1, 2], [0, 1, 2, 3, 4], [3, 4, 5, 6], [5, 6]]
    assert all(fault_of(piece, longest=9) is None for piece in pieces)
    # Rewards 1 + 2, and those of the second: 1 + 2 + 3 + 4; 4 + 5 + 6; 6.
    assert cutter.finished == [Finished(3.0, 2), Finished(10.0, 4), Finished(15.0, 3), Finished(6.0, 1)]


def test_cutter_cuts_a_long_episode_so_that_no_transition_is_missing():
    cutter = Cutter(SPACES, num_envs=1, longest=3)
    pieces = cut(cutter, episode(6, 2))
    assert times(pieces) == [[0, 1, 2], [2, 3, 4], [4, 5], [6, 7]]
    assert [piece["is_terminal"].tolist() for piece in pieces[:3]] == [[False] * 3, [False] * 3, [False, True]]
    # A reward stands once, with the row that it came with.
    assert [piece["reward"].tolist() for piece in pieces[:3]] == [[0, 1, 2], [0, 3, 4], [0, 5]]
    assert all(fault_of(piece, longest=3) is None for piece in pieces)
    assert cutter.finished == [Finished(15.0, 5), Finished(7.0, 1)]


def test_cutter_ends_no_episode_twice_that_has_the_longest_length():
    assert times(cut(Cutter(SPACES, num_envs=1, longest=3), episode(3, 3))) == [[0, 1, 2], [3, 4, 5]]


def all_columns(slots: Slots) -> list[dict[str, Tensor]]:
    found = []
    slots.fill()
    while slots.ready:
        found.append({name: value.clone() for name, value in slots.take()[0].items()})
        slots.fill()
    return found


def test_slots_put_each_piece_behind_the_end_of_another():
    slots = Slots(SPACES, count=2, longest=9)
    slots.add(cut(Cutter(SPACES, num_envs=1, longest=9), episode(3, 2, 4, 2)), SOMEONE)
    # One slot has the episodes of 3 and 2 rows, the other those of 2 and 4: there is none for the first one then.
    assert [each["time"].tolist() for each in all_columns(slots)] == [[0, 3], [1, 4], [2, 5], [9, 6], [10, 7]]


def test_slots_count_the_steps_of_each_origin():
    slots = Slots(SPACES, count=2, longest=9)
    cutter = Cutter(SPACES, num_envs=1, longest=9)
    slots.add(cut(cutter, episode(3)), Origin("one", 0))
    slots.add(cut(cutter, episode(2)), Origin("other", 4))
    assert [origin.update for origin in slots.fill()] == [0, 4]
    # The last row of an episode is not acted on.
    assert slots.take()[1] == {"one": 1, "other": 1}
    assert slots.take()[1] == {"one": 1}
    assert not slots.ready


def test_slots_go_on_from_their_state():
    slots, other = (Slots(SPACES, count=2, longest=9) for _ in range(2))
    slots.add(cut(Cutter(SPACES, num_envs=2, longest=9), episode(4, 3), episode(7)), SOMEONE)
    slots.fill()
    slots.take()
    other.load_state_dict(slots.state_dict())
    # What waited for its turn is not kept.
    slots.waiting.clear()
    assert [each["time"].tolist() for each in all_columns(other)] == [[1, 5], [2, 6]]
    assert [each["time"].tolist() for each in all_columns(slots)] == [[1, 5], [2, 6]]


def test_slots_want_more_until_as_many_pieces_wait():
    slots, cutter = Slots(SPACES, count=2, longest=9), Cutter(SPACES, num_envs=1, longest=9)
    wanted = []
    for _ in range(4):
        slots.add(cut(cutter, episode(2)), SOMEONE)
        slots.fill()
        wanted.append(slots.wants_more)
    # The first two begin at once.
    assert wanted == [True, True, True, False]


def test_slots_know_whose_pieces_they_go_on_with():
    slots, other = (Slots(SPACES, count=1, longest=9) for _ in range(2))
    slots.add(cut(Cutter(SPACES, num_envs=1, longest=9), episode(3)), Origin("one", 0))
    slots.fill()
    other.load_state_dict(slots.state_dict())
    assert other.take()[1] == slots.take()[1] == {"one": 1}


def test_slots_refuse_the_state_of_others():
    with pytest.raises(RuntimeError, match="2 pieces"):
        Slots(SPACES, count=3, longest=9).load_state_dict(Slots(SPACES, count=2, longest=9).state_dict())


def test_pieces_are_joined_and_split():
    pieces = cut(Cutter(SPACES, num_envs=2, longest=9), episode(3), [*episode(2), (2, "F")])
    again = split(joined(pieces), [len(piece["time"]) for piece in pieces])
    assert times(again) == times(pieces) == [[0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("flags", "fault"),
    [("FL", None), ("F.L", None), ("..L", "one episode"), ("FF L", "one episode"), ("F..", "one episode")],
)
def test_rows_that_are_no_piece_are_told(flags: str, fault: str | None):
    piece = {
        name: torch.tensor([letter == each for each in flags]) for name, letter in (("is_first", "F"), ("is_last", "L"))
    }
    found = fault_of(piece, longest=4)
    assert found is None if fault is None else fault in str(found)
    assert "rows" in str(fault_of(piece, longest=1))
