"""The demo's model: a small Llama, trained from scratch on text that ships with CPython.

Nothing is downloaded: the text is `pydoc_data.topics`. It is trained as anyone would, with
transformers and torch, and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from wanda_ext.checkpoint import load_pretrained, load_tokenizer
from wanda_ext.files import new_directory


@dataclass(frozen=True)
class DemoSettings:
    """What is trained and how it is pruned. One value of it always gives the same numbers."""

    hidden: int = 160
    intermediate: int = 448
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024
    seqlen: int = 128
    batch: int = 16
    steps: int = 500
    learning_rate: float = 4e-3
    weight_decay: float = 0.3
    dropout: float = 0.1
    nsamples: int = 64
    seed: int = 0


def split_text() -> tuple[str, str]:
    """Training and held-out text; repeated paragraphs are dropped, lest one leak into the other."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    paragraphs = list(dict.fromkeys(text.split("\n\n")))
    cut = len(paragraphs) * 9 // 10
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


def train_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of `vocabulary` tokens."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=vocabulary, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)  # type: ignore[no-untyped-call]


def train(settings: DemoSettings, ids: Tensor) -> Any:
    """A Llama trained from scratch on random windows of ids [tokens]."""
    torch.manual_seed(settings.seed)
    config = transformers.LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.seqlen,
        attention_dropout=settings.dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    progress = tqdm(range(settings.steps), desc="training", unit="step")
    for _ in progress:
        starts = torch.randint(ids.numel() - settings.seqlen, (settings.batch, 1))
        batch = ids[starts + torch.arange(settings.seqlen)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def cached_model(settings: DemoSettings, retrain: bool = False) -> tuple[Any, Any]:
    """The trained model and its tokenizer, from the cache where these settings were trained before.

    The key covers the settings, this file, the text and the libraries' versions; the cache is
    $XDG_CACHE_HOME/wanda_ext, or ~/.cache/wanda_ext.
    """
    text, _ = split_text()
    recipe = [asdict(settings), Path(__file__).read_text(encoding="utf-8"), text]
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__]
    key = hashlib.sha256(json.dumps([recipe, versions]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "wanda_ext" / f"demo-{key}"
    if retrain or not directory.exists():
        tokenizer = train_tokenizer(text, settings.vocabulary)
        with torch.random.fork_rng(devices=[]):
            model = train(settings, torch.tensor(tokenizer(text).input_ids))
        directory.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(directory) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    model, _ = load_pretrained(directory)
    return model, load_tokenizer(directory)


@torch.no_grad()
def scale_channels_(model: Any, seed: int) -> None:
    """Multiplies each norm gain by s = 2^round(N(0,1)/ln 2) and divides the next columns by it.

    Powers of two only move exponents, so every product, and the model's function, stays as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, linears in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            normal = torch.randn(norm.weight.shape, generator=generator)
            scale = torch.exp2(torch.round(normal / math.log(2)))
            norm.weight.mul_(scale)
            for linear in linears:
                linear.weight.div_(scale)
