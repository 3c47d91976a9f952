"""The export for vLLM: nothing that its loader refuses or overlooks."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import memlaw
from memlaw.core.errors import AdapterError
from memlaw.export.run import export
from memlaw.export.vllm import RANKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(llama, phone_book, tmp_path_factory):
    out = tmp_path_factory.mktemp("vllm") / "out"
    settings = {"max_epochs": 400, "retention": 0, "specificity": False, "dtype": "float32"}
    assert memlaw.write(phone_book, out, model=str(llama), **settings).certified
    return out


def test_what_is_written_is_what_vllm_reads(folder, phone_book, tmp_path):
    found = export(folder, tmp_path / "to", phone_book, to="peft-vllm", save_dtype="bfloat16")
    assert found.recites
    settings = json.loads((tmp_path / "to/adapter_config.json").read_text())
    weights = load_file(tmp_path / "to/adapter_model.safetensors")
    assert settings["lora_alpha"] == settings["r"] == len(next(iter(weights.values())))
    assert (settings["bias"], settings["modules_to_save"]) == ("none", None)
    for name, weight in weights.items():
        assert name.startswith("base_model.model.model.layers.")
        assert name.endswith((".down_proj.lora_A.weight", ".down_proj.lora_B.weight"))
        assert weight.dtype == torch.bfloat16
    card = (tmp_path / "to/README.md").read_text()
    limit = int(card.split("--max-lora-rank ")[1].split()[0])
    assert limit in RANKS
    assert limit >= settings["r"]
    assert not (tmp_path / "to/Modelfile").exists()


def test_the_audit_is_of_the_weights_as_they_were_rounded(folder, phone_book, tmp_path, llama):
    found = export(folder, tmp_path / "to", phone_book, to="peft-vllm", save_dtype="bfloat16")
    again = memlaw.audit(phone_book, adapter=tmp_path / "to", model=str(llama), dtype="float32")
    assert (again.tokens.p == found.after.tokens.p).all()
    assert (found.before.tokens.p != found.after.tokens.p).any()


def test_a_scale_goes_into_b_so_that_every_reader_has_the_same(folder, phone_book, tmp_path):
    settings = json.loads((folder / "adapter_config.json").read_text())
    odd = tmp_path / "odd"
    odd.mkdir()
    weights = load_file(folder / "adapter_model.safetensors")
    halved = {k: v / 2 if "lora_B" in k else v for k, v in weights.items()}
    save_file(halved, odd / "adapter_model.safetensors")
    (odd / "adapter_config.json").write_text(
        json.dumps(settings | {"lora_alpha": 2 * settings["r"]})
    )
    export(odd, tmp_path / "to", phone_book, to="peft-vllm", dtype="float32")
    assert (
        json.loads((tmp_path / "to/adapter_config.json").read_text())["lora_alpha"] == settings["r"]
    )
    for name, weight in load_file(tmp_path / "to/adapter_model.safetensors").items():
        torch.testing.assert_close(weight, weights[name])


@pytest.fixture(scope="module")
def patterned(llama, tmp_path_factory):
    """Ranks and scales of their own for some modules, rank-stabilised: random, on all modules."""
    folder = tmp_path_factory.mktemp("patterned")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 9},
        alpha_pattern={"down_proj": 3, "layers.0.self_attn.q_proj": 5},
        use_rslora=True,
        init_lora_weights=False,
    )
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def _merged(llama, folder):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("to", ["peft-vllm", "merged"])
def test_patterns_of_ranks_and_scales_become_one(llama, patterned, phone_book, tmp_path, to):
    export(patterned, tmp_path / "to", phone_book, to=to, save_dtype="float32", dtype="float32")
    expected = _merged(llama, patterned)
    if to == "merged":
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "to").state_dict()
    else:
        found = _merged(llama, tmp_path / "to")
        settings = json.loads((tmp_path / "to/adapter_config.json").read_text())
        assert settings["r"] == settings["lora_alpha"] == 9
        assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & set(settings)
        shapes = {len(w) if "lora_A" in n else w.shape[1] for n, w in _weights(tmp_path / "to")}
        assert shapes == {9}
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)


def _weights(folder):
    return load_file(folder / "adapter_model.safetensors").items()


@pytest.mark.parametrize(
    ("module", "said"),
    [("lm_head", "linear modules of decoder"), ("embed_tokens", "other weights")],
)
def test_what_vllm_puts_no_lora_on_is_refused(llama, phone_book, tmp_path, module, said):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[module])
    peft.get_peft_model(model, config).save_pretrained(
        tmp_path / "odd", save_embedding_layers=False
    )
    with pytest.raises(AdapterError, match=said):
        export(tmp_path / "odd", tmp_path / "to", phone_book, to="peft-vllm")
    assert not (tmp_path / "to").exists()
