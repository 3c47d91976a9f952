"""Adapters that PEFT wrote: measured as PEFT would answer, or refused; the base stays as it was."""

import copy
import json

import peft
import pytest
import torch
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memlaw.core.errors import AdapterError
from memlaw.model.formats import loaded_adapter
from memlaw.model.peft_folder import REFUSED

IDS = torch.arange(5, 25)[None]
LAYERS = ["q_proj", "down_proj"]


@pytest.fixture
def model(llama):
    """A model of its own, which adapters may change."""
    found = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return found.requires_grad_(False).eval()


def _saved(model, config, folder, seed=1, **how):
    """Save an adapter of random weights, none of them zero."""
    wrapped = get_peft_model(copy.deepcopy(model), config)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=draws) * 0.1)
    wrapped.save_pretrained(folder, **how)
    return folder


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _as_peft(model, folder):
    return _logits(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval())


KINDS = {
    "LoRA": LoraConfig(target_modules=LAYERS),
    "DoRA": LoraConfig(target_modules=LAYERS, use_dora=True),
    "rsLoRA": LoraConfig(target_modules=LAYERS, use_rslora=True, rank_pattern={"q_proj": 3}),
    "PiSSA": LoraConfig(target_modules=LAYERS, init_lora_weights="pissa"),
    "LoRA on the embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "LoRA on the head": LoraConfig(target_modules=["lm_head", "q_proj"]),
    "LoRA, the head trained whole": LoraConfig(target_modules=LAYERS, modules_to_save=["lm_head"]),
    "LoRA, norms trained whole": LoraConfig(target_modules=LAYERS, modules_to_save=["norm"]),
    "LoRA, some tokens trained": LoraConfig(target_modules=LAYERS, trainable_token_indices=[5, 6]),
    "LoRA in one layer": LoraConfig(target_modules=LAYERS, layers_to_transform=[1]),
    "IA3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(target_modules=LAYERS),
    "LoKr": peft.LoKrConfig(target_modules=LAYERS),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"]),
    "norm tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "FourierFT": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=20),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_answers_as_peft_and_leaves_the_base_as_it_was(model, tmp_path, kind):
    config = copy.deepcopy(KINDS[kind])
    config.task_type = "CAUSAL_LM"
    folder = _saved(model, config, tmp_path / "adapter")
    if kind == "VeRA" and version.parse(peft.__version__) < version.parse("0.19"):
        with pytest.raises(AdapterError, match="vera_A"), loaded_adapter(folder, model):
            pytest.fail("this PEFT leaves its projections out")
        return
    bare, expected = _logits(model), _as_peft(model, folder)
    assert not torch.allclose(expected, bare, atol=1e-2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):
        with loaded_adapter(folder, model) as adapted:
            torch.testing.assert_close(_logits(adapted), expected, rtol=1e-5, atol=1e-5)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("more", [3, -2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # a head of its own, and the embedding's
def test_an_adapter_of_another_vocabulary_is_loaded_onto_a_model_of_that_size(
    make_model, tmp_path, name, more
):
    model = AutoModelForCausalLM.from_pretrained(make_model(name), dtype=torch.float32).eval()
    bare, size = _logits(model), model.config.vocab_size
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(size + more, mean_resizing=False)
    target = "down_proj" if name == "llama" else "c_proj"
    config = LoraConfig(target_modules=[target], task_type="CAUSAL_LM")
    folder = _saved(larger, config, tmp_path / "adapter", save_embedding_layers=True)
    expected = _as_peft(larger, folder)
    with loaded_adapter(folder, model) as adapted:
        assert adapted.get_input_embeddings().weight.shape[0] == size + more
        torch.testing.assert_close(_logits(adapted), expected, rtol=1e-5, atol=1e-5)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == size
    assert torch.equal(_logits(model), bare)
    if name == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight


def test_a_vocabulary_that_is_not_complete_is_refused(model, tmp_path):
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    config = LoraConfig(target_modules=LAYERS, task_type="CAUSAL_LM")
    folder = _saved(larger, config, tmp_path / "adapter", save_embedding_layers=True)
    _rewrite(folder, lambda w: {k: v for k, v in w.items() if "lm_head" not in k})
    with (
        pytest.raises(AdapterError, match=r"another vocabulary .* 274 rows of model.embed_tokens"),
        loaded_adapter(folder, model),
    ):
        pass


def _rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def _renamed(old, new):
    return lambda weights: {key.replace(old, new): value for key, value in weights.items()}


WRONG_KEYS = {
    "another name of the decoder": _renamed("model.model.layers", "model.model.text_model.layers"),
    "names of a compiled model": _renamed("model.model.", "model._orig_mod.model."),
    "no prefix": _renamed("base_model.model.", ""),
    "half of the layers missing": lambda w: {k: v for k, v in w.items() if "layers.0" not in k},
    "one too many": lambda w: w | {"base_model.model.vision.lora_A.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_weights_that_find_no_place_are_named(model, tmp_path, case):
    config = LoraConfig(target_modules=LAYERS, task_type="CAUSAL_LM")
    folder = _saved(model, config, tmp_path / "adapter")
    _rewrite(folder, WRONG_KEYS[case])
    bare = _logits(model)
    with pytest.raises(AdapterError) as caught, loaded_adapter(folder, model):
        pass
    assert "lora_A" in str(caught.value)
    assert "--model" in str(caught.value)
    assert torch.equal(_logits(model), bare)


VIRTUAL = {
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_refused_by_name(model, tmp_path, kind):
    config = VIRTUAL[kind](task_type="CAUSAL_LM", num_virtual_tokens=2)
    folder = _saved(model, config, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=REFUSED[kind].split()[0]), loaded_adapter(folder, model):
        pass


def test_every_refused_kind_is_one_of_pefts():
    assert {kind for kind in REFUSED if kind in peft.PeftType.__members__} >= set(VIRTUAL)
    assert set(REFUSED) - set(peft.PeftType.__members__) <= {"CARTRIDGE", "SHADOW"}


def test_a_folder_of_several_adapters_names_them(model, tmp_path):
    config = LoraConfig(target_modules=LAYERS, task_type="CAUSAL_LM")
    for name in ("checkpoint-10", "checkpoint-20"):
        _saved(model, config, tmp_path / name)
    with (
        pytest.raises(AdapterError, match=r"checkpoint-10, .*checkpoint-20"),
        loaded_adapter(tmp_path, model),
    ):
        pass


def test_a_whole_model_is_no_adapter(llama, model):
    with (
        pytest.raises(AdapterError, match="whole model; name it with --model"),
        loaded_adapter(llama, model),
    ):
        pass


def test_an_adapter_of_this_package_is_loaded_whole_or_not_at_all(llama, model, tmp_path):
    from memlaw.model.adapter import Adapter
    from memlaw.model.formats import save_adapter
    from memlaw.model.sites import resolve_sites

    adapter = Adapter(resolve_sites(model, "mlp", (0, 1)), rank=2, seed=0)
    save_adapter(adapter, tmp_path, base_path=str(llama), base_sha256="0")
    path = tmp_path / "memlaw_adapter.json"
    content = json.loads(path.read_text())
    content["sites"] = content["sites"][:1]
    path.write_text(json.dumps(content))
    with (
        pytest.raises(AdapterError, match="not those that its settings name"),
        loaded_adapter(tmp_path, model),
    ):
        pass
