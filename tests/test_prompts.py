import json
import re
from pathlib import Path

import pytest

import language.rewards
from benchmarks.flags import CONFIGS
from config import UserError
from language.prompts import Example, find_prompts, read_examples, sorted_letters, split
from language.rewards import exact, find_reward, places


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_sorted_letters_are_all_words_each_once():
    examples = sorted_letters()
    assert len(examples) == len(set(examples)) == 8**4
    assert Example("dbca:", "abcd") in examples and Example("haha:", "aahh") in examples


def test_no_prompt_is_on_two_sides_and_their_shares_are_as_asked():
    examples = sorted_letters()
    prompts = split([*examples, *examples], held_out=0.1)
    sides = [set(part) for part in (prompts.training, prompts.validation, prompts.test)]
    assert sum(map(len, sides)) == len(set(examples)) and set.union(*sides) == set(examples)
    assert len(sides[1]) == pytest.approx(0.1 * len(examples), rel=0.15)
    assert len(sides[2]) == pytest.approx(0.1 * len(examples), rel=0.15)


def test_split_does_not_depend_on_the_order():
    examples = sorted_letters()
    assert set(split(examples, held_out=0.2).test) == set(split(examples[::-1], held_out=0.2).test)


def test_rows_of_a_file_are_read_and_bad_ones_are_told_by_their_number(tmp_path):
    good = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1), "more": None} for number in range(4)]
    bad = ["{", [1], {"prompt": "x"}, {"prompt": "\ud800", "answer": ""}]
    path = write(tmp_path / "rows.jsonl", good[0], bad[0], "", good[1], bad[1], good[2], bad[2], good[3], bad[3])
    faults: list[str] = []
    examples = read_examples(path, faults)
    assert examples[1] == Example("What is 1 + 1?", "2") and len(examples) == 4
    assert faults == [
        f"{path}:2: is no JSON",
        f"{path}:5: is no mapping",
        f"{path}:7: has no text under 'answer'",
        f"{path}:9: has half of a pair of surrogates, which is no character",
    ]


def test_an_empty_answer_can_be_given():
    assert places("?", "", "") == exact("?", "", "") == 1


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}')
    assert read_examples(path, []) == [Example("a", "b")]


def test_a_row_ends_where_its_line_does_and_nowhere_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "one\u2028two\x85", "answer": "\u2029"}, {"prompt": "three", "answer": ""}]
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_examples(path, []) == [Example("one\u2028two\x85", "\u2029"), Example("three", "")]


def test_a_file_of_which_most_rows_are_bad_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "answer": "b"}, "no", "no")
    with pytest.raises(UserError, match=r"2 of 3 rows are no .*rows.jsonl:2: is no JSON"):
        read_examples(path, [])


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b""])
def test_a_file_that_cannot_be_read_is_refused(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="rows.jsonl"):
        find_prompts(str(path), held_out=0.1)


def test_too_few_prompts_to_hold_some_out_are_refused():
    with pytest.raises(
        UserError, match=r"language.held_out is 0.1, which leaves 1 prompts to learn from, 0 to validate"
    ):
        split([Example("b", "c")], held_out=0.1)


@pytest.mark.parametrize(
    ("completion", "as_exact", "as_places"),
    [("abcd", 1, 1), (" abcd\n", 1, 1), ("abdc", 0, 0.5), ("abc", 0, 0.75), ("abcdd", 0, 0.8), ("", 0, 0)],
)
def test_rewards_by_hand(completion, as_exact, as_places):
    assert exact("?", completion, "abcd") == as_exact
    assert places("?", completion, "abcd") == pytest.approx(as_places)


def test_reward_may_be_a_function_of_the_users():
    assert find_reward("tests.test_prompts:half")("a", "b", "c") == 0.5


def test_reward_that_is_no_number_is_refused_with_its_prompt():
    with pytest.raises(UserError, match=r"gave nan for the prompt 'ask'; it has to give a number of at most 1e\+18"):
        find_reward("tests.test_prompts:nothing")("ask", "b", "c")


def test_reward_of_no_such_name_is_refused():
    with pytest.raises(UserError, match="choose exact, places or your own module:function"):
        find_reward("exactly")


def test_named_rewards_are_those_of_the_help_page():
    comments = re.search(r"\n    reward: (.*?)\n    held_out", CONFIGS.read_text(), re.DOTALL)
    assert comments is not None and language.rewards.NAMED.keys() == set(re.findall(r"(\w+): ", comments[1]))


def half(prompt: str, completion: str, answer: str) -> float:
    return 0.5


def nothing(prompt: str, completion: str, answer: str) -> float:
    return float("nan")
