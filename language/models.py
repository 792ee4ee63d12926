"""Causal language models and their tokenisers: of a folder or a hub, or small ones that know nothing yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from config import ConfigError
from language.packages import import_transformers
from language.prompts import Example
from settings.language import LanguageSettings

PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"


class Language(NamedTuple):
    """A model, and how texts become its tokens."""

    model: nn.Module
    tokenizer: Any


def make_language(settings: LanguageSettings, examples: Sequence[Example]) -> Language:
    """The model and tokeniser that the section `language` describes, on PyTorch's default device.

    Args:
        settings: names a folder or a hub's model, or the sizes of a new one.
        examples: whose characters are the tokens of a new one.

    Raises:
        UserError: there is no such model, or it cannot hold prompts and answers.
    """
    language = _loaded(settings.model) if settings.model else _fresh(settings, examples)
    language.model.eval()
    prompts = [example.prompt for example in examples]
    lengths = [len(ids) for ids in language.tokenizer(prompts)["input_ids"]]
    if not all(lengths):
        silent = prompts[lengths.index(0)]
        raise ConfigError(f"the prompt {silent[:60]!r} has no token in the model's vocabulary; leave it out")
    longest = max(lengths)
    room = getattr(language.model.config, "max_position_embeddings", None)
    if room is not None and longest + settings.most_tokens > room:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and language.most_tokens is {settings.most_tokens}, but the model"
            f" has room for {room}; give shorter prompts, or fewer tokens"
        )
    if settings.model and next(language.model.parameters()).device.type != "meta":
        _require_generation(language, prompts)
    return language


def _fresh(settings: LanguageSettings, examples: Sequence[Example]) -> Language:
    """A GPT-2 with random weights and a token for each character."""
    transformers = import_transformers()
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted({character for example in examples for character in example.prompt + example.answer})
    vocabulary = {token: index for index, token in enumerate([PAD, END, UNKNOWN, *characters])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    plain.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left"
    )
    longest = max(len(example.prompt) for example in examples)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=longest + settings.most_tokens,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        bos_token_id=vocabulary[END],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    return Language(transformers.GPT2LMHeadModel(config), tokenizer)


def _loaded(name: str) -> Language:
    """A causal model of a folder or a hub. Code that comes with it is never run.

    Raises:
        ConfigError: there is none, it is damaged, or it cannot be learnt from here.
    """
    transformers = import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if "/" in str(getattr(config, "_attn_implementation", "")):
            raise ConfigError("its configuration asks for code of a hub")
        maker, missing = transformers.AutoModelForCausalLM, set[str]()
        if torch.get_default_device().type == "meta":
            # Sizes alone are asked for.
            model = maker.from_config(config, dtype=torch.float32, trust_remote_code=False)
        else:
            model, info = maker.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
            missing = set(info["missing_keys"])
            if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
                raise ConfigError("its weights are not finite")
    # The readers of a dozen formats raise whatever they like about what a folder holds.
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"language.model is {name!r}, which cannot be loaded ({cause}); give a folder with a causal model in"
            " safetensors, as save_pretrained writes it, or a name on the hub"
        ) from error
    rows = model.get_input_embeddings().weight.shape[0]
    problem = None
    if missing:
        problem = f"lacks weights ({min(missing)})"
    elif len(tokenizer) > rows:
        problem = f"knows {rows:,} tokens, and its tokeniser {len(tokenizer):,}"
    elif tokenizer.eos_token_id is None:
        problem = "has a tokeniser without an end token, so that answers would never end"
    if problem is not None:
        raise ConfigError(f"language.model {name!r} {problem}; give another one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Language(model, tokenizer)


def _require_generation(language: Language, prompts: list[str]) -> None:
    """Check that the model gives logits, and keeps what it has computed for the tokens to come.

    Raises:
        ConfigError: it does not.
    """
    encoded = language.tokenizer(prompts[:1], return_tensors="pt")
    refusal = (
        f"language.model is a {type(language.model).__name__}, which does not go on with a text token by token from"
        " what it keeps; give a causal model with a cache"
    )
    try:
        with torch.no_grad():
            output = language.model(input_ids=encoded["input_ids"], use_cache=True)
    # Models of other kinds raise whatever they like; what it was stands in the message.
    except Exception as error:
        raise ConfigError(f"{refusal} ({' '.join(str(error).split())[:200] or type(error).__name__})") from error
    if "logits" not in output or not {"cache", "past_key_values"} & set(output):
        raise ConfigError(refusal)
