"""What a model goes on to write: a look at it, where perplexity is a measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from wanda_ext.models import context_of, preserved

PROMPTS = ("The capital of France is", "Once upon a time, there was")
TOKENS = 24


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS
) -> list[str]:
    """The likeliest text after each prompt, without the prompt: up to `tokens` tokens.

    It ends where the text does, or the model's context. Model and random states are left as they
    were. Takes one pass over the weights a token. Raises ValueError for a prompt that fills the
    context, and whatever the model's `generate` raises.
    """
    with preserved(model):
        return [_continuation(model, tokenizer, prompt, tokens) for prompt in prompts]


def _continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    read = tokenizer(prompt, return_tensors="pt").to(model.get_input_embeddings().weight.device)
    length, context = read["input_ids"].shape[1], context_of(model)
    room = tokens if context is None else min(tokens, context - length)
    if room <= 0:
        raise ValueError(f"{prompt!r} takes {length} tokens, and the model's context has {context}")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    how: Any = transformers.GenerationConfig  # untyped
    ids = model.generate(
        input_ids=read["input_ids"],
        attention_mask=read["attention_mask"],
        generation_config=how(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if pad is None else pad,
        ),
    )[0]
    before, after = (tokenizer.decode(x, skip_special_tokens=True) for x in (ids[:length], ids))
    return str(after.removeprefix(before))
