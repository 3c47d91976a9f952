"""The records that a run is about, read as its settings say."""

from __future__ import annotations

from typing import Any

from memlaw.core.observer import Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.reading import read_records
from memlaw.data.record import Record
from memlaw.settings.write import WriteConfig


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
