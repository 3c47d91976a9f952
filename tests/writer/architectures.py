"""Tiny models of many kinds, and what `write` does with each: docs/models.md has the same table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from words import byte_level

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    # So wide that the head's rows are long enough for a probability near 1.
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 1}
_SLIDING = _GROUPED | {"head_dim": 32, "sliding_window": 8}
_GEMMA = _SLIDING | {"query_pre_attn_scalar": 32}
_OLD = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
_EXPERTS = _GROUPED | {
    "head_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LATENT = _SHAPE | {
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,  # more than the text's
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model, and what `write` does with it.

    Attributes:
        config: a class of Transformers.
        shape: its settings; those of `text_config` for one that also sees.
        what: what is special about it, for the page.
        placement: what is adapted.
        engine: that `auto` takes: `cached` or `plain`.
        module: the end of the first adapted module's name.
        refused: what is said of it instead, before training; a regex.
        vision: settings of the part that sees.
    """

    config: Any
    what: str
    shape: dict[str, Any] = field(default_factory=lambda: _GROUPED)
    placement: str = "down_proj"
    engine: str = "cached"
    module: str = "mlp.down_proj"
    refused: str = ""
    vision: dict[str, Any] | None = None


KINDS = {
    "Llama": Kind(config=tf.LlamaConfig, what="dense"),
    "Qwen3": Kind(
        config=tf.Qwen3Config, what="dense, normed heads", shape=_GROUPED | {"head_dim": 32}
    ),
    "Mistral": Kind(config=tf.MistralConfig, what="sliding window", shape=_SLIDING),
    "Gemma 3": Kind(
        config=tf.Gemma3TextConfig,
        what="sliding window and whole attention",
        shape=_GEMMA,
        placement="all-linear",
        module="self_attn.q_proj",
    ),
    "Gemma 2": Kind(
        config=tf.Gemma2Config,
        what="soft-capped logits and attention",
        shape=_GEMMA | {"final_logit_softcapping": 30.0},
        placement="all-linear",
        module="self_attn.q_proj",
    ),
    "Cohere": Kind(
        config=tf.CohereConfig, what="scaled logits", shape=_GROUPED | {"logit_scale": 0.5}
    ),
    "Granite": Kind(
        config=tf.GraniteConfig,
        what="multipliers everywhere",
        shape=_GROUPED | {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "GPT-2": Kind(config=tf.GPT2Config, what="Conv1D", shape=_OLD, module="mlp.c_proj"),
    "GPT-J": Kind(
        config=tf.GPTJConfig,
        what="attention beside the MLP",
        shape=_OLD | {"rotary_dim": 8},
        module="mlp.fc_out",
    ),
    "GPT-NeoX": Kind(config=tf.GPTNeoXConfig, what="the same", shape=_SHAPE, module="4h_to_h"),
    "Phi": Kind(config=tf.PhiConfig, what="biases, also in the head", shape=_SHAPE, module="fc2"),
    "StableLM": Kind(config=tf.StableLmConfig, what="rotates a part of each head"),
    "OPT": Kind(
        config=tf.OPTConfig,
        what="learnt positions; its MLP isn't a module",
        shape=_SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 64, "init_std": 0.25},
        module="fc2",
    ),
    "Falcon": Kind(
        config=tf.FalconConfig,
        what="one key for all heads",
        shape={k: v for k, v in _SHAPE.items() if k != "intermediate_size"} | {"alibi": False},
        module="4h_to_h",
    ),
    "BLOOM": Kind(
        config=tf.BloomConfig,
        what="ALiBi",
        shape={
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 2,
            "initializer_range": 0.25,
            "tie_word_embeddings": False,
        },
        module="4h_to_h",
    ),
    "MPT": Kind(
        config=tf.MptConfig,
        what="ALiBi",
        shape={
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 2,
            "max_seq_len": 256,
            "initializer_range": 0.25,
            "tie_word_embeddings": False,
        },
        module="ffn.down_proj",
    ),
    "Qwen2-MoE": Kind(
        config=tf.Qwen2MoeConfig,
        what="mixture with a shared expert",
        shape=_EXPERTS | {"shared_expert_intermediate_size": 32},
        module="shared_expert.down_proj",
    ),
    "Mixtral": Kind(
        config=tf.MixtralConfig,
        what="mixture, fused",
        shape=_EXPERTS,
        placement="attn",
        module="self_attn.q_proj",
    ),
    "gpt-oss": Kind(
        config=tf.GptOssConfig,
        what="mixture, fused; attention sinks",
        shape=_EXPERTS | _SLIDING,
        placement="attn",
        module="self_attn.q_proj",
    ),
    "DeepSeek-V3": Kind(
        config=tf.DeepseekV3Config,
        what="mixture; latent attention",
        shape=_LATENT,
        placement="attn",
        module="self_attn.q_a_proj",
    ),
    "MiniMax": Kind(
        config=tf.MiniMaxConfig,
        what="mixture; linear attention, which reads pads",
        shape=_EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
        placement="attn",
        module="self_attn.q_proj",
    ),
    "Qwen3-Next": Kind(
        config=tf.Qwen3NextConfig,
        what="mixture; gated linear attention",
        shape=_EXPERTS
        | {
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        placement="attn",
        module="self_attn.q_proj",
    ),
    "CTRL": Kind(
        config=tf.CTRLConfig,
        what="its MLP has no names",
        shape=_OLD | {"dff": 64},
        module="ffn.2",
    ),
    "Llama 4": Kind(
        config=tf.Llama4TextConfig,
        what="mixture; attention in chunks",
        shape=_EXPERTS
        | {"intermediate_size_mlp": 64, "attention_chunk_size": 8, "interleave_moe_layer_step": 1},
        placement="attn",
        module="self_attn.q_proj",
    ),
    "Mamba": Kind(
        config=tf.MambaConfig,
        what="state space",
        shape={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "time_step_rank": 4,
            "initializer_range": 0.25,
            "tie_word_embeddings": False,
        },
        placement="in_proj",
        module="mixer.in_proj",
    ),
    "Bamba": Kind(
        config=tf.BambaConfig,
        what="hybrid: state space and attention",
        shape=_GROUPED
        | _STATES
        | {"attn_layer_indices": [1], "mamba_chunk_size": 16, "attn_rotary_emb": 8},
        engine="plain",
        module="feed_forward.down_proj",
    ),
    "RecurrentGemma": Kind(
        config=tf.RecurrentGemmaConfig,
        what="hybrid: gated recurrence and sliding attention",
        shape=_GROUPED
        | {
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 8,
            "w_init_variance_scale": 4.0,  # it goes by this, not by `initializer_range`
        },
        module="mlp_block.down_proj",
    ),
    "LFM2": Kind(
        config=tf.Lfm2Config,
        what="hybrid: convolutions and attention",
        shape=_GROUPED
        | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        module="feed_forward.w2",
    ),
    "LLaVA": Kind(
        config=tf.LlavaConfig,
        what="also sees; its text decoder is adapted",
        vision={"model_type": "clip_vision_model"} | _VISION,
        module="language_model.layers.1.mlp.down_proj",
    ),
    "Qwen3-VL": Kind(
        config=tf.Qwen3VLConfig,
        what="also sees; three positions a token",
        shape=_GROUPED
        | {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 10000.0,
            },
        },
        vision={
            "depth": 4,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
        module="language_model.layers.1.mlp.down_proj",
    ),
    "Mixtral, `down_proj`": Kind(
        config=tf.MixtralConfig,
        what="the routed experts are one tensor",
        shape=_EXPERTS,
        refused=r"no module 'down_proj'.*mlp.experts: one tensor for all experts.*--placement attn",
    ),
    "DeepSeek-V3, `down_proj`": Kind(
        config=tf.DeepseekV3Config,
        what="PEFT takes the shared expert's for the routed ones'",
        shape=_LATENT,
        refused=r"shared_experts.down_proj .* could be trained, but not used.*--placement",
    ),
    "Qwen3-Next, `down_proj`": Kind(
        config=tf.Qwen3NextConfig,
        what="the same of its shared expert",
        shape=_EXPERTS
        | {
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
        refused=r"shared_expert.down_proj .* could be trained, but not used.*--placement",
    ),
    "Mamba, `down_proj`": Kind(
        config=tf.MambaConfig,
        what="has none; PEFT refuses its output projection",
        shape={"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
        refused=r"no module 'down_proj'.*mixer.in_proj, mixer.x_proj\.$",
    ),
    "RecurrentGemma, random": Kind(
        config=tf.RecurrentGemmaConfig,
        what="as it is made: its head's rows are too short for any answer",
        shape=_GROUPED | {"block_types": ["recurrent", "attention"]},
        refused=r"can't say .* with p ≥ 0.55: .* so short .*: name a trained model",
    ),
    "BERT": Kind(
        config=tf.BertConfig,
        what="an encoder",
        shape=_SHAPE,
        refused="sees the tokens that it is to predict",
    ),
    "ModernBERT": Kind(
        config=tf.ModernBertConfig,
        what="an encoder",
        shape=_SHAPE,
        refused="is a modernbert, which Transformers has no causal language model for",
    ),
    "T5": Kind(
        config=tf.T5Config,
        what="an encoder with a decoder",
        shape={"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2},
        refused="is a t5: an encoder with a decoder",
    ),
}


def make(name: str, folder: Path) -> Path:
    """Make a random model of that kind, with a tokenizer, in a folder."""
    kind = KINDS[name]
    words = byte_level("plain" if name in ("GPT-2", "BLOOM", "Mamba") else "chat")
    end = words.eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": words.pad_token_id}
    text = kind.shape | ids | {"vocab_size": len(words)}
    if kind.vision is None:
        config = kind.config(**text)
    else:
        text_config = kind.config().text_config.__class__(**text)
        config = kind.config(
            text_config=text_config, vision_config=kind.vision, tie_word_embeddings=False
        )
    torch.manual_seed(0)
    _class_of(config)(config).float().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _class_of(config: Any) -> Callable[[Any], Any]:
    for kinds in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    ):
        if type(config) in kinds:
            return kinds[type(config)]
    raise KeyError(type(config).__name__)
