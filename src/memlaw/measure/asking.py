"""Ask an adapted model something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError, DataError
from memlaw.core.observer import Observer
from memlaw.data.encoding import PromptFormat, encode_prompt, end_of_turn_id
from memlaw.data.messages import ROW_FIELDS, checked_chat
from memlaw.data.readers import RECITE_PROMPT
from memlaw.data.record import ARGUMENTS, Message, Prompt, Record, text_of, with_given
from memlaw.data.rendering import MARK, named_arguments, refusals
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.decode import decoded_text, greedy_decode
from memlaw.measure.session import Session
from memlaw.model.base import BaseModel
from memlaw.model.vocabulary import require_rows
from memlaw.settings.audit import AuditConfig
from memlaw.settings.given import with_settings

Question = str | Sequence[Message] | Mapping[str, Any] | None
_ASK_MAX_TOKENS = 512


def ask(
    adapter: str | Path | None,
    prompt: Question = None,
    *,
    system: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    prompt_format: PromptFormat = "auto",
    template_args: Mapping[str, Any] | Sequence[str] | None = None,
    max_tokens: int | None = None,
    observer: Observer | None = None,
    base: BaseModel | None = None,
) -> Answer:
    """Give an adapted model a prompt, and decode greedily until it ends its turn.

    Args:
        adapter: a folder that `write` or PEFT wrote; None: the bare model is asked.
        prompt: the prompt: a text, or chat messages, or a row as data have it, without its answer:
            `prompt` or `messages`, and `tools` or `chat_template_kwargs` for the template; None:
            the one that a plain text is recited on.
        system: a system message that stands before it; None: none.
        model: the base model; None: the adapter's own.
        tokenizer: folder or hub id of the tokenizer; None: the adapter folder's own, else the base
            model's.
        prompt_format, template_args: as of `AuditConfig`.
        max_tokens: most tokens to generate, ≥ 1; None: as many as the longest record in the
            folder's certificate has, or 512 without a certificate.
        observer: is told of progress.
        base: the base model, where it is loaded already.

    Raises:
        MemlawError: as for `audit`; or the folder's certificate can't be read.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be 1 or more.")
    config = with_settings(
        AuditConfig(
            adapter=None if adapter is None else Path(adapter),
            model=model,
            tokenizer=tokenizer,
            prompt_format=prompt_format,
        ),
        {} if template_args is None else {"template_args": template_args},
    )
    session = Session(config, observer or Observer(), base=base)
    session.require_own_base()
    asked = question(session.folder, prompt, system)
    limited = max_tokens is not None
    if max_tokens is None:
        max_tokens = session.folder.longest_record() or _ASK_MAX_TOKENS
    words, format = session.base.tokenizer, session.prompt_format
    session.settle([Record(prompt=asked, completion=MARK, id="the prompt")])
    end = end_of_turn_id(words, format)
    with refusals("the prompt"):
        prompt_ids = encode_prompt(words, asked, format)
    with session.model() as adapted:
        require_rows(adapted, words, [prompt_ids])
        (ids,) = greedy_decode(
            adapted,
            [prompt_ids],
            end_id=end,
            max_tokens=[max_tokens],
        )
    finished = bool(ids) and ids[-1] == end
    text = decoded_text(words, ids[:-1] if finished else ids)
    known = finished or not limited
    arguments = named_arguments(config.template_args or ())
    return Answer(
        text=text,
        finished=finished,
        missing=session.missing(prompt_ids),
        on_record=session.folder.on_record(_hashes(asked, text, arguments)) if known else None,
    )


def question(folder: AdapterFolder, prompt: Question, system: str | None) -> Prompt:
    """What is asked, as records have it; of an adapter's folder.

    Raises:
        DataError: it is empty, or no text and no messages; or a row with an answer.
    """
    row: Mapping[str, Any] = {}
    if prompt is None:
        prompt = str(folder.setting("recite_prompt", RECITE_PROMPT))
    if isinstance(prompt, Mapping):
        row, prompt = prompt, prompt.get("messages", prompt.get("prompt", ""))
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError("the prompt is empty. Ask something.")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise DataError("the prompt holds half a surrogate pair. Give it as UTF-8.")
        if system is None and not any(row.get(name) for name in (*ROW_FIELDS, ARGUMENTS)):
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    first = [] if system is None else [{"role": "system", "content": system}]
    asked = tuple(checked_chat([*first, *prompt], "the prompt", row))
    if row and asked[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an answer. Leave the assistant's last message out.")
    return asked


def _hashes(prompt: Prompt, answer: str, arguments: Mapping[str, Any]) -> set[str]:
    """Of the records that a question and its answer may be.

    One message may be given as a text, too; and arguments for all as those of the record's row.
    """
    forms: list[Prompt] = [prompt]
    if isinstance(prompt, str):
        forms.append(({"role": "user", "content": prompt},))
    elif len(prompt) == 1 and dict(prompt[0]).keys() == {"role", "content"}:
        forms.append(text_of(prompt[0]))
    if arguments:
        forms += [with_given(form, {ARGUMENTS: dict(arguments)}) for form in forms]
    return {Record(prompt=form, completion=answer, id="asked").sha256 for form in forms}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered.

    Attributes:
        text: exactly what was decoded, without the end-of-turn token.
        finished: the model ended its turn within the limit.
        missing: what an activated adapter looks for in a prompt, and this prompt hasn't: the answer
            is the bare model's. None: the adapter was active.
        on_record: prompt and answer are those of a record in the folder's certificate; None: there
            is no certificate, not the private file that names its records, or the answer was cut
            off at `max_tokens`.
        adapter: of a folder of shards, the one that answered; "" where the bare model did.
        likeness: of its prompt to the nearest record's, up to 1; None: it is a record's own.
    """

    text: str
    finished: bool
    missing: str | None = None
    on_record: bool | None = None
    adapter: str | None = None
    likeness: float | None = None
