"""Which base model and which tokenizer an adapter's folder is measured with."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw
from memlaw.core.errors import AdapterError, MemlawError
from memlaw.core.observer import Observer
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.session import Session
from memlaw.model.base import load_model
from memlaw.model.hashes import tokenizer_sha256
from memlaw.settings.audit import AuditConfig


@pytest.fixture
def adapter(make_model, tmp_path):
    """A PEFT adapter of a base model without a chat template."""
    folder = make_model("mistral")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _session(adapter, **settings):
    said = []
    observer = Observer()
    observer.notice = said.append
    return Session(AuditConfig(adapter=adapter, **settings), observer), said


def _name_base(adapter, name):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_that_names_no_base_is_never_the_embedded_models(adapter, phone_book, name):
    _name_base(adapter, name)
    with pytest.raises(AdapterError, match=r"adapter_config.json names no base model .* --model"):
        memlaw.audit(phone_book, adapter=adapter)
    with pytest.raises(AdapterError, match="names no base model"):
        memlaw.ask(adapter, "Li Na:")


@pytest.mark.parametrize("damage", [{"spec": None}, {"spec": ""}, {"path": {}}, {"source": []}])
def test_a_run_whose_base_lies_at_no_place_is_damaged(tmp_path, damage):
    base = {"spec": "somewhere", "path": None, "source": None, "sha256": "0"} | damage
    (tmp_path / "run.json").write_text(json.dumps({"base": base}))
    with pytest.raises(AdapterError, match=r"run.json is damaged: the base model's place"):
        AdapterFolder(tmp_path)


def test_a_base_whose_path_can_be_no_path_is_elsewhere(tmp_path):
    base = {"spec": "somewhere", "path": "a" * 5000, "source": "\0", "sha256": "0"}
    (tmp_path / "run.json").write_text(json.dumps({"base": base}))
    assert AdapterFolder(tmp_path).base_model == "a" * 5000
    (tmp_path / "run.json").write_text(json.dumps({"base": base | {"path": "", "source": ""}}))
    assert AdapterFolder(tmp_path).base_model == "somewhere"


@pytest.mark.parametrize("name", ["./models/llama", "/elsewhere/llama", "someone/unknown"])
def test_a_base_that_is_not_here_is_named_with_the_file_that_names_it(adapter, phone_book, name):
    _name_base(adapter, name)
    with pytest.raises(AdapterError) as caught:
        memlaw.audit(phone_book, adapter=adapter)
    for part in (f"{adapter}/adapter_config.json", repr(name), "--model"):
        assert part in str(caught.value)


def test_a_model_that_was_asked_for_needs_no_name_in_the_folder(adapter, make_model, phone_book):
    _name_base(adapter, None)
    assert memlaw.audit(phone_book, adapter=adapter, model=str(make_model("mistral"))).records


def _run(folder, **base):
    folder.mkdir()
    base = {"spec": "gone.gguf", "path": "/gone/cache", "source": None, "sha256": "0"} | base
    (folder / "run.json").write_text(json.dumps({"base": base}))
    return AdapterFolder(folder)


def test_of_a_run_the_first_place_that_is_here_is_taken(llama, tmp_path, monkeypatch):
    (tmp_path / "small.gguf").touch()
    file = str(tmp_path / "small.gguf")
    assert _run(tmp_path / "a", path=str(llama), source=file).base_model == str(llama)
    assert _run(tmp_path / "b", source=file).base_model == file
    monkeypatch.chdir(llama.parent)
    assert _run(tmp_path / "c", spec=llama.name).base_model == llama.name
    assert _run(tmp_path / "d").base_model == "/gone/cache"
    assert _run(tmp_path / "e", spec="embedded").base_model == "embedded"


def test_a_base_is_named_as_it_was_asked_for(llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    base = load_model(llama.name)
    assert (base.name, base.source) == (llama.name, None)


def test_the_folders_own_tokenizer_is_used_and_said(adapter, chat_tokenizer):
    usual, said = _session(adapter)
    assert (usual.prompt_format, said) == ("plain", [])
    chat_tokenizer.save_pretrained(adapter)
    own, said = _session(adapter)
    assert own.prompt_format == "chat"
    assert own.base.tokenizer_sha256 == tokenizer_sha256(chat_tokenizer)
    assert len(said) == 1
    assert f"The tokenizer in {adapter} and its chat template" in said[0]


def test_a_tokenizer_that_is_the_bases_is_not_spoken_of(adapter, make_model):
    AutoTokenizer.from_pretrained(make_model("mistral")).save_pretrained(adapter)
    session, said = _session(adapter)
    assert (session.prompt_format, said) == ("plain", [])


def test_a_chat_template_alone_is_used_with_the_bases_tokenizer(adapter, chat_tokenizer):
    template = "<|im_start|>{{ messages[0].content }}"
    (adapter / "chat_template.jinja").write_text(template)
    session, said = _session(adapter)
    assert session.prompt_format == "chat"
    assert session.base.tokenizer.chat_template == template
    assert "chat template" in said[0]


def test_a_tokenizer_that_was_asked_for_goes_before_the_folders_own(
    adapter, chat_tokenizer, make_model
):
    chat_tokenizer.save_pretrained(adapter)
    session, said = _session(adapter, tokenizer=str(make_model("mistral")))
    assert (session.prompt_format, said) == ("plain", [])


def test_a_tokenizer_that_can_not_be_read_is_refused(adapter, phone_book, tmp_path):
    with pytest.raises(MemlawError, match=r"tokenizer of .* can't be loaded.* --tokenizer"):
        memlaw.audit(phone_book, adapter=adapter, tokenizer=str(tmp_path))


@pytest.mark.slow
def test_a_moved_base_is_found_where_it_was_asked_for(llama, phone_book, tmp_path, monkeypatch):
    shutil.copytree(llama, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    memlaw.write(
        phone_book, tmp_path / "out", model="base", max_epochs=2, retention=0, specificity=False
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    assert memlaw.audit(phone_book, adapter=tmp_path / "out").records
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"run.json names the base model .* --model"):
        memlaw.audit(phone_book, adapter=tmp_path / "out")
