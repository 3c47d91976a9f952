"""The records that a run is about, read as its settings say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlaw.core.files import write_text, writing
from memlaw.core.observer import Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.encoding import encode, resolve_prompt_format
from memlaw.data.reading import read_records
from memlaw.data.record import Record
from memlaw.data.rendering import parsed_arguments
from memlaw.data.settling import settle_rendering
from memlaw.model.base import BaseModel
from memlaw.settings.write import WriteConfig
from memlaw.writer.folder import SKIPPED_FILE


def records_of(data: Any, config: WriteConfig, bad: BadRows, observer: Observer) -> list[Record]:
    """The records of some data; as `read_records`, which says what is refused.

    Args:
        data: a path, or Python objects.
        config: how they are read.
        bad: takes the rows that can't be used.
        observer: is told of what isn't usual.
    """
    return read_records(
        data,
        prompt_field=config.prompt_field,
        completion_field=config.completion_field,
        format=config.data_format,
        delimiter=config.delimiter,
        recite_prompt=config.recite_prompt,
        paraphrases=config.paraphrases,
        bad=bad,
        notice=observer.notice,
    )


def known_records(data: Any, config: WriteConfig, observer: Observer) -> list[Record]:
    """As `records_of`; bad rows are refused, or told and left out, as the settings say.

    Raises:
        DataError: there are some, and they aren't to be left out.
    """
    bad = BadRows()
    records = records_of(data, config, bad, observer)
    bad.settle(len(records), skip=config.skip_bad, notice=observer.notice)
    return records


def usable_records(
    records: Sequence[Record],
    base: BaseModel,
    config: WriteConfig,
    bad: BadRows,
    observer: Observer,
    *,
    clock: str | None = None,
) -> tuple[list[Record], str | None, WriteConfig]:
    """The records that can be written, seen together before the first of them is trained.

    Args:
        records, base, config: what, and into what, and how.
        bad: rows that can't be used so far; takes more.
        observer: is told of what isn't usual.
        clock: the time that chat templates are told; None: now, if they ask.

    Returns:
        The records, the time that chat templates are told, and the settings with what was settled
        of how prompts are rendered: all shards are to have the same.

    Raises:
        DataError: there are bad ones, and they aren't to be left out.
    """
    tokenizer, format = base.tokenizer, resolve_prompt_format(base.tokenizer, config.prompt_format)
    found = settle_rendering(
        records,
        tokenizer,
        format=format,
        arguments=parsed_arguments(config.template_args, tokenizer),
        clock=clock,
        way=config.prompt_rendering,
        bad=bad,
        notice=observer.notice,
    )
    examples = encode(records, tokenizer, format=format, max_tokens=base.context_length, bad=bad)
    bad.settle(len(examples), skip=config.skip_bad, notice=observer.notice)
    if found.differs:
        config = dataclasses.replace(config, prompt_rendering=found.rendering.way)
    return [example.record for example in examples], found.rendering.clock, config


def write_skipped(out: Path, bad: BadRows) -> None:
    """Write which rows were left out, each with the reason; nothing if none was."""
    path = out / SKIPPED_FILE
    if bad.reasons:
        rows = [{"row": row, "reason": reason} for row, reason in bad.reasons.items()]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        with writing(path):
            path.unlink(missing_ok=True)
