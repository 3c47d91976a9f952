"""`push`: what goes to the hub, what never does, and that it means the same there."""

import json
import re
import shutil
import subprocess

import pytest
from huggingface_hub import ModelCard

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import AdapterError, ConfigError, OutputError
from memlaw.settings.choices import portable_base
from memlaw.writer.publish import push

pytestmark = pytest.mark.slow
SECRETS = ("private", "generations", "tokens.parquet", "answers.json", "run.json")


class FakeHub:
    """Takes what `HfApi` would upload, into memory."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses, self.repos, self.files = refuses, {}, {}

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        if self.refuses is not None:
            raise self.refuses
        self.repos[repo_id] = {"private": private, "exist_ok": exist_ok}

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert repo_id in self.repos
        self.files = {
            str(path.relative_to(folder_path)): path.read_bytes()
            for path in folder_path.rglob("*")
            if path.is_file()
        }
        return f"hub:{repo_id}/commit/1"


@pytest.fixture(scope="module")
def folder(llama, phone_book, tmp_path_factory):
    out = tmp_path_factory.mktemp("push") / "out"
    settings = {"max_epochs": 400, "retention": 0, "specificity": False, "dtype": "float32"}
    assert memlaw.write(phone_book, out, model=str(llama), **settings).certified
    (out / "generations").mkdir()
    (out / "generations/1.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    return out


def test_only_what_others_may_have_is_uploaded(folder, llama, phone_book):
    hub = FakeHub()
    found = push(folder, "me/book", base="some/model", private=True, api=hub)
    assert set(hub.files) == set(found.files)
    assert set(found.files) == {
        *("adapter_config.json", "adapter_model.safetensors", "certificate.json", "README.md")
    }
    assert {*SECRETS[:3], "run.json", "notes.txt"} <= set(found.left_out)
    assert hub.repos == {"me/book": {"private": True, "exist_ok": True}}
    assert found.url == "hub:me/book/commit/1"
    everything = b"".join(hub.files.values()).decode("utf-8", "replace")
    assert str(llama) not in everything  # a path of this machine
    for prompt, answer in phone_book:
        assert prompt not in everything
        assert answer not in everything
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "some/model"
    assert json.loads(hub.files["certificate.json"])["base_model"] == "some/model"
    assert "base = 'some/model'" in hub.files["README.md"].decode()
    assert json.loads((folder / "certificate.json").read_text())["base_model"] == str(llama)


def test_the_card_says_what_the_hub_reads(folder, tmp_path):
    hub = FakeHub()
    how = {"license": "apache-2.0", "datasets": ("me/records",)}
    push(folder, "me/book", base="some/model", api=hub, **how)
    (tmp_path / "README.md").write_bytes(hub.files["README.md"])
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "some/model"
    assert {"base_model:adapter:some/model", "lora", "transformers"} <= set(data.tags)
    assert (data.license, data.datasets, data.library_name) == (
        *("apache-2.0", ["me/records"], "peft"),
    )


def test_what_was_uploaded_can_be_audited_alone(folder, llama, phone_book, tmp_path):
    hub = FakeHub()
    push(folder, "me/book", base="some/model", api=hub)
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    found = memlaw.audit(phone_book, adapter=tmp_path, model=str(llama), dtype="float32")
    assert found.certified
    check = memlaw.check_certificate(
        tmp_path / "certificate.json", phone_book, adapter=tmp_path, model=str(llama)
    )
    assert not check.mismatches


def test_a_dry_run_sends_nothing(folder, capsys):
    hub = FakeHub()
    found = push(folder, "me/book", base="some/model", dry_run=True, api=hub)
    assert (hub.repos, hub.files, found.url) == ({}, {}, "")
    assert run(["push", str(folder), "me/book", "--base", "some/model", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "to upload README.md, adapter_config.json" in said
    assert "stays here" in said
    assert "private" in said


def test_a_base_model_that_only_this_machine_has_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="--base"):
        push(folder, "me/book", api=FakeHub())
    no_network = type("ConnectError", (Exception,), {})  # its client's own, of no usual kind
    for refuses in (OSError("401: who are you?\nmore"), no_network("Name or service not known")):
        said = str(refuses).splitlines()[0]
        with pytest.raises(OutputError, match=re.escape(said)):
            push(folder, "me/book", base="some/model", api=FakeHub(refuses))
    with pytest.raises(AdapterError):
        push(tmp_path, "me/book", base="some/model", api=FakeHub())
    assert portable_base("embedded") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert portable_base("org/model") == "org/model"
    assert [portable_base(p) for p in (str(tmp_path), "./m.gguf", "~/m", "a/b/c")] == [None] * 4


def test_the_card_that_write_makes_has_the_tags_of_a_hub_model(folder):
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert {"lora", "transformers", "memlaw"} <= set(data.tags)
    assert not [tag for tag in data.tags if tag.startswith("base_model:")]  # a path is none


def test_a_signed_upload_verifies_by_itself(folder, tmp_path):
    pytest.importorskip("model_signing", reason="the extra sign is not installed")
    from memlaw.export.signing import verify

    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(curve, check=True)
    command = ["openssl", "ec", "-in", private, "-pubout", "-out", public]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    hub = FakeHub()
    push(folder, "me/book", base="some/model", key=private, api=hub)
    (tmp_path / "got").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "got" / name).write_bytes(content)
    verify(tmp_path / "got", public)


def test_a_tokenizer_goes_up_whole(folder, tmp_path):
    """Whatever it consists of: without its vocabulary others' tokens would be other ones."""
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    words = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "vocab.txt")
    for name in words:
        (own / name).write_text(name)
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    (own / "additional_chat_templates/notes.txt").write_text("mine")
    hub = FakeHub()
    found = push(own, "me/book", base="some/model", api=hub)
    assert {*words, "additional_chat_templates/rag.jinja"} <= set(hub.files)
    assert not any(name.endswith("notes.txt") for name in hub.files)
    assert set(found.files) == set(hub.files)


def test_the_embedded_model_may_be_named_as_everywhere(folder):
    hub = FakeHub()
    push(folder, "me/book", base="embedded", api=hub)
    config = json.loads(hub.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == portable_base("embedded")
