"""The class of a checkpoint: AutoModelForCausalLM's, or the whole one that config.json names."""

from __future__ import annotations

import families
import pytest
import transformers
from tiny_models import tiny_model

from wanda_ext.checkpoint.architecture import empty_of, model_class, named_class


@pytest.mark.parametrize("kind", families.multimodal_available())
def test_vision_language_models_stay_whole(kind: str) -> None:
    model = families.build_multimodal(kind)
    model.config.architectures = [type(model).__name__]
    empty = empty_of(model.config, None, False)
    assert type(empty) is type(model)
    assert empty.state_dict().keys() == model.state_dict().keys()
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize(
    "names",
    [
        *([], None, ["LlamaForCausalLM"], ["OddForCausalLM"], ["pipeline"], [3]),
        *(["LlamaForSequenceClassification"], ["AutoModel"], ["GPT2LMHeadModel"]),
    ],
)
def test_others_are_causal_language_models(names: object) -> None:
    config = tiny_model("llama").config
    config.architectures = names
    assert model_class(config) is transformers.AutoModelForCausalLM
    assert type(empty_of(config, None, False)).__name__ == "LlamaForCausalLM"


def test_what_is_no_model_is_not_called() -> None:
    config = tiny_model("llama").config
    for name in ("pipeline", "AutoTokenizer", "LlamaConfig", "__file__"):
        config.architectures = [name]
        assert named_class(config) is None
