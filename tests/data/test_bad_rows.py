"""Rows that can't be used: all of them in one message, or left out and listed."""

import json
import unicodedata

import pytest

import memlaw
from memlaw.core.errors import DataError
from memlaw.data.bad_rows import BadRows
from memlaw.data.encoding import encode
from memlaw.data.reading import read_records
from memlaw.data.record import Record

GOOD = [{"prompt": f"{n}:", "completion": str(n * 37 % 100)} for n in range(3)]


def _record(completion, n=1):
    return Record(prompt=f"{n}?", completion=completion, id=f"r{n}")


def _message(records, tokenizer):
    with pytest.raises(DataError) as caught:
        encode(records, tokenizer, format="plain")
    return str(caught.value)


def test_all_bad_rows_are_in_one_message(tmp_path):
    rows = [*GOOD, {"prompt": "a", "completion": ""}, 5, {"prompt": "b"}, GOOD[0]]
    lines = [*map(json.dumps, rows), "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / "a.jsonl")
    first, *said, mend = str(caught.value).splitlines()
    assert first == "4 bad rows:"
    assert [line.split()[0] for line in said] == [f"a.jsonl:{n}:" for n in (4, 5, 6, 8)]
    assert said[1] == "  a.jsonl:5: int instead of an object with fields."
    assert "--skip-bad" in mend


def test_ten_bad_rows_are_shown():
    rows = [*GOOD, *({"prompt": "a", "completion": " "} for _ in range(23))]
    with pytest.raises(DataError, match=r"^23 bad rows:\n") as caught:
        read_records(rows)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 10 + 1 + 1
    assert lines[10].startswith("  record:13: field 'completion' is empty")
    assert lines[11] == "  and 13 more"


def test_nothing_can_be_left_out_where_nothing_is_good():
    with pytest.raises(DataError) as caught:
        read_records([{"prompt": "a", "completion": ""}, {"prompt": "a"}], bad=BadRows())
    assert "2 bad rows" in str(caught.value)
    assert "--skip-bad" not in str(caught.value)


def test_what_holds_for_all_rows_is_said_once():
    with pytest.raises(DataError) as caught:
        read_records([{"q": str(n), "a": "1"} for n in range(50)])
    message = str(caught.value)
    assert message.startswith("record:1: no field 'prompt'; the fields are q, a.")
    assert message.endswith("The same holds for all 50 rows.")
    assert message.count("no field") == 1


def test_bad_rows_are_collected_where_they_are_wanted(make_tokenizer):
    bad = BadRows()
    rows = [*GOOD, {"prompt": "a", "completion": None}, {"prompt": "b", "completion": "<|im_end|>"}]
    records = read_records(rows, bad=bad)
    assert list(bad.reasons) == ["record:4"]
    examples = encode(records, make_tokenizer("plain"), format="plain", bad=bad)
    assert [e.record.id for e in examples] == ["record:1", "record:2", "record:3"]
    assert list(bad.reasons) == ["record:4", "record:5"]
    assert bad.reasons["record:5"].startswith("the completion contains the tokenizer's special")
    said = []
    bad.settle(3, skip=True, notice=said.append)
    assert len(said) == 1
    assert said[0].startswith("2 bad row(s) left out:\n  record:4: field 'completion' is empty")
    BadRows().settle(3, skip=True, notice=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [
        ("NFC", "Zoe\u0308 and more", "at character 2, 'e\u0308' (U+0065 U+0308)"),
        ("NFC", "Nguye\u0302\u0303n", "(U+0065 U+0302 U+0303) comes back as '\u1ec5' (U+1EC5)"),
        ("NFC", "\u1112\u1161\u11ab", "(U+1112 U+1161 U+11AB) comes back as '\ud55c' (U+D55C)"),
        ("NFD", "Zo\u00eb", "(U+00EB) comes back as 'e\u0308' (U+0065 U+0308)"),
        ("NFKC", "5 \ufb01sh", "at character 2, '\ufb01' (U+FB01) comes back as 'fi'"),
    ],
)
def test_what_a_tokenizer_makes_of_accents_is_shown_as_code_points(
    make_tokenizer, form, text, said
):
    from tokenizers import normalizers

    tokenizer = make_tokenizer("plain")
    tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)()
    message = _message([_record(text)], tokenizer)
    assert said in message
    assert f"Unicode {form}" in message
    assert f"Save the records in {form}" in message
    kept = unicodedata.normalize(form, text)
    assert encode([_record(kept)], tokenizer, format="plain")


def test_other_changes_show_code_points_where_letters_look_alike(make_tokenizer):
    from tokenizers import normalizers

    tokenizer = make_tokenizer("plain")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u0430", "a")  # a Cyrillic one
    message = _message([_record("b\u0430t"), _record("\u0430nt", 2)], tokenizer)
    assert message.startswith("2 bad rows:\n  r1: ")
    assert "'\u0430t' ('\u0430t' (U+0430 U+0074)) comes back as 'at'." in message


@pytest.mark.slow
def test_rows_are_left_out_of_write_and_audit_and_listed(llama, tmp_path):
    data, out = tmp_path / "a.jsonl", tmp_path / "out"
    rows = [*GOOD, {"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "<|im_end|>"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {"model": str(llama), "max_epochs": 300, "retention": 0, "specificity": False}
    with pytest.raises(DataError, match=r"^2 bad rows:\n  a\.jsonl:4: [^\n]*\n  a\.jsonl:5: "):
        memlaw.write(data, out, **settings)
    assert not out.exists()
    result = memlaw.write(data, out, skip_bad=True, **settings)
    assert result.certified
    assert len(result.audit.records) == 3
    listed = [json.loads(line) for line in (out / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == ["a.jsonl:4", "a.jsonl:5"]
    assert listed[0]["reason"].startswith("field 'completion' is empty")
    assert json.loads((out / "run.json").read_text())["records"]["n_skipped"] == 2
    assert memlaw.audit(data, adapter=out).n_certified == 3  # as the run did
    with pytest.raises(DataError, match="2 bad rows"):
        memlaw.audit(data, model=str(llama))
    assert len(memlaw.audit(data, model=str(llama), skip_bad=True).records) == 3


@pytest.mark.slow
def test_a_data_frame_is_written(llama, tmp_path):
    frame = pytest.importorskip("pandas").DataFrame(GOOD)
    settings = {"model": str(llama), "max_epochs": 300, "retention": 0, "specificity": False}
    assert memlaw.write(frame, tmp_path / "out", **settings).certified
