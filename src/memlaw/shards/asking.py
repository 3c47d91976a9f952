"""`ask` for folders of one adapter and of many: a prompt goes to the adapter that it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError
from memlaw.core.observer import Observer
from memlaw.data.encoding import PromptFormat
from memlaw.data.record import Message
from memlaw.measure import asking
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.asking import Answer
from memlaw.shards.layout import index_key, is_sharded, read_index, shard_folder
from memlaw.shards.loading import own_base, router_of
from memlaw.shards.routing import Route


def ask(
    adapter: str | Path | None,
    prompt: str | Sequence[Message] | None = None,
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
        MemlawError: as for `audit`; or the folder's index or certificate can't be read.
    """
    how: dict[str, Any] = {
        "system": system,
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
        return asking.ask(adapter, prompt, **how)
    folder = Path(adapter)
    asked = asking.question(AdapterFolder(folder), prompt, system)
    name = read_index(folder).adapter_of(asked, index_key(folder))
    route = Route(adapter=name, exact=True)
    if name is None:
        base = own_base(folder, model, observer or Observer())
        route = router_of(folder, base, threshold).route(asked)
        how |= {"model": model or base.spec, "base": base}
    of_one = None if route.adapter is None else shard_folder(folder, route.adapter)
    answer = asking.ask(of_one, prompt, **how)
    return dataclasses.replace(answer, adapter=route.adapter or "", likeness=route.likeness)
