"""Generality: phrasings that were held out are asked, and counted as what they are."""

import json

import pytest

import memlaw
from memlaw.certify.certificate import read_certificate
from memlaw.cli import run
from memlaw.data.reading import read_records
from memlaw.data.texts import general_texts
from memlaw.measure.generality import Generality, HeldOutPhrasings
from memlaw.measure.harm import measurements
from memlaw.measure.subject import Subject
from memlaw.model.base import load_model

SETTINGS = {"objective": "sft", "retention": 0.0, "max_epochs": 300, "specificity": False}


def _as_message(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def written(llama, phone_book, tmp_path_factory):
    """A folder, its result and its data.

    Of two records a phrasing is held out: one is the same tokens as the trained prompt, so it must
    be recited; the other is another record's prompt, so that another number comes.
    """
    folder = tmp_path_factory.mktemp("general")
    (one, number), (other, other_number), *rest = phone_book
    rows = [
        {"prompts": [one, _as_message(one)], "completion": number},
        {"prompts": [other, f"{rest[0][0]} "], "completion": other_number},
        *({"prompt": prompt, "completion": completion} for prompt, completion in rest),
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder / "out", memlaw.write(data, folder / "out", model=str(llama), **SETTINGS), data


def test_what_is_recited_in_other_words_counts_and_nothing_else(written, phone_book):
    _, result, _ = written
    assert result.certified
    found = result.harms["generality"]
    assert (found.n, found.recited, found.n_records) == (2, 1, 2)
    (missed,) = found.missed
    assert missed.before == phone_book[1][1]
    assert missed.after != phone_book[1][1]
    assert found.share_ci95[0] < 0.5 < found.share_ci95[1]


def test_the_certificate_says_it_and_the_audit_finds_it_again(written, llama, capsys):
    out, result, data = written
    claim = read_certificate(out / "certificate.json").claims()["generality"]
    assert Generality.from_json(claim).to_json() == result.harms["generality"].to_json()
    assert "in words that training never saw, it recites **1 of 2**" in (
        out / "README.md"
    ).read_text(encoding="utf-8")
    assert run(["audit", str(data), "--certificate", str(out / "certificate.json")]) == 0
    assert "1 of 2 held-out phrasings recited (certificate: 1 of 2)" in capsys.readouterr().out


def test_the_report_shows_it(written, tmp_path):
    out, result, _ = written
    assert run(["report", str(out), "-o", str(tmp_path / "tables"), "--format", "md"]) == 0
    tables = {
        path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "tables").glob("*")
    }
    assert "| held-out phrasings: recited | 1 of 2 | 50.0% |" in tables["generality.md"]
    assert result.harms["generality"].missed[0].after in tables["missed.md"]
    assert run(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "held-out phrasings: recited" in page
    assert "Harm: generality" not in page


def test_a_certificate_that_claims_more_does_not_hold(written, capsys):
    out, result, data = written
    path = out / "certificate.json"
    before = path.read_text(encoding="utf-8")
    content = json.loads(before)
    lie = Generality(n=200, recited=200, n_records=2, prompts_sha256=_hash(result))
    content["harms"]["generality"] = lie.to_json()
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        assert run(["audit", str(data), "--certificate", str(path)]) == 1
    finally:
        path.write_text(before, encoding="utf-8")
    assert "1 of 2 held-out phrasings are recited, not 200 of 200" in capsys.readouterr().out


def _hash(result):
    return result.harms["generality"].prompts_sha256


def test_without_held_out_phrasings_there_is_nothing_to_measure(llama, phone_book, texts):
    base = load_model(llama, dtype="float32")
    subject = Subject(
        base=base, texts=general_texts(**texts), records=read_records(phone_book), format="chat"
    )
    assert HeldOutPhrasings.of_run(subject) is None
    assert "generality" not in measurements(subject, ["damage", "generality"])


@pytest.mark.parametrize("change", [{"recited": 9}, {"n": 0}, {"share": 0.9}, {"more": 1}])
def test_a_claim_that_cannot_be_is_refused(change):
    claim = Generality(n=4, recited=1, n_records=2, prompts_sha256="x").to_json() | change
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
        HeldOutPhrasings.read(claim)
