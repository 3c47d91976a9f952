"""How far down a saved adapter reaches; and that what is below it is run once, bit for bit."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memlaw.data.texts import unseen_text
from memlaw.measure.damage import measure_damage
from memlaw.model.adapter import Adapter
from memlaw.model.formats import save_adapter
from memlaw.model.reach import lowest_layer
from memlaw.model.sites import decoder_layers, resolve_sites


@pytest.fixture(scope="module")
def model(llama):
    """A frozen tiny model of three layers."""
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


def _adapter(model, placement, layers):
    adapter = Adapter(resolve_sites(model, placement, layers), rank=2, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for b in adapter.b:
            b.normal_(std=0.3)
    return adapter


@pytest.mark.parametrize("placement", ["down_proj", "attn", "mlp"])  # PEFT's format, and our own
@pytest.mark.parametrize("layers", [(2,), (1, 2), (0, 2)])
def test_it_is_the_lowest_layer_with_weights(model, tmp_path, placement, layers):
    save_adapter(_adapter(model, placement, layers), tmp_path, base_path="", base_sha256="")
    assert lowest_layer(tmp_path, model) == layers[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_whatever_does_more_than_add_may_reach_anywhere(llama, tmp_path, settings):
    fresh = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    usual = {"target_modules": ["layers.2.mlp.down_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(fresh, LoraConfig(**usual | settings)).save_pretrained(tmp_path)
    assert lowest_layer(tmp_path, AutoModelForCausalLM.from_pretrained(llama)) == 0


def test_what_a_run_says_of_itself_does_not_count(model, tmp_path):
    save_adapter(_adapter(model, "down_proj", (0,)), tmp_path, base_path="", base_sha256="")
    sites = [{"module": "model.layers.2.mlp.down_proj", "layer": 2}]
    (tmp_path / "run.json").write_text(json.dumps({"adapter": {"sites": sites}}))
    assert lowest_layer(tmp_path, model) == 0


@pytest.mark.parametrize("content", [b"", b"{}"])
def test_a_damaged_folder_is_no_reason_to_skip_layers(model, tmp_path, content):
    save_adapter(_adapter(model, "down_proj", (2,)), tmp_path, base_path="", base_sha256="")
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert lowest_layer(tmp_path, model) == 0
    assert lowest_layer(tmp_path / "nowhere", model) == 0


def test_layers_that_share_a_module_are_all_reached(llama, tmp_path):
    shared = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    save_adapter(_adapter(shared, "down_proj", (2,)), tmp_path, base_path="", base_sha256="")
    layers = decoder_layers(shared)[1]
    layers[2].mlp = layers[0].mlp
    assert lowest_layer(tmp_path, shared) == 0


def test_damage_is_the_same_where_lower_layers_run_once(model):
    text, name = unseen_text()
    ids = torch.arange(4 * 16).view(4, 16)
    adapter = _adapter(model, "down_proj", (2,))
    layers = decoder_layers(model)[1]
    runs = []

    def measured(first_layer):
        hook = layers[0].mlp.register_forward_hook(lambda *_: runs.append(first_layer))
        try:
            return measure_damage(
                model,
                lambda: adapter.attached(model),
                ids,
                text_name=name,
                text=text,
                first_layer=first_layer,
            )
        finally:
            hook.remove()

    assert measured(2) == measured(0)
    assert measured(0).kl_nats > 0
    assert runs.count(2) == 1
    assert runs.count(0) == 4
