"""Tiny configurations of the decoder families of transformers, one row each.

A row is the model type, and what its config says beside (or, with "=", instead of) the COMMON
sizes. Many families differ only by one number that matters (a sliding window, a shared cache), so
the rows set those.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_shared_experts": 1}
MOE |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MLA |= {"v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64}
SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 1,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
MAMBA |= {"mamba_chunk_size": 8, "mamba_d_conv": 4}
BART = {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
BART |= {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", WINDOW),
    "ministral": ("ministral", MIXED),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": ("qwen2", {**MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {}),
    "stablelm": ("stablelm", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "granite": ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", MIXED),
    "gemma3": ("gemma3_text", MIXED),
    "gemma3n": (
        "gemma3n_text",
        {
            **SHARED_KV,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    "gemma4": ("gemma4_text", {**SHARED_KV, "global_head_dim": 8}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", MIXED),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "exaone4": ("exaone4", MIXED),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "helium": ("helium", {}),
    "nemotron": ("nemotron", {}),
    "starcoder2": ("starcoder2", {}),
    "ernie4_5": ("ernie4_5", {}),
    "diffllama": ("diffllama", {}),
    "minicpm3": ("minicpm3", MLA),
    "modernbert": (
        "modernbert-decoder",
        {"local_attention": 8, "layer_types": MIXED["layer_types"]},
    ),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt projected": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4}
        | {"window_size": 8, "num_hidden_layers": 4},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "openai-gpt": ("openai-gpt", GPT2),
    "ctrl": ("ctrl", {**GPT2, "dff": 48}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "falcon": ("falcon", {"=": {"alibi": True, "multi_query": True}}),
    "falcon new": ("falcon", {"=": {"num_kv_heads": 2, "new_decoder_architecture": True}}),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4}),
    "codegen": ("codegen", {**GPT2, "rotary_dim": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "biogpt": ("biogpt", {}),
    "xglm": ("xglm", {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48}),
    "bart": ("bart", {"=": {**BART, "num_hidden_layers": 1}}),
    "longcat_flash": (
        "longcat_flash",
        {**MOE, **MLA, "num_layers": 2, "num_hidden_layers": 4, "moe_topk": 2}
        | {"expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "zero_expert_num": 1},
    ),
    "mixtral": ("mixtral", MOE),
    "qwen2_moe": ("qwen2_moe", MOE),
    "qwen3_moe": ("qwen3_moe", MOE),
    "olmoe": ("olmoe", MOE),
    "deepseek_v2": ("deepseek_v2", {**MOE, **MLA}),
    "deepseek_v3": ("deepseek_v3", {**MOE, **MLA}),
    "gpt_oss": ("gpt_oss", {**MOE, **MIXED}),
    "llama4": (
        "llama4_text",
        {**MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
        | {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0, 1]},
    ),
    "phimoe": ("phimoe", MOE),
    "glm4_moe": ("glm4_moe", MOE),
    "granitemoe": ("granitemoe", MOE),
    "ernie4_5_moe": ("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2}),
    "aria": ("aria_text", {**MOE, "moe_num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "minimax": ("minimax", {**MOE, "block_size": 8}),
    "sarvam_moe": ("sarvam_moe", MOE),  # its files hold q, k and v as one
    "jamba": (
        "jamba",
        {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
        | {"expert_layer_period": 2, "expert_layer_offset": 1}
        | {"mamba_dt_rank": 4, "mamba_d_state": 8},
    ),
    "nemotron_h": (
        "nemotron_h",
        {**MOE, "num_hidden_layers": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1}
        | {"ssm_state_size": 8, "chunk_size": 8, "moe_shared_expert_intermediate_size": 24}
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    ),
    "jetmoe": ("jetmoe", {**MOE, "kv_channels": 8}),
    "qwen3_next": ("qwen3_next", {**MOE, **LINEAR_ATTENTION}),
    "qwen3_5": ("qwen3_5_text", LINEAR_ATTENTION),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}),
    "zamba2": (
        "zamba2",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1}
        | {"layer_types": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_headdim": 8}
        | {"mamba_ngroups": 1, "mamba_d_state": 8, "chunk_size": 8, "adapter_rank": 4}
        | {"hybrid_layer_ids": [1, 3], "use_shared_attention_adapter": False},
    ),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}
        | {"expand": 2},
    ),
    "recurrent_gemma": ("recurrent_gemma", {"attention_window_size": 8, "lru_width": 32}),
    "rwkv": ("rwkv", {"num_hidden_layers": 4, "attention_hidden_size": 32, "rescale_every": 2}),
}


BROKEN_IN_5_0 = {
    "phimoe": "two of its own experts implementations differ by 0.08 in the logits there",
    "zamba2": "transformers 5.0.0 refuses its own way of sharing weights",
}


def available() -> list[str]:
    """The rows whose family the installed transformers has."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    broken = BROKEN_IN_5_0 if transformers.__version__.startswith("5.0.") else {}
    return [row for row, (kind, _) in ROWS.items() if kind in known and row not in broken]


def build(row: str, attention: str = "sdpa") -> Any:
    """A model of that row in eval mode, or None where it does not have this attention.

    Its norms' gains are spread, so that the norms of its inputs are.
    """
    kind, own = ROWS[row]
    torch.manual_seed(0)
    settings = {**COMMON, **own}
    if "=" in own:
        settings = {key: v for key, v in COMMON.items() if key not in ("head_dim",)} | own["="]
    config = AutoConfig.for_model(kind, **settings)
    kind_of_model = AutoModelForCausalLM._model_mapping[type(config)]
    if attention == "sdpa" and not kind_of_model._supports_sdpa:
        return None
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):  # of a norm
                parameter.copy_(torch.randn_like(parameter).mul(0.5).exp())
    return model.eval()


# --- Vision and language --------------------------------------------------------------------------

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
QWEN_VISION = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
QWEN_VISION |= {"intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
QWEN_VISION |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
PARTIAL = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # class, vision, text
    "llava": ("LlavaForConditionalGeneration", CLIP, {}),
    "llava_next": ("LlavaNextForConditionalGeneration", CLIP, {}),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        SIGLIP,
        {"model_type": "qwen2"},
    ),
    "gemma3": ("Gemma3ForConditionalGeneration", VISION, {**WINDOW, "model_type": "gemma3_text"}),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {**SIGLIP, "vocab_size": 128, "projection_dim": 32},
        {"model_type": "gemma"},
    ),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", QWEN_VISION, MROPE),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", QWEN_VISION, MROPE),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", QWEN_VISION, MROPE),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        QWEN_VISION,
        {**LINEAR_ATTENTION, **PARTIAL},
    ),
    "glm4v": ("Glm4vForConditionalGeneration", QWEN_VISION, MROPE),
    "idefics3": ("Idefics3ForConditionalGeneration", VISION, {"model_type": "llama"}),
    "smolvlm": ("SmolVLMForConditionalGeneration", VISION, {"model_type": "llama"}),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {**VISION, "model_type": "pixtral", "head_dim": 8},
        {"model_type": "mistral"},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {**VISION, "image_size": [16, 16], "patch_size": [8, 8], "model_type": "internvl_vision"},
        {"model_type": "qwen2"},
    ),
    "aya_vision": (
        "AyaVisionForConditionalGeneration",
        SIGLIP,
        {**MIXED, "model_type": "cohere2"},
    ),
}


def multimodal_available() -> list[str]:
    """The kinds of MULTIMODAL that the installed transformers has."""
    return [kind for kind, (name, _, _) in MULTIMODAL.items() if hasattr(transformers, name)]


def build_multimodal(kind: str) -> Any:
    """A wrapper whose vision tower has as many layers as its text decoder, in eval mode."""
    name, vision, text = MULTIMODAL[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vision_config=vision,
        text_config={**COMMON, **text},
        image_token_id=127,
        image_token_index=127,
        projection_dim=32,
    )
    return getattr(transformers, name)(config).eval()
