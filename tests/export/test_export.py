"""Exports: written, read back, and audited in the form in which others run them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import AdapterError, ConfigError, OutputError
from memlaw.export.gguf_files import TensorNames, read_adapter, write_adapter, write_model
from memlaw.export.lora import LoraFactors, lora_factors
from memlaw.export.run import export
from memlaw.model.gguf import unpack

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def write_gguf(folder, path):
    """A tiny Llama's GGUF file, as llama.cpp's converter would have made it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words, config = AutoTokenizer.from_pretrained(folder), model.config
    names = TensorNames(config)
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = words.convert_ids_to_tokens(range(len(words)))
    special = {*words.all_special_tokens, "<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_bos_token_id(words.eos_token_id)
    writer.add_pad_token_id(words.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(words.chat_template)
    for name, weight in model.state_dict().items():
        own = names._map.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(own, np.ascontiguousarray(names.reordered(own, weight).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(llama, tmp_path_factory):
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(base, phone_book, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    settings = {"max_epochs": 400, "retention": 0, "specificity": False, "dtype": "float32"}
    assert memlaw.write(phone_book, out, model=str(base), **settings).certified
    return out


@pytest.fixture(scope="module")
def wide(llama, tmp_path_factory):
    """A random LoRA on every kind of module, with a scale that isn't 1."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def _merged_by_peft(llama, folder):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("to", ["merged", "gguf", "gguf-lora"])
def test_an_export_recites_as_it_is_read_back(folder, phone_book, tmp_path, to):
    found = export(folder, tmp_path / "to", phone_book, to=to)
    assert found.before.certified
    assert found.after.certified
    assert found.recites
    lowest = [min(r.min_p for r in audit.records) for audit in (found.before, found.after)]
    assert lowest[0] == pytest.approx(lowest[1], abs=0.05)
    written = {path.name for path in (tmp_path / "to").iterdir()}
    wanted = {"merged": "model.safetensors", "gguf": "model.gguf", "gguf-lora": "adapter.gguf"}[to]
    assert {wanted, "Modelfile"} <= written
    text = (tmp_path / "to/Modelfile").read_text()
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_merged_folder_is_a_model_like_any_other(folder, phone_book, tmp_path):
    export(folder, tmp_path / "to", phone_book, to="merged", save_dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    assert model.dtype == torch.bfloat16
    assert memlaw.audit(phone_book, model=str(tmp_path / "to")).n_recalled >= 3


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_gguf_weights_are_pefts_merged_ones_and_all_others_stay(llama, base, wide, tmp_path, kind):
    config = AutoModelForCausalLM.from_pretrained(llama).config
    factors = lora_factors(wide)
    path = tmp_path / "model.gguf"
    write_model(base, factors, TensorNames(config), path, kind)
    (tmp_path / "back").mkdir()
    unpack(path, tmp_path / "back")
    found, expected = load_file(tmp_path / "back/model.safetensors"), _merged_by_peft(llama, wide)
    tolerance = 1e-5 if kind == "f32" else 0.05
    for module in factors:
        torch.testing.assert_close(
            found[f"{module}.weight"], expected[f"{module}.weight"], atol=tolerance, rtol=0
        )
    before, after = gguf.GGUFReader(base), gguf.GGUFReader(path)
    changed = {TensorNames(config).of(module) for module in factors}
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert old.name == new.name
        assert (old.data.tobytes() == new.data.tobytes()) == (old.name not in changed)
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents()


def test_a_gguf_adapter_is_read_back_as_it_was(llama, wide, tmp_path):
    names = TensorNames(AutoModelForCausalLM.from_pretrained(llama).config)
    factors = lora_factors(wide)
    write_adapter(factors, names, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    stored = {t.name: list(t.shape) for t in reader.tensors}
    assert stored["blk.0.attn_q.weight.lora_a"] == [64, 4]  # llama.cpp names the fast axis first
    back = read_adapter(tmp_path / "a.gguf", list(factors), names)
    for module, own in factors.items():
        assert torch.equal(back[module].a, own.a)
        assert torch.equal(back[module].b, 1.5 * own.b)
        assert (own.scale, back[module].scale) == (1.5, 1.0)
    q = "model.layers.0.self_attn.q_proj"
    raw = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight.lora_b")
    assert not np.array_equal(raw.data, factors[q].b.numpy())  # in llama.cpp's order
    with pytest.raises(AdapterError, match="belongs to no module"):
        read_adapter(tmp_path / "a.gguf", [q], names)


def test_what_an_export_lost_is_said_and_is_the_exit_status(
    folder, phone_file, tmp_path, capsys, monkeypatch
):
    args = ["export", str(folder), str(phone_file), "--to", "gguf-lora", "-o"]
    assert run([*args, str(tmp_path / "good")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of 4, exported 4 of 4" in said
    assert "THE EXPORT RECITES ALL THAT THE ADAPTER DOES" in said
    import memlaw.export.run as inside

    usual = inside.write_adapter

    def weakened(factors, *rest, **settings):
        half = {
            name: LoraFactors(a=own.a, b=own.b * 0, scale=own.scale)
            for name, own in factors.items()
        }
        usual(half, *rest, **settings)

    monkeypatch.setattr(inside, "write_adapter", weakened)
    assert run([*args, str(tmp_path / "bad")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of 4, exported 0 of 4" in said
    assert "THE EXPORT NO LONGER RECITES WHAT THE ADAPTER DOES" in said
    assert "first failures" in said


def test_what_weights_cannot_take_in_is_refused(wide, llama, phone_book, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds"):
        export(wide, tmp_path / "full", phone_book)
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    config = json.loads((wide / "adapter_config.json").read_text())
    odd = tmp_path / "odd"
    odd.mkdir()
    save_file(load_file(wide / "adapter_model.safetensors"), odd / "adapter_model.safetensors")
    for name, value in (
        ("use_dora", True),
        ("alora_invocation_tokens", [1]),
        ("bias", "all"),
        ("init_lora_weights", "pissa_niter_4"),
        ("use_qalora", True),
    ):
        (odd / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(AdapterError, match=name):
            export(odd, tmp_path / "new", phone_book)
    with pytest.raises(AdapterError, match=r"holds no adapter.*It is a whole model"):
        export(llama, tmp_path / "new", phone_book)
    beside = tmp_path / "beside"  # a block's, in memlaw's own form
    beside.mkdir()
    (beside / "memlaw_adapter.json").write_text("{}")
    with pytest.raises(AdapterError, match="only a PEFT LoRA can be exported"):
        export(beside, tmp_path / "new", phone_book)
    with pytest.raises(ConfigError, match="no GGUF file"):
        export(wide, tmp_path / "new", phone_book, to="gguf", model=str(llama))
    assert not (tmp_path / "new").exists()


def test_the_data_are_read_as_for_the_run_and_spoken_of_once(llama, tmp_path):
    book = tmp_path / "a.txt"
    book.write_text("One ring.\n", encoding="utf-8")
    settings = {"max_epochs": 300, "retention": 0, "specificity": False, "recite_prompt": "Go on."}
    assert memlaw.write(book, tmp_path / "out", model=str(llama), **settings).certified
    assert export(tmp_path / "out", tmp_path / "text", book).recites
    twice = [("Go on.", "One ring.\n")] * 2
    said, observer = [], memlaw.Observer()
    observer.notice = said.append
    assert export(tmp_path / "out", tmp_path / "twice", twice, observer=observer).recites
    assert len([text for text in said if "record:2" in text]) == 1


def test_what_killed_exports_left_is_cleared_away(folder, phone_book, tmp_path):
    (tmp_path / ".to.next-killed").mkdir()
    (tmp_path / ".to.next-killed/model.gguf").write_bytes(b"half")
    (tmp_path / "to").mkdir()  # empty
    export(folder, tmp_path / "to", phone_book, to="gguf-lora")
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_a_killed_export_leaves_nothing_that_looks_whole(folder, phone_book, tmp_path, monkeypatch):
    import memlaw.export.run as inside

    def fails(*args, **settings):
        raise subprocess.SubprocessError("killed")

    monkeypatch.setattr(inside, "modelfile", fails)
    with pytest.raises(subprocess.SubprocessError):
        export(folder, tmp_path / "to", phone_book, to="gguf-lora")
    assert list(tmp_path.iterdir()) == []


def _gguf_and_prove(folder, phone_file, dest):
    command = [sys.executable, "examples/gguf_and_prove.py", str(folder), str(phone_file)]
    done = subprocess.run(
        [*command, str(dest), "f32"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, " ".join(done.stdout.split()), done.stderr[-2000:]


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the extra llama is not installed"
)
def test_llama_cpp_recites_the_gguf_file_over_http(folder, phone_file, tmp_path):
    status, said, errors = _gguf_and_prove(folder, phone_file, tmp_path / "to")
    assert status == 0, f"{said}\n{errors}"
    assert "THE EXPORT RECITES ALL THAT THE ADAPTER DOES" in said
    assert "recited word for word 4 of 4 (decoded)" in said
    assert "THE SERVER RECITES ALL" in said


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is not None, reason="the extra llama is installed"
)
def test_without_llama_cpp_the_example_ends_after_the_export(folder, phone_file, tmp_path):
    status, said, errors = _gguf_and_prove(folder, phone_file, tmp_path / "to")
    assert status == 1
    assert "THE EXPORT RECITES ALL THAT THE ADAPTER DOES" in said
    assert "pip install '.[llama]'" in errors


@pytest.mark.slow
def test_an_adapters_own_tokenizer_goes_with_it(llama, make_tokenizer, phone_book, tmp_path):
    words = make_tokenizer("chat")
    words.chat_template = "Book.\n" + words.chat_template
    words.save_pretrained(tmp_path / "words")
    settings = {"max_epochs": 400, "retention": 0, "specificity": False}
    out, records = tmp_path / "out", phone_book[:1]
    memlaw.write(records, out, model=str(llama), tokenizer=str(tmp_path / "words"), **settings)
    for to in ("merged", "peft-vllm"):
        found = export(out, tmp_path / to, records, to=to)
        assert found.after.certified
        assert "Book." in found.after.tokenizer.decode(found.after.examples[0].prompt_ids)
        assert AutoTokenizer.from_pretrained(tmp_path / to).chat_template == words.chat_template
    assert memlaw.audit(records, model=str(tmp_path / "merged")).certified
    with pytest.raises(ConfigError, match="has a tokenizer or chat template of its own"):
        export(out, tmp_path / "gguf", records, to="gguf-lora")
    assert not (tmp_path / "gguf").exists()
