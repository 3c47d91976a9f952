"""Documents: from a prefix of each, how many does a model go on with word for word?"""

import json

import pytest
import torch
from tokenizers import processors
from transformers.models.auto import AutoModelForCausalLM

import memlaw
from memlaw.cli import main as command_line
from memlaw.core.errors import ConfigError, DataError
from memlaw.core.intervals import share_interval
from memlaw.data.bad_rows import BadRows
from memlaw.data.documents import Document, read_documents, split_documents
from memlaw.data.record import Record
from memlaw.settings.audit import AuditConfig

N = 6


def main(args):
    with pytest.raises(SystemExit) as ended:
        command_line(args)
    return ended.value.code


@pytest.fixture(scope="module")
def said(llama, make_tokenizer):
    """Documents that a tiny model goes on with by itself from their first tokens."""
    tokenizer = make_tokenizer("chat")
    model = AutoModelForCausalLM.from_pretrained(llama)
    texts = []
    with torch.inference_mode():
        for first in range(60):
            ids = tokenizer(f"No. {first:02} goes", return_tensors="pt")["input_ids"][:, :N]
            for _ in range(2):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            text = tokenizer.decode(ids[0], clean_up_tokenization_spaces=False)
            if text.isprintable() and tokenizer(text)["input_ids"] == ids[0].tolist():
                texts.append(text)
    assert len(texts) > 1
    return [text for text in texts if "<|" not in text][:3]


def _file(path, texts, **more):
    path.write_text("".join(json.dumps({"text": t} | more) + "\n" for t in texts), "utf-8")
    return path


def test_the_share_extracted_stands_in_json_and_terminal(llama, said, tmp_path, capsys):
    other = said[0][:-1] + ("x" if said[0][-1] != "x" else "y")
    data = _file(tmp_path / "a.jsonl", [*said, "It is otherwise than the model has it."], url="u")
    command = ["audit", str(data), "--model", str(llama), "--prefix-tokens", str(N)]
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    n, of = len(said), len(said) + 1
    assert (found["n_recalled"], found["n_records"], found["prefix_tokens"]) == (n, of, N)
    assert found["share_extracted"] == pytest.approx(n / of)
    assert found["share_extracted_ci95"] == pytest.approx(list(share_interval(n, of)))
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert f"{n} of {of} ({of} decoded): {n / of:.1%} (95 %:" in shown
    assert "certified" not in shown
    data = _file(tmp_path / "b.jsonl", said)
    command[1] = str(data)
    assert main(command) == 0
    assert main([*command[:1], str(_file(tmp_path / "c.jsonl", [other])), *command[2:]]) == 1


def test_a_report_says_what_was_extracted(llama, said, tmp_path, capsys):
    pytest.importorskip("jinja2")
    data = _file(tmp_path / "a.jsonl", said)
    assert (
        main(["audit", str(data), "--model", str(llama), "--prefix-tokens", str(N), "--json"]) == 0
    )
    (tmp_path / "audit.json").write_text(capsys.readouterr().out)
    assert main(["report", str(tmp_path / "audit.json"), "-o", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text()
    assert f"{len(said)} of {len(said)} documents are extracted" in page


def test_a_prefix_alone_is_the_prompt_and_no_end_is_asked_for(llama, said):
    found = memlaw.audit(said, model=str(llama), prefix_tokens=N, suffix_tokens=2)
    assert [len(e.prompt_ids) for e in found.examples] == [N] * len(said)
    assert [len(e.target_ids) for e in found.examples] == [2] * len(said)
    assert (found.n_recalled, found.end, found.passed) == (len(said), False, True)
    teacher_forced = memlaw.audit(said, model=str(llama), prefix_tokens=N, decode="none")
    assert teacher_forced.n_recalled == len(said)
    assert not memlaw.audit(["Once upon a midnight"], model=str(llama), prefix_tokens=3).passed


def test_short_documents_are_refused_in_words_or_left_out(llama, said, tmp_path, capsys):
    data = _file(tmp_path / "a.jsonl", ["Hi.", *said, "ab"])
    command = ["audit", str(data), "--model", str(llama), "--prefix-tokens", str(N)]
    assert main(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"a.jsonl:1: the document has 3 token(s), and needs {N + 1} or more" in told
    assert "2 bad rows" in told
    assert main([*command, "--skip-bad", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["n_records"] == len(said)
    assert "2 bad row(s) left out" in err


def _split(texts, tokenizer, n, **how):
    bad, told = BadRows(), []
    documents = [Document(text=text, id=f"d:{i}") for i, text in enumerate(texts, 1)]
    found = split_documents(documents, tokenizer, n_prefix=n, bad=bad, notice=told.append, **how)
    return found, bad.reasons, told


def test_the_cut_is_between_two_tokens_of_the_document(make_tokenizer):
    tokenizer = make_tokenizer("plain")
    text = "the heron"
    ids = tokenizer(text)["input_ids"]
    (example,), _, _ = _split([text], tokenizer, 2)
    assert example.prompt_ids + example.target_ids == tuple(ids)
    assert example.record.prompt + example.record.completion == text


def test_what_the_tokenizer_puts_before_a_text_is_not_counted(make_tokenizer):
    tokenizer = make_tokenizer("plain")
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[
            ("<|endoftext|>", end),
            ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>")),
        ],
    )
    (example,), _, _ = _split(["the heron sang"], tokenizer, 2)
    bare = tokenizer("the heron sang", add_special_tokens=False)["input_ids"]
    assert example.prompt_ids == (end, *bare[:2])
    assert example.target_ids == tuple(bare[2:])


def test_documents_that_begin_alike_are_measured_and_told(make_tokenizer):
    found, bad, told = _split(["the heron", "the heralds"], make_tokenizer("plain"), 2)
    assert (len(found), bad) == (2, {})
    assert "d:2, as d:1" in told[0]


def test_what_cannot_be_split_is_named(make_tokenizer):
    tokenizer = make_tokenizer("plain")
    found, bad, _ = _split(["ab", "a" * 40, "the <|im_end|> heron"], tokenizer, 2, max_tokens=30)
    assert found == []
    assert "needs 3 or more" in bad["d:1"]
    assert "the model's context is 30" in bad["d:2"]
    assert "special token" in bad["d:3"]
    found, bad, _ = _split(["a" * 40], tokenizer, 2, n_suffix=28, max_tokens=30)
    assert (len(found), bad) == (1, {})


def test_a_character_that_is_cut_must_be_the_same(make_tokenizer):
    from memlaw.measure.examine import _decoding

    tokenizer = make_tokenizer("plain")
    (example,), _, _ = _split(["Hi 😀"], tokenizer, 6)  # the emoji's last byte is to be said
    assert len(example.target_ids) == 1
    (other,), _, _ = _split(["Hi 😁"], tokenizer, 6)
    assert other.prompt_ids == example.prompt_ids
    right = _decoding(example, example.target_ids, tokenizer)
    wrong = _decoding(example, other.target_ids, tokenizer)
    assert (right["decoded_recalled"], wrong["decoded_recalled"]) == (True, False)
    (cut,), _, _ = _split(["Hi 😀!"], tokenizer, 3, n_suffix=2)  # and one that ends within it
    said = _decoding(cut, (*cut.target_ids, *tokenizer("!!")["input_ids"]), tokenizer)
    assert said["decoded_recalled"]


def test_documents_are_read_as_people_have_them(tmp_path):
    bad = BadRows()
    assert [d.text for d in read_documents(["One.", "Two.", "One."], bad=bad)] == ["One.", "Two."]
    rows = [{"content": "One.", "prompt": "kept apart"}]
    assert [d.text for d in read_documents(rows, field="content", bad=bad)] == ["One."]
    assert len(bad) == 0
    (tmp_path / "a.txt").write_text("A whole file.\n", encoding="utf-8")
    assert [d.text for d in read_documents(tmp_path / "a.txt", bad=bad)] == ["A whole file.\n"]
    rows = [
        {"text": "x", "prompt": "Ann:"},
        {"body": "x"},
        Record(prompt="a", completion="b", id="r"),
    ]
    rows += [{"text": 5}, {"text": "fine", "prompt": None}]
    assert [d.text for d in read_documents(rows, bad=bad)] == ["fine"]
    first, second, third, fourth = bad.reasons.values()
    assert "the row has 'prompt', so it is no document" in first
    assert "no field 'text'; the fields are body" in second
    assert "has 'prompt'" in third
    assert "is a int (5), not text" in fourth
    with pytest.raises(DataError, match="no documents"):
        read_documents([], bad=BadRows())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prefix_tokens": 0}, "1 or more"),
        ({"suffix_tokens": 5}, "needs prefix_tokens"),
        ({"prefix_tokens": 5, "prompt_format": "chat"}, "bare text"),
        ({"prefix_tokens": 5, "specificity": True}, "no prompts of their own"),
        ({"prefix_tokens": 5, "template_args": ("a=1",)}, "no prompts of their own"),
    ],
)
def test_what_does_not_go_with_documents_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        AuditConfig(**settings)


def test_neither_certificates_nor_servers_are_about_documents(tmp_path, phone_file, capsys):
    command = ["audit", str(phone_file), "--prefix-tokens", "5"]
    assert main([*command, "--endpoint", "http://localhost:1", "--name", "x"]) == 2
    assert "--prefix-tokens: no model is loaded here" in " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_without_an_end_token_needs_none(llama, said, tmp_path, make_tokenizer):
    words = make_tokenizer("plain")
    words.eos_token = None
    words.save_pretrained(tmp_path)
    found = memlaw.audit(said, model=str(llama), tokenizer=str(tmp_path), prefix_tokens=N)
    assert found.n_recalled == len(said)
