"""Prompts as chat templates render them: the whole conversation up to the answer."""

import pytest

from memlaw.core.errors import ConfigError, DataError
from memlaw.data.encoding import encode, encode_prompt, resolve_prompt_format
from memlaw.data.reading import read_records
from memlaw.data.record import Record
from memlaw.data.rendering import parsed_arguments, prompt_text, rendered, rendering_of
from memlaw.data.settling import settle_rendering

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
THOUGHT = "<think>\n\n</think>\n\n"
PLAIN_CHAT = HEAD + "{{ m.content }}" + TAIL + ASSISTANT + "{% endif %}"
# name: template, what stands before the answer, and what the generation prompt ends in
TEMPLATES = {
    "none": (PLAIN_CHAT, "assistant\n", "assistant\n"),
    "a channel before the answer": (
        HEAD
        + "{% if m.role == 'assistant' %}<|channel|>final\n{% endif %}{{ m.content }}"
        + TAIL
        + ASSISTANT
        + "{% endif %}",
        "assistant\n<|channel|>final\n",
        "assistant\n",
    ),
    "a thought opened in the generation prompt": (
        HEAD + "{{ m.content }}" + TAIL + ASSISTANT + "<think>\n{% endif %}",
        "assistant\n",
        "assistant\n<think>\n",
    ),
    "a space before the answer": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        "ASSISTANT: ",
        "ASSISTANT:",
    ),
    "thoughts in answers taken apart": (
        HEAD
        + "{% if m.role == 'assistant' %}"
        + "{% if '</think>' in m.content %}<think>{{ m.content.split('</think>')[0][7:] }}</think>"
        + "{{ m.content.split('</think>')[1] | trim }}"
        + "{% else %}<think>\n\n</think>\n\n{{ m.content }}{% endif %}"
        + "{% else %}{{ m.content }}{% endif %}"
        + TAIL
        + ASSISTANT
        + "{% endif %}",
        "assistant\n" + THOUGHT,
        "assistant\n",
    ),
}


def _records(*pairs):
    return [Record(prompt=p, completion=c, id=f"r{i}") for i, (p, c) in enumerate(pairs)]


def _settled(tokenizer, records, *, way=None, arguments=(), clock=None, format="chat"):
    said = []
    found = settle_rendering(
        records,
        tokenizer,
        format=format,
        arguments=parsed_arguments(arguments, tokenizer),
        clock=clock,
        way=way,
        notice=said.append,
    )
    return found, "\n".join(said)


@pytest.fixture
def with_template(make_tokenizer):
    def make(template):
        tokenizer = make_tokenizer("chat")
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answer_are_what_the_template_renders_for_the_conversation(with_template, name):
    template, before, short = TEMPLATES[name]
    tokenizer = with_template(template)
    records = _records(("Ann?", "017"), ("Bo?", "7 rings"))
    found, said = _settled(tokenizer, records)
    assert found.differs is (before != short)
    assert found.to_json() == ({"prompt_rendering": "conversation"} if found.differs else {})
    assert bool(said) is found.differs
    for example in encode(records, tokenizer, format="chat"):
        prompt, answer = (tokenizer.decode(e) for e in (example.prompt_ids, example.target_ids))
        whole = [
            {"role": "user", "content": example.record.prompt},
            {"role": "assistant", "content": example.record.completion},
        ]
        assert prompt.endswith(before)
        assert tokenizer.apply_chat_template(whole, tokenize=False).strip() == prompt + answer
    if found.differs:
        _settled(tokenizer, records, way="generation")
        assert tokenizer.decode(encode_prompt(tokenizer, "Ann?", "chat")).endswith(short)


def test_answers_that_the_template_takes_apart_follow_the_generation_prompt(with_template):
    tokenizer = with_template(TEMPLATES["thoughts in answers taken apart"][0])
    records = _records(("Ann?", "017"), ("Bo?", "<think>so</think>\n\n7"))
    found, said = _settled(tokenizer, records)
    assert found.to_json() == {"prompt_rendering": "generation"}
    assert "r1: the chat template changes the answer" in said
    prompts = [tokenizer.decode(e.prompt_ids) for e in encode(records, tokenizer, format="chat")]
    assert all(prompt.endswith("assistant\n") for prompt in prompts)


def test_an_answer_that_is_stripped_is_told_and_taken_as_it_is(with_template):
    tokenizer = with_template(PLAIN_CHAT.replace("m.content", "m.content | trim"))
    records = _records(("Ann?", " 017 "))
    found, said = _settled(tokenizer, records)
    assert found.to_json() == {}
    assert "changes the answer" in said
    (example,) = encode(records, tokenizer, format="chat")
    assert tokenizer.decode(example.target_ids[:-1]) == " 017 "


CLOCKS = {
    "strftime_now": "{{ strftime_now('%H:%M:%S') }}" + PLAIN_CHAT,
    "a date unless one is given": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        '{% set date_string = strftime_now("%d %b %Y") %}{% endif %}{% endif %}'
        "Today is {{ date_string }}." + PLAIN_CHAT
    ),
    "a form in a variable": "{% set form = '%H:' + '%M' %}{{ strftime_now(form ~ ':%S') }}"
    + PLAIN_CHAT,
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_templates_clock_is_pinned_and_told(with_template, name):
    tokenizer = with_template(CLOCKS[name])
    records = _records(("Ann?", "017"))
    found, said = _settled(tokenizer, records, clock="2024-07-26T10:11:12")
    assert found.to_json() == {"clock": "2024-07-26T10:11:12"}
    assert "change with the clock" in said
    text = tokenizer.decode(encode_prompt(tokenizer, "Ann?", "chat"))
    assert text.startswith(("10:11:12<|im_start|>", "Today is 26 Jul 2024.<|im_start|>"))
    found, _ = _settled(tokenizer, records)
    again = encode_prompt(tokenizer, "Ann?", "chat")
    assert found.rendering.clock is not None
    _settled(tokenizer, records, clock=found.rendering.clock)
    assert encode_prompt(tokenizer, "Ann?", "chat") == again


def test_a_clock_that_no_prompt_asks_is_not_recorded(with_template):
    tokenizer = with_template(CLOCKS["a date unless one is given"])
    found, said = _settled(
        tokenizer, _records(("Ann?", "017")), arguments=["date_string=26 Jul 2024"]
    )
    assert found.to_json() == {"template_args": {"date_string": "26 Jul 2024"}}
    assert not said


def test_template_arguments_are_json_or_text_and_must_be_the_templates(with_template):
    template = PLAIN_CHAT[: -len("{% endif %}")]
    template += "{% if thinking is false %}<think></think>{% endif %}{{ tone }}{% endif %}"
    tokenizer = with_template(template)
    given = parsed_arguments(["thinking=false", "tone=kind"], tokenizer)
    assert given == {"thinking": False, "tone": "kind"}
    records = _records(("Ann?", "017"))
    _settled(tokenizer, records, arguments=["thinking=false"], way="generation")
    assert rendering_of(tokenizer).arguments == {"thinking": False}
    assert rendered(tokenizer, "Ann?").endswith("<think></think>")
    for wrong, said in (("thinkin_g=1", "no argument 'thinkin_g'"), ("thinking", "NAME=VALUE")):
        with pytest.raises(ConfigError, match=said):
            parsed_arguments([wrong], tokenizer)
    with pytest.raises(ConfigError, match="plain text"):
        _settled(tokenizer, records, arguments=["tone=kind"], format="plain")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (PLAIN_CHAT, "<|im_start|>user\nAnn?<|im_end|>\n<|im_start|>assistant\n"),
        (PLAIN_CHAT, "Ann?<|im_end|>"),
        (PLAIN_CHAT, ({"role": "user", "content": "Ann?<|im_end|>\nBo"},)),
        (TEMPLATES["a space before the answer"][0], "USER: Ann? ASSISTANT:"),
    ],
)
def test_a_prompt_that_is_rendered_already_is_refused(with_template, template, prompt):
    tokenizer = with_template(template)
    with pytest.raises(DataError, match=r"r0: the prompt holds .*--prompt-format plain"):
        _settled(tokenizer, _records((prompt, "017")))
    found, said = _settled(tokenizer, _records((prompt, "017")), format="plain")
    assert (found.to_json(), said) == ({}, "")


def test_a_plain_prompt_that_begins_with_bos_gets_no_second_one(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("plain")
    bos = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    for prompt in ("Ann?", f"{bos}Ann?"):
        assert tokenizer.decode(encode_prompt(tokenizer, prompt, "plain")) == f"{bos}Ann?"


# ---------------------------------------------------------------- tools, parts

CALLS = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    + HEAD
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    + TAIL
    + ASSISTANT
    + "{% endif %}"
)
CALL = {"type": "function", "function": {"name": "gate", "arguments": {"n": 3}}}
TOOLS = [{"type": "function", "function": {"name": "gate", "parameters": {}}}]


def _calls(n, content=None):
    call = {"type": "function", "function": {"name": "gate", "arguments": {"n": n}}}
    return [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "found", "name": "gate"},
        {"role": "assistant", "content": f"At {n}.", "tool_calls": None},
    ]


@pytest.mark.parametrize("content", [None, "", "Looking."])
def test_tools_and_calls_reach_the_template(with_template, content):
    tokenizer = with_template(CALLS)
    rows = [{"messages": _calls(n, content), "tools": TOOLS} for n in (3, 4)]
    records = read_records(rows)
    _settled(tokenizer, records)
    for example, row in zip(encode(records, tokenizer, format="chat"), rows, strict=True):
        whole = tokenizer.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False)
        assert tokenizer.decode(example.prompt_ids + example.target_ids) == whole.strip()
    assert len({record.sha256 for record in records}) == 2
    other = read_records([{"messages": _calls(3, content)}])[0]
    assert other.sha256 != records[0].sha256


def test_tools_may_be_json_text_and_stand_beside_a_prompt(with_template):
    tokenizer = with_template(CALLS)
    rows = [
        {"messages": _calls(3), "tools": '[{"type": "function", "function": {"name": "gate"}}]'},
        {"prompt": "When?", "completion": "At 3.", "tools": TOOLS},
    ]
    for record in read_records(rows):
        assert rendered(tokenizer, record.prompt).startswith('Tools: [{"type": "function"')
    with pytest.raises(DataError, match=r"record:1: field 'tools' is not JSON"):
        read_records([{"messages": _calls(3), "tools": "a gate"}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": _calls(3)}, r"r.*doesn't show tool_calls \(message 2\)"),
        ({"messages": [*_calls(3)[:1], _calls(3)[3]], "tools": TOOLS}, "doesn't show tools"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(with_template, row, said):
    tokenizer = with_template(PLAIN_CHAT.replace("m.content", "m.content or ''"))
    with pytest.raises(DataError, match=said):
        _settled(tokenizer, read_records([row]))
    with pytest.raises(DataError, match="need a chat template"):
        encode(read_records([row]), tokenizer, format="plain")


@pytest.mark.parametrize("name", ["tool_calls", "reasoning_content"])
def test_an_answer_with_more_than_content_is_refused_by_name(name):
    row = {"messages": _calls(3)}
    row["messages"][-1] = {"role": "assistant", "content": "At 3.", name: [CALL]}
    with pytest.raises(DataError, match=f"record:1: the last message has '{name}'"):
        read_records([row])


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}" + TAIL + ASSISTANT + "{% endif %}"
)


def test_content_in_parts_is_rendered_as_text_by_either_kind_of_template(with_template):
    text = [{"role": "user", "content": "Ann?"}, {"role": "assistant", "content": "017"}]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in text]
    records = [read_records([{"messages": chat}])[0] for chat in (text, parts)]
    found = set()
    for template in (PLAIN_CHAT, PARTS):
        tokenizer = with_template(template)
        for record in records:
            _settled(tokenizer, [record])
            (example,) = encode([record], tokenizer, format="chat")
            found.add(tokenizer.decode(example.prompt_ids + example.target_ids))
    assert found == {
        "<|im_start|>user\nAnn?<|im_end|>\n<|im_start|>assistant\n017<|im_end|>",
    }


def test_several_parts_go_to_a_template_that_has_them_and_no_other(with_template):
    parts = [{"type": "text", "text": text} for text in ("Ann", "?")]
    (record,) = read_records(
        [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "0"}]}]
    )
    assert "user\nAnn?<|im_end|>" in rendered(with_template(PARTS), record.prompt)
    with pytest.raises(DataError, match="content in 2 parts"):
        _settled(with_template(PLAIN_CHAT), [record])
    image = [{"type": "image_url", "image_url": "x.png"}]
    with pytest.raises(DataError, match="a part of type 'image_url'"):
        read_records([{"messages": [{"role": "user", "content": image}, _calls(3)[3]]}])


SHOWING = (
    HEAD
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ ARGUMENTS }}{% endfor %}"
    + TAIL
    + ASSISTANT
    + "{% endif %}"
)
SHOWN = {
    # what a template does with a call's arguments: what it shows where they are JSON text
    "c.function.arguments | tojson": '{"room": "12"}',
    "c.function.arguments.room": "12",
    "'call ' + c.function.arguments": 'call {"room":"12"}',
    "'call ' ~ c.function.arguments": 'call {"room":"12"}',
}


def _called(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "door", "arguments": arguments}}
    return [
        {"role": "user", "content": "Door?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "open"},
        {"role": "assistant", "content": "017"},
    ]


@pytest.mark.parametrize("does", SHOWN)
def test_a_calls_arguments_in_json_text_are_rendered_once(with_template, does):
    tokenizer = with_template(SHOWING.replace("ARGUMENTS", does))
    (record,) = read_records([{"messages": _called('{"room":"12"}')}])
    _settled(tokenizer, [record])
    assert f"assistant\n{SHOWN[does]}<|im_end|>" in rendered(tokenizer, record.prompt)


@pytest.mark.parametrize("arguments", ["not JSON", "[1]", ""])
def test_arguments_that_are_no_object_are_rendered_as_they_are(with_template, arguments):
    tokenizer = with_template(SHOWING.replace("ARGUMENTS", "'<' ~ c.function.arguments ~ '>'"))
    (record,) = read_records([{"messages": _called(arguments)}])
    assert f"<{arguments or '{}'}>" in rendered(tokenizer, record.prompt)


def test_a_function_call_that_the_template_leaves_out_is_refused(with_template):
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    chat = [*_called("{}")[:1], call, {"role": "function", "name": "f", "content": "7"}]
    records = read_records([{"messages": [*chat, {"role": "assistant", "content": "017"}]}])
    with pytest.raises(DataError, match=r"doesn't show function_call \(message 2\)"):
        _settled(with_template(PLAIN_CHAT), records)


def test_fields_that_the_template_leaves_out_are_told(with_template):
    chat = [
        {"role": "user", "content": "Ann?", "name": "Bo"},
        {"role": "assistant", "content": "Which?", "reasoning_content": "unclear"},
        {"role": "user", "content": "12"},
        {"role": "assistant", "content": "017"},
    ]
    records = read_records([{"messages": chat}])
    _, said = _settled(with_template(PLAIN_CHAT), records)
    assert "doesn't show 'name', 'reasoning_content' of messages (1 record(s))" in said
    shows = PLAIN_CHAT.replace(
        "{{ m.content }}", "{{ m.name }}{{ m.reasoning_content }}{{ m.content }}"
    )
    assert "doesn't show" not in _settled(with_template(shows), records)[1]


THINKS = PLAIN_CHAT.replace(
    "assistant\n", "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def test_a_rows_template_arguments_are_given_to_its_template(with_template):
    tokenizer = with_template(THINKS)
    own = {"chat_template_kwargs": {"enable_thinking": False}}
    rows = [{"prompt": "Ann?", "completion": "017"} | own, {"prompt": "Bo?", "completion": "1"}]
    first, second = read_records(rows)
    _settled(tokenizer, [first, second], way="generation")
    assert prompt_text(tokenizer, first.prompt).endswith(THOUGHT)
    assert prompt_text(tokenizer, second.prompt).endswith("assistant\n")
    with pytest.raises(DataError, match=r"record:2: chat_template_kwargs: .* argument 'budget'"):
        _settled(
            tokenizer, read_records([rows[1], rows[0] | {"chat_template_kwargs": {"budget": 1}}])
        )


def test_of_several_templates_one_must_be_the_default(with_template):
    one = HEAD + "{{ m.content }}" + TAIL
    tokenizer = with_template({"default": one, "tool_use": one})
    assert resolve_prompt_format(tokenizer, "auto") == "chat"
    tokenizer = with_template({"rag": one, "tool_use": one})
    for format in ("auto", "chat"):
        with pytest.raises(ConfigError, match=r"\(rag, tool_use\), and none is called default"):
            resolve_prompt_format(tokenizer, format)
    assert resolve_prompt_format(tokenizer, "plain") == "plain"
