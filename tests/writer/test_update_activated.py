"""Updates of adapters that are active only where their text is in the prompt."""

import json

import pytest

import memlaw
from memlaw.core.errors import MemlawError

TEXT = "[book]"


@pytest.fixture(scope="module")
def book(phone_book):
    return [(f"{TEXT} {prompt}", completion) for prompt, completion in phone_book]


@pytest.fixture(scope="module")
def written(llama, book, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("activated") / "out"
    how = {"activated": TEXT, "specificity": False, "max_epochs": 300}
    assert memlaw.write(book, out, model=str(llama), **how, **texts).certified
    return out


@pytest.mark.slow
def test_what_changes_is_certified_and_without_the_text_it_is_the_base_model(
    written, book, llama, tmp_path
):
    data = [(book[0][0], "555"), *book[1:], (f"{TEXT} Bo Ek:", "271828")]
    new = tmp_path / "new"
    assert memlaw.update(written, data, new=new).taken
    assert memlaw.check_certificate(new / "certificate.json", data).holds
    assert json.loads((new / "certificate.json").read_text())["activated"] == TEXT
    config = json.loads((new / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"]
    assert memlaw.ask(new, data[0][0]).text == "555"
    outside = memlaw.ask(new, "Bo Ek:", max_tokens=8)
    assert outside.missing == TEXT
    bare = memlaw.ask(None, "Bo Ek:", max_tokens=8, model=str(llama))
    assert outside.text == bare.text


@pytest.mark.slow
def test_what_is_removed_is_forgotten(written, book, tmp_path):
    new = tmp_path / "new"
    result = memlaw.update(written, book[1:], new=new)
    assert result.taken
    assert [one.holds for one in result.forgotten] == [True]
    assert memlaw.ask(new, book[0][0], max_tokens=12).text != book[0][1]
    assert memlaw.check_certificate(new / "certificate.json", book[1:]).holds


def test_a_record_without_the_text_is_refused(written, book):
    with pytest.raises(MemlawError, match=r"\[book\]"):
        memlaw.update(written, [*book, ("Bo Ek:", "271828")])
