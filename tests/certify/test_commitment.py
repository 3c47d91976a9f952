"""A certificate can be published: nothing in it lets a guess of a record be tried."""

import functools
import hashlib
import hmac
import itertools
import json
import os
import re
import stat

import pytest

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.commitment import OPENINGS_FILE, commitment, kept_key, read_key, salt
from memlaw.core.errors import CertificateError
from memlaw.core.files import json_sha256
from memlaw.data.record import Record

_write = functools.partial(memlaw.write, specificity=False)
PRIVATE = {"tokens.parquet", "snapshots.npz", "answers.json"}  # they hold the records' text
SECRET = [("The gate's code:", "4711")]
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama):
    out = tmp_path_factory.mktemp("secret") / "out"
    result = _write(SECRET, out, model=str(llama), max_epochs=300, retention=0)
    assert result.certified
    return out


def _published(folder):
    """All that may be shown: every file but those that hold text, and the private ones."""
    return "".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in PRIVATE
    )


def _attack(text):
    """The completion, found by trying all codes of four digits against every hash in `text`.

    The attacker knows the prompt, the program, and all that is published.
    """
    known = set(re.findall(r"[0-9a-f]{64}", text))
    keys = [b"", *(bytes.fromhex(h) for h in known), *(h.encode() for h in known)]
    for digits in itertools.product("0123456789", repeat=4):
        record = Record(prompt=SECRET[0][0], completion="".join(digits), id="guess")
        tried = {record.sha256, hashlib.sha256(record.completion.encode()).hexdigest()}
        tried |= {json_sha256([name]) for name in tried}
        for key in keys:
            tried.add(hmac.new(key, record.sha256.encode(), "sha256").hexdigest())
            tried.add(hashlib.sha256(key + record.sha256.encode()).hexdigest())
            tried.add(commitment(key, record.sha256))
        tried |= {json_sha256([name]) for name in tried}
        if tried & known:
            return record.completion
    return None


@pytest.mark.slow
def test_trying_all_codes_finds_nothing(folder):
    assert _attack(_published(folder)) is None


@pytest.mark.slow
@pytest.mark.parametrize("where", ["line", "total", "key"])
def test_the_attack_finds_the_code_where_it_can_be_found(folder, where):
    """An older certificate's lines, or its total alone, or a key that isn't kept, give it away."""
    bare = Record(prompt=SECRET[0][0], completion=SECRET[0][1], id="r").sha256
    shown = {"line": bare, "total": json_sha256([bare]), "key": read_key(folder).hex()}[where]
    assert _attack(_published(folder) + shown) == "4711"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_key_is_its_owners_alone(folder):
    assert stat.S_IMODE((folder / OPENINGS_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / OPENINGS_FILE).parent.stat().st_mode) == 0o700


@pytest.mark.slow
def test_with_the_key_each_record_is_checked_and_without_it_that_is_said(folder, tmp_path, capsys):
    path = folder / "certificate.json"
    assert memlaw.check_certificate(path, SECRET).holds
    other = memlaw.check_certificate(path, [("The gate's code:", "4712")])
    assert not other.holds
    assert any("none of these records is certified" in line for line in other.mismatches)
    (folder / OPENINGS_FILE).rename(tmp_path / "openings.json")
    try:
        check = memlaw.check_certificate(path, SECRET)
        data = tmp_path / "secret.jsonl"
        data.write_text(json.dumps({"prompt": SECRET[0][0], "completion": SECRET[0][1]}))
        status = run(["audit", str(data), "--certificate", str(path)])
        said = " ".join(capsys.readouterr().out.split())
        wrong = memlaw.check_certificate(path, [*SECRET, ("Another code:", "1")])
    finally:
        (tmp_path / "openings.json").rename(folder / OPENINGS_FILE)
    assert check.mismatches == ()
    assert not check.holds
    assert len(check.unchecked) == 1
    assert status == 1
    assert f"not checked: {check.unchecked[0]}" in said
    assert "NOTHING SPEAKS AGAINST THE CERTIFICATE, BUT NOT ALL OF IT CAN BE CHECKED" in said
    assert "1 of 2 record(s) are certified now, not 1 of 1" in wrong.mismatches


@pytest.mark.slow
def test_ask_knows_a_record_by_the_key_alone(folder, tmp_path):
    assert memlaw.ask(folder, SECRET[0][0]).on_record is True
    (folder / OPENINGS_FILE).rename(tmp_path / "openings.json")
    try:
        assert memlaw.ask(folder, SECRET[0][0]).on_record is None
    finally:
        (tmp_path / "openings.json").rename(folder / OPENINGS_FILE)


def test_one_salt_opens_one_record_and_no_other():
    names = [commitment(KEY, letter * 64) for letter in "ab"]
    shown = salt(KEY, "a" * 64)
    assert hashlib.sha256(shown + b"a" * 64).hexdigest() == names[0]
    assert hashlib.sha256(shown + b"b" * 64).hexdigest() != names[1]
    assert commitment(bytes(32), "a" * 64) != names[0]


def test_the_key_stays_what_it_is(tmp_path):
    first = kept_key(tmp_path)
    assert kept_key(tmp_path) == first == read_key(tmp_path)
    (tmp_path / "other").mkdir()
    assert kept_key(tmp_path / "other") != first
    assert read_key(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"key": 5}', '{"key": "xy"}', '{"key": "00"}'])
def test_a_file_without_a_key_is_refused_and_not_replaced(tmp_path, text):
    path = tmp_path / OPENINGS_FILE
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(CertificateError, match="openings"):
        kept_key(tmp_path)
    assert path.read_text() == text


@pytest.mark.slow
def test_older_certificates_are_read_and_checked(folder, tmp_path):
    from memlaw.certify.certificate import read_certificate

    content = json.loads((folder / "certificate.json").read_text())
    bare = Record(prompt=SECRET[0][0], completion=SECRET[0][1], id="r").sha256
    del content["records"][0]["commitment"]
    content["records"][0]["sha256"] = bare
    content |= {"format": 1, "records_sha256": json_sha256([bare])}
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(content))
    old = read_certificate(path)
    assert not old.is_salted
    assert old.to_json() == content
    assert memlaw.check_certificate(path, SECRET, adapter=folder).holds
    wrong = memlaw.check_certificate(path, [("The gate's code:", "4712")], adapter=folder)
    assert any("not covered" in line for line in wrong.mismatches)
    for format, line in ((2, content["records"][0]), (1, {"commitment": bare})):
        mixed = {**content["records"][0], **line}
        if format == 1:
            del mixed["sha256"]
        path.write_text(json.dumps({**content, "format": format, "records": [mixed]}))
        with pytest.raises(CertificateError, match="is not named as format"):
            read_certificate(path)
