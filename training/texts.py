"""How well a language model completes prompts that nothing was learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from language.prompts import Example
from language.task import TextTask
from training.agent import POLICY, Trained
from training.evaluation import Report, interval

# Prompts that are completed at once, and those that are shown.
AT_ONCE, SHOWN = 256, 8


class TextEvaluator:
    """Likeliest completions of held-out prompts, by what they earn."""

    def __init__(self, task: TextTask, *, valid_instances: int, eval_instances: int) -> None:
        """Take the prompts.

        Args:
            task: has them.
            valid_instances: the most of every evaluation during training.
            eval_instances: of the final one.
        """
        prompts = task.prompts
        self._validation, self._test = prompts.validation[:valid_instances], prompts.test[:eval_instances]

    def validate(self, agent: Trained) -> Report:
        """Completions of the validation prompts."""
        return self._report(agent.players[POLICY], self._validation)

    def test(self, agent: Trained) -> Report:
        """Completions of the test prompts."""
        return self._report(agent.players[POLICY], self._test)

    def _report(self, model: Any, examples: Sequence[Example]) -> Report:
        completions = []
        for begin in range(0, len(examples), AT_ONCE):
            completions += model.complete(examples[begin : begin + AT_ONCE])
        rewards = torch.tensor([each.reward for each in completions], device="cpu")
        exact = [each.text.strip() == each.example.answer.strip() for each in completions]
        values = {"reward": float(rewards.mean()), "exact": sum(exact) / len(exact)}
        rows = [
            f"| {_cell(each.example.prompt)} | {_cell(each.text)} | {_cell(each.example.answer)} | {each.reward:.4g} |"
            for each in completions[:SHOWN]
        ]
        table = "\n".join(["| prompt | completion | answer | reward |", "| --- | --- | --- | --- |", *rows])
        summary = (
            f"{len(completions):,} held-out prompts, mean reward {values['reward']:.4g}{interval(rewards)},"
            f" {100 * values['exact']:.1f} % are the answer; {completions[0].example.prompt[-40:]!r} gave"
            f" {completions[0].text[:40]!r}"
        )
        return Report(values, {}, summary, texts={"completions": table})


def _cell(text: str) -> str:
    """A text as a cell of a table."""
    return "`" + text.replace("`", "'").replace("|", "/").replace("\n", " ") + "`"
