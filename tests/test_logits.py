"""The processors of logits: what comes out of them can be sampled from, and is what it was where nothing was wrong."""

from __future__ import annotations

import builtins
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

import logits
from benchmarks.monitors import absolute_clipping
from config import UserError
from logits import StableLogitsProcessor, TemperatureLogitsWarper
from tests.language_scenes import END, VOCABULARY, WILD, small_gpt2, spoil_logits

NAN, INF = math.nan, math.inf
# `Any`, since transformers asks for a LongTensor, which no function of PyTorch is said to return.
IDS: Any = torch.zeros(8, 1, dtype=torch.int64)
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def process(rows: Any, **settings: Any) -> Tensor:
    scores = torch.as_tensor(rows)
    return StableLogitsProcessor(**settings)(IDS[: len(scores)], scores)


def assert_can_be_drawn(scores: Tensor, *, draws: int = 1) -> None:
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(len(scores)), rtol=1e-5, atol=1e-5)
    drawn = torch.multinomial(scores.exp(), draws)
    assert (scores.gather(-1, drawn) > -INF).all()


def wild_scores() -> Tensor:
    scores = 30 * torch.randn(8, 50_000)
    scores[0, :100], scores[1, 5], scores[2, 7], scores[3, 9], scores[4, 11] = NAN, INF, -INF, 150.0, -150.0
    return scores


def test_nan_is_gone():
    found = process([[NAN, 1.0, 2.0, NAN]])
    assert not found.isnan().any() and (found.exp()[0, [0, 3]] == 0).all()
    assert_can_be_drawn(found)


def test_infinities_are_gone():
    found = process([[INF, 1.0, 2.0, -INF], [INF, INF, 0.0, 0.0]])
    assert (found < INF).all() and found.exp()[0, 3] == 0
    assert (found[0, :3].isfinite()).all()
    assert_can_be_drawn(found)


@pytest.mark.parametrize("size", [100.0, 45.0])
def test_large_logits_come_out_at_most_0(size: float):
    found = process([[size, -size, 0.0, 1.0]])
    assert (found <= 0).all() and found.isfinite().all()
    assert_can_be_drawn(found)


def test_exponentials_sum_to_1_and_can_be_drawn_from():
    assert_can_be_drawn(process(wild_scores()), draws=10)


def test_temperature_scales_by_its_inverse():
    scores = torch.randn(8, 30)
    assert torch.equal(TemperatureLogitsWarper(0.8)(IDS, scores), scores / 0.8)


def test_both_together_can_be_drawn_from_ten_times():
    processors = LogitsProcessorList([StableLogitsProcessor(), TemperatureLogitsWarper(0.8)])
    scores = processors(IDS, wild_scores())
    probs = torch.softmax(scores, -1)
    assert probs.isfinite().all() and (probs.sum(-1) - 1).abs().max() < 1e-5
    drawn = torch.multinomial(probs, 10)
    assert drawn.shape == (8, 10) and not (drawn[0] < 100).any()


def test_scores_do_not_change_with_a_shift_of_the_row():
    scores = (wild_scores() * 4).round() / 4
    assert torch.equal(process(scores + 1000), process(scores))


def test_scores_that_are_in_order_are_their_log_softmax():
    scores = 3 * torch.randn(8, VOCABULARY)
    torch.testing.assert_close(process(scores).exp(), torch.softmax(scores, -1), rtol=1e-5, atol=2e-8)


@pytest.mark.parametrize("min_prob", [0.0, 1e-8, 1e-5])
def test_nothing_is_revived(min_prob: float):
    scores = wild_scores()
    banned = torch.rand(scores.shape) < 0.9
    found = process(scores.masked_fill(banned, -INF), min_prob=min_prob)
    assert (found[banned] == -INF).all() and (found[~banned & ~scores.isnan() & (scores > -INF)] > -INF).all()


@pytest.mark.parametrize("warper", [TopKLogitsWarper(3), TopPLogitsWarper(0.5)], ids=["top-k", "top-p"])
@pytest.mark.parametrize("stable_first", [True, False])
def test_what_top_k_and_top_p_take_away_stays_away(warper: Any, stable_first: bool):
    scores, stable = 3 * torch.randn(8, VOCABULARY), StableLogitsProcessor()
    kept = warper(IDS, scores) > -INF
    order = [stable, warper] if stable_first else [warper, stable]
    found = LogitsProcessorList(order)(IDS, scores)
    assert kept.float().mean() < 0.5 and torch.equal(found > -INF, kept)


@pytest.mark.parametrize(
    ("row", "drawn"), [([NAN, -INF, NAN, NAN], {0, 2, 3}), ([-INF] * 4, {0, 1, 2, 3}), ([NAN] * 4, {0, 1, 2, 3})]
)
def test_row_without_a_legal_token_is_drawn_from_all_the_same(row: list[float], drawn: set[int]):
    processor = StableLogitsProcessor()
    probs = processor(IDS[:1], torch.tensor([row])).exp()
    assert set(probs[0].nonzero().flatten().tolist()) == drawn
    assert probs.max() == probs[probs > 0].min()
    assert processor.get_stats()["fallback_count"] == 1


def test_row_without_a_legal_token_takes_the_fallback():
    found = process([[NAN, -INF, NAN, NAN], [0.0, 1.0, 2.0, 3.0], [-INF] * 4], fallback_token=1)
    assert found.exp()[[0, 2]].tolist() == [[0, 1, 0, 0]] * 2 and (found.exp()[1] > 0).all()


def test_stats_count_since_the_last_reset():
    processor = StableLogitsProcessor()
    nothing = {"nan_count": 0, "inf_count": 0, "clip_count": 0, "fallback_count": 0}
    assert processor.get_stats() == nothing
    for _ in range(3):
        processor(IDS[:2], torch.tensor([[NAN, INF, 0.0, -61.0], [-INF, -INF, NAN, -INF]]))
    assert processor.get_stats() == {"nan_count": 6, "inf_count": 3, "clip_count": 3, "fallback_count": 3}
    processor.reset_stats()
    assert processor.get_stats() == nothing


def test_stats_do_not_wait_for_the_device():
    # The device `meta` has no numbers: asking for one raises.
    processor = StableLogitsProcessor(fallback_token=3)
    for _ in range(2):
        processor(torch.zeros(2, 1, dtype=torch.int64, device="meta"), torch.zeros(2, 9, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        processor.get_stats()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    scores = (30 * torch.randn(8, 1000)).to(dtype)
    found = process(scores)
    assert found.dtype == torch.float32 and torch.equal(found, process(scores.float()))


def test_temperature_is_at_least_the_least():
    scores = torch.tensor([[-1.0, -INF]])
    assert TemperatureLogitsWarper(0.0)(IDS[:1], scores).tolist() == [[-10.0, -INF]]
    assert TemperatureLogitsWarper(0.2, 0.5)(IDS[:1], scores).tolist() == [[-2.0, -INF]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StableLogitsProcessor(0.0), "clip_value is 0.0"),
        (lambda: StableLogitsProcessor(NAN), "clip_value is nan"),
        (lambda: StableLogitsProcessor(min_prob=-0.1), "min_prob is -0.1"),
        (lambda: StableLogitsProcessor(min_prob=1.0), "min_prob is 1.0"),
        (lambda: StableLogitsProcessor(fallback_token=-1), "fallback_token is -1"),
        (lambda: process([[0.0, 1.0]], fallback_token=2), "the vocabulary ends at 1"),
        (lambda: process([[0.0, 1.0]], min_prob=0.5), "min_prob 0.5 for each of 2"),
        (lambda: TemperatureLogitsWarper(-0.1), "temperature is -0.1"),
        (lambda: TemperatureLogitsWarper(NAN), "temperature is nan"),
        (lambda: TemperatureLogitsWarper(1.0, 0.0), "min_temperature is 0.0"),
    ],
)
def test_processors_refuse_what_makes_no_sense(make: Callable[[], Any], message: str):
    with pytest.raises(UserError, match=message):
        make()


def test_module_asks_for_transformers_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return original(name, *others)

    spec = importlib.util.spec_from_file_location("logits_alone", Path(logits.__file__))
    assert spec is not None and spec.loader is not None
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install -e "\.\[lm\]"') as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "\n" not in str(caught.value) and "logits_alone" not in sys.modules


def entropy(log_probs: Tensor) -> float:
    """Mean over the rows, in nats."""
    return float(-(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(-1).mean())


def test_clipping_logits_where_they_stand_changes_them_and_a_shift_does_so_again():
    # The figures of docs/language.md.
    scores = 30 * torch.randn(8, 50_000)
    assert entropy(torch.log_softmax(scores, -1)) == pytest.approx(0.26, abs=0.01)
    assert entropy(process(scores)) == pytest.approx(0.26, abs=0.01)
    assert entropy(absolute_clipping(scores)) == pytest.approx(9.08, abs=0.01)
    assert entropy(absolute_clipping(scores + 100)) == pytest.approx(10.81, abs=0.01)


@pytest.mark.parametrize(("shift", "share"), [(0.0, 0.0005), (-25.0, 0.82), (-40.0, 0.99998)])
def test_a_floor_under_all_tokens_revives_banned_ones(shift: float, share: float):
    # All but the best token are forbidden.
    torch.manual_seed(0)
    scores = torch.randn(8, 50_000) + shift
    banned = scores < scores.amax(-1, keepdim=True)
    scores = scores.masked_fill(banned, -INF)
    revived = (absolute_clipping(scores).exp() * banned).sum(-1).mean()
    assert float(revived) == pytest.approx(share, rel=0.05)
    assert (process(scores).exp() * banned).sum() == 0


def test_nan_that_becomes_a_number_is_floored_like_one():
    scores = torch.randn(1, 100)
    scores[0, 3] = NAN
    assert float(absolute_clipping(scores)[0, 3].exp()) == pytest.approx(1e-8, rel=1e-3)
    assert float(process(scores)[0, 3].exp()) == 0


def generate(*processors: Any, **settings: Any) -> Tensor:
    """What comes after the prompts."""
    model = settings.pop("model", None) or small_gpt2()
    rounds = settings.pop("rounds", 1)
    prompt = PROMPT.repeat(rounds, 1)
    chosen = {"do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12, "top_k": 0, **settings}
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), logits_processor=LogitsProcessorList(processors), **chosen
    )
    return found[:, prompt.shape[1] :]


def test_generate_dies_of_wild_logits_without_the_processor_and_not_with_it():
    model, stable = small_gpt2(), StableLogitsProcessor()
    spoil_logits(model, *WILD)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        generate(model=model)
    found = generate(stable, TemperatureLogitsWarper(0.8), model=model)
    assert found.shape == (2, 12) and (found != 0).all()
    stats = stable.get_stats()
    assert (stats["nan_count"], stats["inf_count"]) == (24, 24) and stats["fallback_count"] == 0


@pytest.mark.parametrize("value", [NAN, INF])
def test_generate_dies_of_each_fault_without_the_processor(value: float):
    model = small_gpt2()
    spoil_logits(model, value)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        generate(model=model)
    assert generate(StableLogitsProcessor(), model=model).shape == (2, 12)


@pytest.mark.parametrize("processors", [[], [StableLogitsProcessor()]], ids=["without", "with"])
def test_generate_takes_a_finite_logit_at_its_word(processors: list[Any]):
    model = small_gpt2()
    spoil_logits(model, 0.0, 150.0, -150.0)
    assert (generate(*processors, model=model) == 1).all()


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}], ids=str
)
def test_generate_never_says_a_bad_word(settings: dict[str, Any]):
    allowed = {7, 11, 30, END}
    bad = [[token] for token in range(VOCABULARY) if token not in allowed]
    model = small_gpt2()
    spoil_logits(model, *WILD)
    found = generate(StableLogitsProcessor(), model=model, bad_words_ids=bad, rounds=16, **settings)
    assert set(found.flatten().tolist()) <= allowed


def test_generate_never_says_a_bad_word_of_several_tokens():
    model = small_gpt2()
    # These two would follow each other again and again.
    spoil_logits(model, 60.0, 60.0)
    found = generate(StableLogitsProcessor(), model=model, bad_words_ids=[[0, 1]], rounds=16)
    assert {0, 1} <= set(found.flatten().tolist())
    assert not ((found[:, :-1] == 0) & (found[:, 1:] == 1)).any()


def test_generate_with_nothing_legal_ends_in_the_fallback():
    model = small_gpt2()
    spoil_logits(model, *[NAN] * VOCABULARY)
    stable = StableLogitsProcessor(fallback_token=END)
    found = generate(stable, model=model, min_new_tokens=0, bad_words_ids=[[3]])
    assert found.tolist() == [[END], [END]] and stable.get_stats()["fallback_count"] == 2


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_p": 0.3}], ids=str)
def test_generate_draws_the_same_with_the_processor_where_nothing_is_wrong(settings: dict[str, Any]):
    drawn = []
    for processors in ([], [StableLogitsProcessor()]):
        model = (torch.manual_seed(1), small_gpt2())[1]
        torch.manual_seed(2)
        drawn.append(generate(*processors, model=model, rounds=8, **settings))
    assert torch.equal(*drawn)
