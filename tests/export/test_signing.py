"""Signatures: one byte changed, one file more, another key: each is refused."""

import base64
import json
import subprocess

import pytest

from memlaw.cli.dispatch import run
from memlaw.core.errors import ConfigError, SignatureError
from memlaw.export import signing

pytestmark = pytest.mark.slow
has_package = pytest.mark.skipif(
    signing.importlib.util.find_spec("model_signing") is None,
    reason="the extra sign is not installed",
)


def keys(folder, name="key"):
    """A pair of keys, as docs/publish.md makes them: the private one, the public one."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(curve, check=True)
    command = ["openssl", "ec", "-in", private, "-pubout", "-out", public]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return private, public


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    (out / "private").mkdir(parents=True)
    (out / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    (out / "certificate.json").write_text('{"certified": true}')
    (out / "private/records.jsonl").write_text("secret")
    return out


@has_package
def test_a_folder_with_one_byte_changed_is_refused(folder, tmp_path, capsys):
    private, public = keys(tmp_path)
    assert run(["sign", str(folder), "--key", str(private)]) == 0
    check = ["verify", str(folder), "--key", str(public)]
    assert run(check) == 0
    (folder / "private/records.jsonl").write_text("its owner's, and changes")
    assert run(check) == 0

    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    capsys.readouterr()
    assert run(check) == 1
    said = _said(capsys)
    assert "was changed after it was signed: adapter_model.safetensors has other content." in said
    assert "sign it again with memlaw sign" in said
    assert "digest" not in said.lower()
    weights.write_bytes(good)
    assert run(check) == 0

    (folder / "more.py").write_text("print()")
    assert run(check) == 1
    assert "signed: more.py was added." in _said(capsys)
    (folder / "certificate.json").unlink()
    assert run(check) == 1
    assert "signed: certificate.json is gone, more.py was added." in _said(capsys)


def _said(capsys):
    return " ".join(capsys.readouterr().out.split())


@has_package
def test_another_key_and_no_signature_are_refused(folder, tmp_path):
    private, public = keys(tmp_path)
    _, other = keys(tmp_path, "other")
    with pytest.raises(SignatureError, match="isn't signed"):
        signing.verify(folder, public)
    signing.sign(folder, private)
    with pytest.raises(SignatureError, match=r"with another key: .*other\.pub isn't"):
        signing.verify(folder, other)
    with pytest.raises(ConfigError, match="private key"):
        signing.sign(folder, public)
    with pytest.raises(ConfigError, match="not a file"):
        signing.verify(folder, tmp_path / "gone")


@has_package
def test_a_signature_that_was_tampered_with_is_told_from_a_changed_folder(folder, tmp_path):
    private, public = keys(tmp_path)
    signature = signing.sign(folder, private)
    good = signature.read_text()
    signature.write_text(good[: len(good) // 2])
    with pytest.raises(SignatureError, match="can't be read as a signature"):
        signing.verify(folder, public)

    signed = json.loads(good)
    payload = base64.b64decode(signed["dsseEnvelope"]["payload"])
    forged = payload.replace(b"certificate.json", b"certificate.jsom")
    signed["dsseEnvelope"]["payload"] = base64.b64encode(forged).decode()
    signature.write_text(json.dumps(signed))
    (folder / "certificate.json").rename(folder / "certificate.jsom")
    with pytest.raises(SignatureError, match=r"model\.sig was changed itself"):
        signing.verify(folder, public)


def test_without_the_package_it_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(signing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[sign\]'"):
        signing.sign(folder, tmp_path / "key")


@has_package
@pytest.mark.parametrize(("there", "as_named"), [("..", "out"), (".", "."), ("..", "./out/../out")])
def test_a_folder_may_be_named_from_where_one_is(folder, tmp_path, monkeypatch, there, as_named):
    private, public = keys(tmp_path)
    monkeypatch.chdir((folder / there).resolve())
    assert run(["sign", as_named, "--key", str(private)]) == 0
    (folder / "private/records.jsonl").write_text("its owner's, and changes")
    assert run(["verify", as_named, "--key", str(public)]) == 0
    assert run(["verify", str(folder), "--key", str(public)]) == 0
    (folder / "certificate.json").write_text("{}")
    assert run(["verify", as_named, "--key", str(public)]) == 1


@has_package
def test_what_is_no_public_key_is_a_bad_request_and_no_verdict(folder, tmp_path, capsys):
    private, _ = keys(tmp_path)
    assert run(["sign", str(folder), "--key", str(private)]) == 0
    empty = tmp_path / "empty.pub"
    empty.write_text("")
    for key in (empty, private, tmp_path / "missing.pub"):
        assert run(["verify", str(folder), "--key", str(key)]) == 2
        said = capsys.readouterr().err
        assert str(key) in said
        assert "signed with this key" not in said


@has_package
def test_what_is_private_in_a_shard_is_not_signed(folder, tmp_path):
    private, public = keys(tmp_path)
    shard = folder / "shards/shard-0001"
    (shard / "private").mkdir(parents=True)
    (shard / "private/records.jsonl").write_text("a guess could be tried on its hash")
    (shard / "adapter_model.safetensors").write_bytes(b"weights")
    signing.sign(folder, private)
    envelope = json.loads((folder / "model.sig").read_text())["dsseEnvelope"]
    signed = base64.b64decode(envelope["payload"]).decode()
    assert "shards/shard-0001/adapter_model.safetensors" in signed
    assert "records.jsonl" not in signed
    (shard / "private/records.jsonl").unlink()
    (shard / "private").rmdir()
    signing.verify(folder, public)
    (shard / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(SignatureError, match="shards/shard-0001"):
        signing.verify(folder, public)
