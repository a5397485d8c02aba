"""Checkpoints under other names, or in other pieces, than the model's modules: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed import assert_same_tensors, in_memory, prune, tensors_of
from tiny_models import LLAMA_LIKE, SPECIAL_TOKENS, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from wanda_ext.checkpoint.conversion import (
    Conversion,
    conversions_of,
    names_apart,
    rules_apart,
)
from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.checkpoint.save import stay_dense
from wanda_ext.files import shards
from wanda_ext.prune.prune import PruneError
from wanda_ext.stream.meta_model import NamesError
from wanda_ext.stream.skeleton import Skeleton

MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SPARSE, "num_experts": 4, "head_dim": 16},
    "deepseek_v3": {
        **SPARSE,
        **MLA,
        "num_key_value_heads": 4,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
}
ONE_EXPERT = {  # as on the Hub
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "gpt_neox": "embed_out.weight",
}


def saved(folder: Path, family: str, **options: Any) -> Path:
    if family in MOE:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**LLAMA_LIKE, **MOE[family]}, **SPECIAL_TOKENS)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = tiny_model(family, torch.bfloat16)
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def names_in_files(folder: Path) -> set[str]:
    return set(tensors_of(folder))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ONE_EXPERT)
def test_the_same_bits_and_names_as_in_memory(family: str, packed: bool, tmp_path: Path) -> None:
    src = saved(tmp_path / "src", family, max_shard_size="60KB")
    assert ONE_EXPERT[family] in names_in_files(src)
    expected = in_memory(src, tmp_path / "memory", packed)
    states = "files" if packed else "memory"
    report = prune(src, tmp_path / "dst", packed=packed, states=states)
    assert_same_tensors(tmp_path / "dst", tmp_path / "memory")
    assert [line.name for line in report.linears] == [line.name for line in expected.linears]
    assert [line.tokens for line in report.linears] == [line.tokens for line in expected.linears]


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox"])
def test_names_of_the_modules_stay_those(family: str, tmp_path: Path) -> None:
    """A checkpoint that was saved as the model has it is written so again, as in memory."""
    src = saved(tmp_path / "src", family, save_original_format=False)
    assert ONE_EXPERT[family] not in names_in_files(src)
    in_memory(src, tmp_path / "memory")
    prune(src, tmp_path / "dst")
    assert_same_tensors(tmp_path / "dst", tmp_path / "memory")
    assert names_in_files(tmp_path / "dst") == names_in_files(src)


@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_run_reads_its_own_files(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = saved(tmp_path / "src", "mixtral")
    prune(src, tmp_path / "whole", packed=packed)

    def full(path: Path, *rest: Any) -> int:
        if path.name == "model.layers.1.safetensors":
            raise OSError(28, "No space left on device")
        return shards.write_shard(path, *rest)

    monkeypatch.setattr("wanda_ext.stream.writer.write_shard", full)
    with pytest.raises(PruneError, match="No space left"):
        prune(src, tmp_path / "dst", packed=packed)
    monkeypatch.undo()
    prune(src, tmp_path / "dst", packed=packed)
    assert_same_tensors(tmp_path / "dst", tmp_path / "whole")


def test_an_expert_that_is_missing_is_told(tmp_path: Path) -> None:
    src = saved(tmp_path / "src", "mixtral")
    file = src / "model.safetensors"
    tensors = load_file(file)
    del tensors[ONE_EXPERT["mixtral"]]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NamesError, match=r"cannot make model.layers.1.mlp.experts.gate_up_proj"):
        prune(src, tmp_path / "dst")


def test_what_lies_in_one_tensor_cannot_go_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in range(2)]
    rule = WeightConverter("model.norms.weight", norms, [Chunk(dim=0)])
    monkeypatch.setattr(
        "wanda_ext.checkpoint.conversion.get_model_conversion_mapping", lambda model: [rule]
    )
    src = saved(tmp_path / "src", "llama")
    file = src / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norms.weight"] = torch.cat([tensors.pop(name) for name in norms])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NamesError, match=r"keeps tensors of several blocks.*--in-memory"):
        prune(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_only_what_changes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = saved(tmp_path / "src", "mixtral")
    skeleton = Skeleton(open_checkpoint(src), None, False)
    model, conversion = skeleton.model, skeleton.conversion
    assert not Conversion(model, names_in_files(src)).unknown
    monkeypatch.setattr(shards.Stored, "read", lambda *_: pytest.fail("read"))
    outside = skeleton.groups_outside(["model.layers"])
    as_it_is = [skeleton.source(group) for group in outside]
    assert {name for one in as_it_is for name in one} == names_in_files(src) - {
        name for name in names_in_files(src) if ".layers." in name
    }
    monkeypatch.undo()
    back: dict[str, torch.Tensor] = {}
    for group in conversion.groups:
        tensors = {name: skeleton.stored[name].read() for name in skeleton.made(group)}
        back |= conversion.saved(group, tensors)
    assert back.keys() == names_in_files(src)
    for name, tensor in tensors_of(src).items():
        assert torch.equal(back[name], tensor), name


def test_packed_linears_are_stored_one_by_one() -> None:
    """sarvam_moe keeps q, k and v in one tensor; what is packed has names of its own."""
    model = families.build("sarvam_moe")
    q = "model.layers.0.self_attn.q_proj"
    found = names_apart(model, [q, "model.layers.0.mlp.up_proj"])
    assert found == {
        q: "model.layers.0.attention.q_proj",
        "model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj",
    }
    assert not hasattr(model, "_weight_conversions")
    assert rules_apart(model, ["model.layers.0.mlp.up_proj"]) is None
    apart = rules_apart(model, [q])
    assert apart is not None and len(apart) == len(conversions_of(model)) - 1


def test_what_would_not_be_read_back_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rule = WeightConverter("q_proj.weight", "q_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(
        "wanda_ext.checkpoint.conversion.get_model_conversion_mapping", lambda *_, **__: [rule]
    )
    reasons = stay_dense(model)
    assert list(reasons) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert "as something else" in reasons["model.layers.0.self_attn.q_proj"]
