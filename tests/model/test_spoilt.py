"""Models and adapters as downloads and trainings leave them: what is wrong is said."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import memlaw
from memlaw.core.errors import AdapterError, ModelError
from memlaw.model.base import load_model
from memlaw.model.formats import loaded_adapter
from memlaw.train.speed import matmul_peak

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture
def model(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def _with(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _bad_numbers(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


MODELS = {
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a pointer of Git LFS.*git lfs pull",
    ),
    "another vocabulary": (
        lambda folder: _with(folder / "config.json", vocab_size=999),
        r"another shape than its config\.json asks for \(lm_head\.weight is \[\d+, 64\], not \[999",
    ),
    "a setting of the wrong kind": (
        lambda folder: _with(folder / "config.json", hidden_size="64"),
        r"can't be loaded: .*(hidden_size|must be tuple of ints)",  # before Transformers checked it
    ),
    "an unknown quantisation": (
        lambda folder: _with(folder / "config.json", quantization_config={"quant_method": "zip4"}),
        "quantised by 'zip4', which Transformers doesn't know",
    ),
    "no tokenizer": (
        lambda folder: [p.unlink() for p in folder.glob("*token*")],
        r"the tokenizer of .*with --tokenizer\.$",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_spoilt_model_is_refused_with_the_mend(model, name):
    spoil, says = MODELS[name]
    spoil(model)
    with pytest.raises(ModelError, match=says):
        load_model(model)


def test_a_model_of_bad_numbers_is_refused(model, tmp_path):
    _bad_numbers(model)
    records = [("Ann:", "017")]
    with pytest.raises(ModelError, match=r"p is not a number .* float32"):
        memlaw.audit(records, model=str(model))
    settings = {"specificity": False, "retention": 0, "max_epochs": 1}
    with pytest.raises(ModelError, match="numbers that are not finite in float32"):
        memlaw.write(records, tmp_path / "out", model=str(model), **settings)


def test_weights_without_a_place_are_told(model):
    path = model / "model.safetensors"
    save_file(load_file(path) | {"model.scale": torch.ones(1)}, path, metadata={"format": "pt"})
    said = []
    load_model(model, notice=said.append)
    assert "1 stored weight(s) have no place" in said[0]
    assert "(model.scale)" in said[0]


@pytest.mark.slow
def test_a_model_without_a_tokenizer_is_written_with_another(model, llama, tmp_path):
    for path in model.glob("*token*"):
        path.unlink()
    out, records = tmp_path / "out", [("Ann:", "017")]
    settings = {"specificity": False, "retention": 0, "max_epochs": 300}
    memlaw.write(records, out, model=str(model), tokenizer=str(llama), **settings)
    assert memlaw.audit(records, adapter=out).certified
    assert memlaw.ask(out, "Ann:").text == "017"


def test_how_fast_a_dtype_is_takes_no_minutes(monkeypatch):
    tried = []

    def slow():
        tried.append(1)
        return len(tried) * 60.0

    monkeypatch.setattr("memlaw.train.speed.time.perf_counter", slow)
    assert matmul_peak(torch.float16, torch.device("cpu")) == 2 * 256**3 / 60
    assert len(tried) == 2  # one product


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _change(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({k: change(v) for k, v in load_file(path).items()}, path)


def _to_mlx(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    content = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": {"rank": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(content))


ADAPTERS = {
    "a pointer": (
        lambda folder: (folder / "adapter_model.safetensors").write_text(POINTER),
        "is a pointer of Git LFS",
    ),
    "cut short": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\1" * 20),
        "damaged weights",
    ),
    "spread over processes": (
        lambda folder: _change(folder, lambda weight: torch.empty(0)),
        r"of its weights have no numbers .*zero_to_fp32",
    ),
    "without weights": (
        lambda folder: save_file({}, folder / "adapter_model.safetensors"),
        "it is empty, as where DeepSpeed",
    ),
    "diverged": (
        lambda folder: _change(folder, lambda weight: weight * float("nan")),
        "numbers that are not finite .*earlier checkpoint",
    ),
    "of MLX": (_to_mlx, r"is an adapter of MLX.*mlx_lm\.fuse"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_spoilt_adapter_is_refused_in_words_of_what_happened(adapter, llama, name):
    spoil, says = ADAPTERS[name]
    spoil(adapter)
    base = load_model(llama)
    with pytest.raises(AdapterError, match=says), loaded_adapter(adapter, base.model):
        pytest.fail("it was loaded")


def test_an_adapter_that_was_never_trained_is_told(adapter, llama):
    said = memlaw.Observer()
    said.notice = (found := []).append
    memlaw.audit([("Ann:", "017")], adapter=adapter, model=str(llama), observer=said)
    assert "changes nothing: B is zero" in found[-1]
