"""A `Modelfile`: with it Ollama serves an export, and asks as the audit did."""

from __future__ import annotations

from memlaw.data.encoding import encode_prompt, end_of_turn_id
from memlaw.data.rendering import prompt_text
from memlaw.measure.decode import decoded_text
from memlaw.measure.examine import Audit
from memlaw.measure.session import Session
from memlaw.settings.export import Form

_MARK = "memlaw7prompt"  # stands for a user's text
_FROM = {
    "merged": "FROM .",
    "gguf": "FROM ./model.gguf",
    "gguf-lora": "# The base model as a GGUF file, or by its name in Ollama.\nFROM ./base.gguf\n"
    "ADAPTER ./adapter.gguf",
}


def modelfile(session: Session, audit: Audit, form: Form) -> str:
    """The text of a `Modelfile`: greedy, no penalties, the audited prompt for one user message.

    Ollama is not run here: ask the export there with `memlaw audit DATA --endpoint`.
    """
    tokenizer, format = session.base.tokenizer, session.prompt_format
    if format == "chat":
        text = prompt_text(tokenizer, _MARK)
    else:
        text = decoded_text(tokenizer, encode_prompt(tokenizer, _MARK, "plain"))
    start = tokenizer.bos_token
    if start and text.startswith(start):  # the server puts it there itself
        text = text.removeprefix(start)
    # Its templates are Go's, in which two braces begin an action.
    text = text.replace("{{", '{{ "{{" }}').replace(_MARK, "{{ .Prompt }}")
    end = decoded_text(tokenizer, [end_of_turn_id(tokenizer, format)])
    lines = [
        _FROM[form],
        f'TEMPLATE """{text}"""',
        f'PARAMETER stop "{end}"',
        f"PARAMETER num_predict {max(r.n_tokens for r in audit.records)}",
        "PARAMETER temperature 0",
        "PARAMETER top_k 1",
        "PARAMETER repeat_penalty 1",
        "PARAMETER seed 0",
    ]
    return "\n".join(lines) + "\n"
