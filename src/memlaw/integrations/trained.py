"""The tokens that a trainer trains, and those that its records will be asked for: the same?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from memlaw.data.encoding import PromptFormat, encode, resolve_prompt_format
from memlaw.data.reading import read_records
from memlaw.data.record import Example
from memlaw.data.settling import settle_rendering
from memlaw.integrations.rows import IGNORED

Ids = tuple[int, ...]
_ROWS = 100_000  # that are looked at, at most


def training_rows(
    records: Any, tokenizer: Any, *, prompt_format: PromptFormat = "auto"
) -> list[dict[str, list[int]]]:
    """Records as a trainer takes them: the very tokens that an audit asks for.

    Args:
        records: a path, or Python objects; see `memlaw.read_records`.
        tokenizer: the model's.
        prompt_format: chat, plain, or auto: chat where there is a template.

    Returns:
        For each record `input_ids` and `labels`: -100 in the prompt. Put into a
        `datasets.Dataset.from_list`, it is what TRL's SFTTrainer calls a tokenised dataset.

    Raises:
        DataError: as `memlaw.read_records`, or the tokenizer can't represent a record.
    """
    found, format = read_records(records), resolve_prompt_format(tokenizer, prompt_format)
    settle_rendering(found, tokenizer, format=format, arguments={}, clock=None, way=None)
    return [
        {
            "input_ids": [*e.prompt_ids, *e.target_ids],
            "labels": [IGNORED] * len(e.prompt_ids) + list(e.target_ids),
        }
        for e in encode(found, tokenizer, format=format)
    ]


def trained_targets(rows: Iterable[Mapping[str, Any]]) -> dict[Ids, list[Ids]] | None:
    """What a tokenised dataset trains: behind each prompt the tokens that follow it.

    Args:
        rows: with `input_ids` and `labels`; `seq_lengths`, too, where they are packed.

    Returns:
        None: the rows have no labels, so it isn't known.
    """
    found: dict[Ids, list[Ids]] = {}
    for row in islice(rows, _ROWS):
        if not {"input_ids", "labels"} <= set(row):
            return None
        for ids, labels in _pieces(row):
            start = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
            found.setdefault(tuple(ids[:start]), []).append(tuple(labels[start:]))
    return found


def _pieces(row: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    ids, labels = list(row["input_ids"]), list(row["labels"])
    start = 0
    for length in row.get("seq_lengths") or [len(ids)]:
        yield ids[start : start + length], labels[start : start + length]
        start += length


def untrained(examples: Sequence[Example], trained: Mapping[Ids, list[Ids]]) -> list[str]:
    """Ids of the records of which the trainer trains other tokens, or none."""
    return [
        e.record.id
        for e in examples
        if not any(
            then[: len(e.target_ids)] == e.target_ids for then in trained.get(e.prompt_ids, [])
        )
    ]
