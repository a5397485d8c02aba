"""What a model goes on to write: its likeliest tokens, and nothing of the model changes."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import CONTEXT, changed, tiny_model, tiny_tokenizer, weights_of

from wanda_ext.quality.continuation import continuations

PROMPTS = ("abc", "What is it")


def by_hand(model, tokenizer, prompt, tokens):
    """The likeliest token after each whole prefix, without a cache."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(tokens):
            following = model(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, following], dim=1)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_is_the_likeliest_text_after_the_prompt(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    found = continuations(model, tokenizer, PROMPTS, 5)
    spaced = [" ".join(prompt) for prompt in PROMPTS]  # as this tokenizer decodes it
    assert [f"{prompt}{text}" for prompt, text in zip(spaced, found, strict=True)] == [
        by_hand(model, tokenizer, prompt, 5) for prompt in PROMPTS
    ]
    assert all(found)


def test_leaves_the_model_and_the_random_numbers_alone():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    before, settings = weights_of(model), model.generation_config.to_dict()
    states = torch.get_rng_state(), random.getstate()
    one = continuations(model, tokenizer)
    assert changed(model, before) == [] and model.training
    assert model.generation_config.to_dict() == settings
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert one == continuations(model, tokenizer)


def test_ends_with_the_context():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (text,) = continuations(model, tokenizer, ["a" * (CONTEXT - 2)], 24)
    assert len(tokenizer(text).input_ids) <= 4  # two tokens, with spaces
    with pytest.raises(ValueError, match=f"takes {CONTEXT} tokens, and the model's context has 64"):
        continuations(model, tokenizer, ["a" * CONTEXT], 24)


def test_ends_with_the_text():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    last = int(model(torch.tensor([[5]])).logits[0, -1].argmax())
    tokenizer.eos_token_id = last
    found = continuations(model, tokenizer, [tokenizer.decode([5])], 24)
    assert [text.strip() for text in found] == [tokenizer.decode([last])]
