"""`write --tokenizer`: another tokenizer than the base model's, and it goes with the adapter."""

import json

import pytest

import memlaw


@pytest.mark.slow
def test_the_tokenizer_goes_with_the_adapter(llama, make_tokenizer, phone_book, texts, tmp_path):
    words = make_tokenizer("chat")
    words.chat_template = "Book.\n" + words.chat_template
    words.save_pretrained(tmp_path / "words")
    out, settings = (
        tmp_path / "out",
        {"model": str(llama), "specificity": False, "retention": 100, **texts},
    )
    settings |= {"tokenizer": str(tmp_path / "words"), "max_epochs": 300}
    result = memlaw.write(phone_book, out, **settings)
    assert result.certified
    said = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    assert said["tokenizer"] == str(tmp_path / "words")
    assert said["tokenizer"] in said["statement"]
    assert memlaw.check_certificate(out / "certificate.json", phone_book).holds
    found = memlaw.audit(phone_book, adapter=out)
    assert found.n_certified == len(phone_book)
    assert "Book." in found.tokenizer.decode(found.examples[0].prompt_ids)
    other = memlaw.check_certificate(out / "certificate.json", phone_book, tokenizer=str(llama))
    assert any("the tokenizer is not the certified one" in line for line in other.mismatches)
    assert 'from_pretrained("path/to/this/folder")' in (out / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_a_tokenizer_does_not_keep_a_run_from_going_on(llama, phone_book, texts, tmp_path):
    out = tmp_path / "out"
    settings = {
        "model": str(llama),
        "tokenizer": str(llama),
        "specificity": False,
        "retention": 100,
        **texts,
    }
    memlaw.write(phone_book, out, max_epochs=1, **settings)
    assert memlaw.write(phone_book, out, max_epochs=2, resume=True, **settings).epochs == 2


@pytest.mark.slow
def test_an_update_keeps_the_tokenizer(llama, make_tokenizer, phone_book, texts, tmp_path):
    words = make_tokenizer("chat")
    words.chat_template = "Book.\n" + words.chat_template
    words.save_pretrained(tmp_path / "words")
    out, settings = tmp_path / "out", {"model": str(llama), "specificity": False, **texts}
    settings |= {"retention": 100, "tokenizer": str(tmp_path / "words"), "max_epochs": 300}
    first = memlaw.write(phone_book, out, **settings).certificate
    (tmp_path / "words").rename(tmp_path / "gone")
    records = [*phone_book, ("Bo Ek:", "271828")]
    memlaw.update(out, records)
    check = memlaw.check_certificate(out / "certificate.json", records)
    assert check.holds
    assert check.certificate.tokenizer_sha256 == first.tokenizer_sha256
