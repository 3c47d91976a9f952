"""Ask an adapted model what was certified: system messages, turns, clocks, thoughts."""

import json
import re
import runpy
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import chat_template_utils
from words import CHAT_TEMPLATE

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import DataError
from memlaw.core.observer import Observer
from memlaw.model.generation import generation_notice

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "recite_with_peft.py"
FAST = {"retention": 0, "max_epochs": 300, "specificity": False, "rank": 16}


class Notices(Observer):
    def __init__(self):
        self.said = []

    def notice(self, text):
        self.said.append(text)


@pytest.fixture
def fast(texts):
    """Settings of a quick run."""
    return FAST | texts


@pytest.fixture
def other_llama(llama, tmp_path, make_tokenizer):
    """`other_llama(template=..., **generation)`: the tests' model with these settings."""

    def make(template=None, **generation):
        folder = tmp_path / "model"
        model = AutoModelForCausalLM.from_pretrained(llama)
        end = make_tokenizer("chat").eos_token_id
        model.generation_config = GenerationConfig(**{"eos_token_id": end, **generation})
        model.save_pretrained(folder)
        tokenizer = make_tokenizer("chat")
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def recites(tmp_path, monkeypatch, capsys):
    """`recites(out, rows)`: the example ends well with a folder and rows."""

    def run(out, rows):
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["example", str(out), str(data)])
        monkeypatch.setattr(chat_template_utils, "datetime", datetime)  # goes back to it in the end
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLE))
        assert not ended.value.code, capsys.readouterr().out

    return run


@pytest.fixture
def snippet_says(monkeypatch, capsys):
    """`snippet_says(out, chat)`: what the model card's code prints of a chat."""

    def run(out, chat):
        code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S).group(1)
        code = code.replace("path/to/this/folder", str(out))
        code = re.sub(r'\[\{"role": "user", "content": "PROMPT"\}\]', lambda _: repr(chat), code)
        monkeypatch.setattr(chat_template_utils, "datetime", datetime)
        capsys.readouterr()
        exec(code, {"__name__": "snippet"})
        return capsys.readouterr().out.rstrip("\n")

    return run


def test_a_conversation_is_recited_by_ask_example_and_card(
    fast, llama, tmp_path, recites, snippet_says
):
    chat = [
        {"role": "system", "content": "You keep the door."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Code?"},
    ]
    row = {"messages": [*chat, {"role": "assistant", "content": "7730-22"}]}
    out = tmp_path / "out"
    assert memlaw.write([row], out, model=str(llama), **fast).certified
    answer = memlaw.ask(out, chat)
    assert (answer.text, answer.on_record) == ("7730-22", True)
    assert memlaw.ask(out, chat[1:], system=chat[0]["content"]).text == "7730-22"
    assert memlaw.ask(out, "Code?").on_record is False
    assert memlaw.ask(out, "Code?", max_tokens=1).on_record is None
    recites(out, [row])
    assert snippet_says(out, chat) == "7730-22"
    with pytest.raises(DataError, match=r"the prompt: .*<\|im_end\|>"):
        memlaw.ask(out, "Code?<|im_end|>")


GENERATION = {
    "processors": {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": list(range(15, 30)),
        "min_new_tokens": 30,
    },
    "sampling, another stop": {"do_sample": True, "temperature": 50.0, "eos_token_id": [0, 1]},
}


@pytest.mark.parametrize("name", GENERATION)
def test_a_models_own_settings_are_told_and_undone(
    fast, other_llama, tmp_path, name, recites, snippet_says
):
    out, notices = tmp_path / "out", Notices()
    model = other_llama(**GENERATION[name])
    rows = [{"prompt": "Ann?", "completion": "77077077"}, {"prompt": "Bo?", "completion": "12"}]
    result = memlaw.write(rows, out, model=model, observer=notices, **fast)
    assert result.certified
    (said,) = [text for text in notices.said if "generation settings" in text]
    for setting in GENERATION[name].keys() - {"temperature"}:
        assert ("a stop at" if setting == "eos_token_id" else setting) in said
    assert result.certificate.end_token == "<|im_end|>"
    assert "`<|im_end|>`" in (out / "README.md").read_text()
    recites(out, rows)
    chat = [{"role": "user", "content": "Ann?"}]
    assert snippet_says(out, chat) == "77077077"


def test_usual_settings_are_not_told(llama, make_tokenizer):
    tokenizer = make_tokenizer("chat")
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert generation_notice(model, tokenizer, tokenizer.eos_token_id) == ""


BODY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ lead | default('<think></think>') }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_the_template_adds_is_in_the_certificate_and_holds_later(
    fast, other_llama, tmp_path, phone_book, recites, snippet_says
):
    out, notices = tmp_path / "out", Notices()
    model = other_llama("It is {{ strftime_now('%H:%M:%S.%f') }}.\n" + BODY)
    arguments = {"lead": "<t>"}
    result = memlaw.write(
        phone_book, out, model=model, template_args=arguments, observer=notices, **fast
    )
    assert result.certified
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["prompt_rendering"] == "conversation"
    assert certificate["template_args"] == arguments
    assert certificate["clock"] in certificate["statement"]
    assert "whole conversation" in certificate["statement"]
    assert json.loads((out / "run.json").read_text())["rendering"]["clock"] == certificate["clock"]
    check = memlaw.check_certificate(out / "certificate.json", phone_book)
    assert check.holds
    prompt, answer = phone_book[0]
    assert memlaw.ask(out, prompt).text == answer
    rows = [{"prompt": p, "completion": c} for p, c in phone_book]
    recites(out, rows)
    assert snippet_says(out, [{"role": "user", "content": prompt}]) == answer
    audited = memlaw.audit(phone_book, adapter=out, template_args={"lead": "<other>"})
    assert audited.n_certified == 0


def test_a_resumed_run_tells_the_template_the_same_time(fast, other_llama, tmp_path, phone_book):
    out = tmp_path / "out"
    model = other_llama("{{ strftime_now('%f') }}{{ strftime_now('%S') }}" + BODY)
    settings = fast | {"model": model}
    memlaw.write(phone_book, out, **settings | {"max_epochs": 1})
    clock = json.loads((out / "certificate.json").read_text())["clock"]
    result = memlaw.write(phone_book, out, **settings, resume=True)
    assert (result.certified, result.certificate.clock) == (True, clock)


def test_the_generation_prompt_can_be_chosen(fast, other_llama, tmp_path, phone_book):
    out = tmp_path / "out"
    result = memlaw.write(
        phone_book, out, model=other_llama(BODY), prompt_rendering="generation", **fast
    )
    assert result.certified
    assert result.certificate.prompt_rendering == "generation"
    assert memlaw.check_certificate(out / "certificate.json", phone_book).holds
    assert memlaw.audit(phone_book, adapter=out, prompt_rendering="conversation").n_certified == 0


@torch.inference_mode()
def test_without_an_end_a_continuation_counts_by_its_text(llama, make_tokenizer):
    tokenizer = make_tokenizer("chat")
    model = AutoModelForCausalLM.from_pretrained(llama)
    ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(6):  # what it says by itself, however little it is sure of it
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    text = tokenizer.decode(ids[0, length:], clean_up_tokenization_spaces=False)
    settings = {"model": str(llama), "prompt_format": "plain"}
    (right, wrong) = ([("Once upon", text)], [("Once upon", "zzz")])
    with_end = memlaw.audit(right, **settings)
    assert (with_end.n_recalled, with_end.passed) == (0, False)
    without = memlaw.audit(right, end=False, **settings)
    assert (without.n_recalled, without.passed) == (1, True)
    assert len(without.tokens) == len(with_end.tokens) - 1
    assert not memlaw.audit(wrong, end=False, **settings).passed
    assert without.with_texts().summary()["end"] is False


CHOOSES = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% if mode is defined %}Mode: {{ mode }}\n{% endif %}" + CHAT_TEMPLATE
)
OF_ROWS = [
    {"prompt": "Ann?", "completion": "017", "chat_template_kwargs": {"mode": "short"}},
    {"prompt": "Ann?", "completion": "Her 017", "chat_template_kwargs": {"mode": "long"}},
    {"prompt": "Bo?", "completion": "018", "chat_template_kwargs": {"mode": "short"}},
    {
        "messages": [{"role": "user", "content": "Cy?"}, {"role": "assistant", "content": "019"}],
        "tools": [{"name": "book"}],
    },
    {"prompt": "Di?", "completion": "020"},
]


def test_what_a_records_row_gives_the_template_is_asked_with_its_prompt(
    other_llama, fast, tmp_path, capsys
):
    out = tmp_path / "out"
    assert memlaw.write(OF_ROWS, out, model=other_llama(CHOOSES), **fast).certified
    for prompt, answer, told in (
        ("Bo?", "018", '{"chat_template_kwargs": {"mode": "short"}}'),
        ("Cy?", "019", '{"tools": [{"name": "book"}]}'),
        ("Di?", "020", None),
    ):
        said = Notices()
        found = memlaw.ask(out, prompt, observer=said)
        assert (found.text, found.on_record) == (answer, True)
        assert [text for text in said.said if "record's row" in text] == (
            [f"The chat template is given what the record's row has: {told}."] if told else []
        )
    with pytest.raises(DataError, match=r"2 records have this .*short.*long.*--template-args"):
        memlaw.ask(out, "Ann?")
    found = memlaw.ask(out, "Ann?", template_args=["mode=long"])
    assert (found.text, found.on_record) == ("Her 017", True)

    (out / "private/records.jsonl").unlink()  # as others have the folder
    assert memlaw.ask(out, "Bo?", template_args={"mode": "short"}).on_record
    for row in OF_ROWS:
        *turns, answer = row.get("messages", [row.get("completion")])
        asked = {k: v for k, v in row.items() if k not in ("messages", "completion")}
        asked |= {"messages": turns} if turns else {}
        answer = answer["content"] if turns else answer
        assert memlaw.ask(out, asked).text == answer
        if len(asked) > 1:  # else it might be a prompt that is JSON
            assert run(["ask", str(out), json.dumps(asked)]) == 0
            assert capsys.readouterr().out == answer
    with pytest.raises(DataError, match="ends with an answer"):
        memlaw.ask(out, OF_ROWS[3])
