"""What tests about language models share: one too small to say anything, and what makes its logits go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, END = 40, 39


def small_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, by the seed."""
    settings: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END),
        **changes,
    }
    return GPT2LMHeadModel(GPT2Config(**settings)).eval()


def spoil_logits(model: nn.Module, *values: float) -> Callable[[], None]:
    """Let the first tokens of every row have these logits, from now on; what is returned takes that back."""

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., : len(values)] = output.new_tensor(values)
        return output

    handle = model.get_output_embeddings().register_forward_hook(hook)  # type: ignore[operator]
    return handle.remove


WILD = (math.nan, math.inf, 150.0, -150.0)
