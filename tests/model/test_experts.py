"""Mixtures of experts: what is adapted in them, and that watching them changes nothing."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from memlaw.core.errors import AdapterError
from memlaw.model.experts import read_unflattened
from memlaw.model.forward import logits_of
from memlaw.model.sites import resolve_sites

_SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (Qwen2MoeConfig, _MANY | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": (Qwen3MoeConfig, _MANY | {"head_dim": 16}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        DeepseekV3Config,
        {
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
        },
    ),
    "opt": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # its body has a decoder
}
IDS = torch.arange(1, 13).reshape(2, 6)


@pytest.fixture
def make():
    """`make("mixtral")`: a random model of that kind."""

    def made(name):
        kind, shape = KINDS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**_SHAPE | shape), dtype=torch.float32)
        return model.requires_grad_(False).eval()

    return made


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_final_hidden_states_are_the_models(make, name):
    model = make(name)
    found = model(input_ids=IDS).logits
    hidden = model.base_model(input_ids=IDS).last_hidden_state
    got = logits_of(model, hidden.flatten(0, 1)).view(found.shape)
    torch.testing.assert_close(got, found)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_every_adapted_module_reads_by_row_and_position(make, name):
    model = make(name)
    before = model(input_ids=IDS).logits
    read_unflattened(model)
    seen = {}
    for site in resolve_sites(model, "all-linear", "all"):
        module = model.get_submodule(site.module)
        module.register_forward_pre_hook(
            lambda _, args, name=site.module: seen.update({name: args[0].shape})
        )
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
    assert seen
    assert {shape[:2] for shape in seen.values()} == {IDS.shape}


def test_routers_are_not_adapted(make):
    names = [site.module for site in resolve_sites(make("qwen2_moe"), "all-linear", "all")]
    assert any("shared_expert.down_proj" in name for name in names)
    assert not any(name.endswith("gate") for name in names)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_fused_experts_are_refused_with_what_there_is(make, name):
    with pytest.raises(AdapterError, match=r"no module 'down_proj'.*attn.*self_attn.q_proj"):
        resolve_sites(make(name), "down_proj", "auto")
