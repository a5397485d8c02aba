"""Tiny random-init models of the eight families, and a tokenizer that needs no file."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from wanda_ext.calibration.batches import calibration_batches
from wanda_ext.models.blocks import linears_of
from wanda_ext.runner.walk import Walk

VOCAB = 128
CONTEXT = 64
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "gpt_neox": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_inner": 96,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": CONTEXT,
    },
}
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of the family in eval mode, the same for the same seed.

    Its norm gains are log-normal: with gains of one all input norms are nearly equal, and Wanda's
    masks those of magnitude.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **FAMILIES[family], **SPECIAL_TOKENS)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):  # of a norm
                parameter.copy_(torch.randn_like(parameter).exp())
    return model.to(dtype).eval()


def token_ids(samples: int = 8, length: int = 32, seed: int = 1) -> torch.Tensor:
    """[samples, length] random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (samples, length), generator=generator)


def tiny_tokenizer(bos: bool = False) -> Any:
    """A character tokenizer of VOCAB tokens. bos: it puts one in front of every text."""
    letters = [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        start = {"single": "<s> $A", "special_tokens": [("<s>", vocab["<s>"])]}
        tokenizer.post_processor = processors.TemplateProcessing(**start)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the model, to compare with later."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are no longer bit for bit what weights_of has kept."""
    return [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    ]


def assert_same_masks(model: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor != 0, expected[name] != 0), name


def batches_of_two() -> list[dict[str, torch.Tensor]]:
    return calibration_batches(token_ids(6), batch_size=2)


def padded_batches(lengths=(32, 20, 9, 31, 5, 32), batch_size=2):
    """Left-padded batches with their attention_mask and the position_ids that go with it."""
    ids, mask = token_ids(len(lengths), 32), torch.ones(len(lengths), 32, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : 32 - length], mask[row, : 32 - length] = 2, 0
    rows = {"input_ids": ids, "attention_mask": mask}
    split = [{key: t[i : i + batch_size] for key, t in rows.items()} for i in range(0, 6, 2)]
    return calibration_batches(split)


class Toy(nn.Module):
    """A model whose blocks and whose wiring between them tests choose."""

    def __init__(self, blocks, between=None, order=None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 8)
        self.blocks = nn.ModuleList(blocks)
        self.between = between or (lambda hidden: hidden)
        self.order = order or range(len(blocks))

    def forward(self, input_ids, use_cache=False):
        hidden = self.embedding(input_ids)
        for i in self.order:
            hidden = self.between(self.blocks[i](hidden, {"scale": torch.tensor(i + 1.0)}))
        return hidden


class Block(nn.Module):
    """Calls linear `a`, then those that `calls` picks by how often the block ran."""

    def __init__(self, calls=("b",)) -> None:
        super().__init__()
        self.linears = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
        self.calls = calls
        self.runs = 0

    def forward(self, hidden, options):
        hidden = self.linears["a"](hidden) * options["scale"]
        for name in self.calls[self.runs % len(self.calls)]:
            hidden = hidden + self.linears[name](hidden)
        self.runs += 1
        return hidden


def toy_statistics(model, index=0):
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    walk = Walk(model, blocks, batches_of_two())
    for i in range(index):
        walk.advance(i)
    found = walk.statistics(index, linears_of(model.blocks[index]))
    return walk, {name.removeprefix("linears."): s.tokens for name, s in found.items()}


# --- Calibration text -----------------------------------------------------------------------------

TEXTS = [f"document {i}: " + " ".join(f"word{i * j}" for j in range(40)) for i in range(30)]
WINDOWS = {"nsamples": 6, "seqlen": 32}


def ids_of(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The token ids of all batches."""
    return torch.cat([batch["input_ids"] for batch in batches])
