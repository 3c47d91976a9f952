"""`ask` for folders of one adapter and of many: a prompt goes to the adapter that it belongs to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError, DataError, OutputError
from memlaw.core.files import json_sha256
from memlaw.core.observer import Observer
from memlaw.data.duplicates import shortened
from memlaw.data.encoding import PromptFormat
from memlaw.data.record import ARGUMENTS, Prompt, Record, given_of, with_given
from memlaw.data.rendering import named_arguments
from memlaw.measure import asking
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.asking import Answer, Question
from memlaw.shards.layout import (
    index_key,
    is_sharded,
    prompt_sha256,
    read_index,
    shard_folder,
)
from memlaw.shards.loading import own_base, router_of
from memlaw.shards.routing import Route
from memlaw.writer.private import read_private_records

_SHOWN = 100  # characters


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
    threshold: float | None = None,
    observer: Observer | None = None,
) -> Answer:
    """Give an adapted model a prompt, and decode greedily until it ends its turn.

    Where the folder keeps its records, and one of them has this prompt with more for the chat
    template in its row (`tools`, `chat_template_kwargs`), the template gets that, too.

    In a folder of shards the adapter is that of the record with this prompt; else that of the
    record whose prompt is nearest, see `memlaw.shards.routing`; or the bare model answers.

    Args:
        adapter: a folder that `write`, `write_shards` or PEFT wrote; None: the bare model is asked.
        prompt, system, model, tokenizer, prompt_format, template_args, max_tokens: see
            `memlaw.measure.asking.ask`.
        threshold: of shards: the likeness, up to 1, under which the bare model answers; None: the
            folder's own.
        observer: is told of progress.

    Returns:
        The answer; of shards with where the prompt went.

    Raises:
        MemlawError: as for `audit`; or the folder's index or certificate can't be read; or several
            records have this prompt, each with more of its own for the template.
    """
    how: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer,
        "prompt_format": prompt_format,
        "template_args": template_args,
        "max_tokens": max_tokens,
        "observer": observer,
    }
    if adapter is None or not is_sharded(adapter):
        if threshold is not None:
            raise ConfigError(
                "threshold is about shards, and there are none to choose from. Leave it out."
            )
        if adapter is None or prompt is None or not Path(adapter).is_dir():
            return asking.ask(adapter, prompt, system=system, **how)
        return asking.ask(adapter, _asked(Path(adapter), prompt, system, how), **how)
    folder = Path(adapter)
    asked = _asked(folder, prompt, system, how)
    name = read_index(folder).adapter_of(asked, index_key(folder))
    route = Route(adapter=name, exact=True)
    if name is None:
        base = own_base(folder, model, observer or Observer(), tokenizer)
        route = router_of(folder, base, threshold).route(asked)
        how |= {"model": model or base.spec, "base": base}
    of_one = None if route.adapter is None else shard_folder(folder, route.adapter)
    answer = asking.ask(of_one, asked, **how)
    return dataclasses.replace(answer, adapter=route.adapter or "", likeness=route.likeness)


def _asked(folder: Path, prompt: Question, system: str | None, how: Mapping[str, Any]) -> Prompt:
    """The prompt as records have it, with what its record's row gives the chat template.

    Raises:
        DataError: several records have it, and which is meant can't be told.
    """
    asked = asking.question(AdapterFolder(folder), prompt, system)
    if given_of(asked):
        return asked
    name, said = prompt_sha256(asked), named_arguments(how["template_args"] or ())
    rows = [
        given_of(record.prompt)
        for record in _records_kept(folder)
        if prompt_sha256(with_given(record.prompt, {})) == name
    ]
    # What was said chooses: at least it must not be contradicted.
    own = [row.get(ARGUMENTS, {}) for row in rows]
    says = [r for r, o in zip(rows, own, strict=True) if said.items() <= o.items()]
    fits = [r for r, o in zip(rows, own, strict=True) if all(said.get(k, o[k]) == o[k] for k in o)]
    rows = list({json_sha256(row): row for row in says or fits}.values())
    if not rows or {} in rows:
        return asked
    shown = [shortened(json.dumps(row, ensure_ascii=False), _SHOWN) for row in rows[:3]]
    if len(rows) > 1:
        raise DataError(
            f"{len(rows)} records have this prompt, each with more of its own for the chat "
            f"template: {'; '.join(shown)}. Choose by --template-args, or ask with the row itself, "
            'a JSON object of "prompt" or "messages" and these fields.'
        )
    if how["observer"] is not None:
        how["observer"].notice(f"The chat template is given what the record's row has: {shown[0]}.")
    return with_given(asked, rows[0])


def _records_kept(folder: Path) -> list[Record]:
    try:
        return read_private_records(folder) or []
    except (OSError, OutputError):  # whoever may not read them asks as they say
        return []
