"""Merge duplicate records; refuse one prompt with two different completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memlaw.core.errors import DataError
from memlaw.data.record import Record

_SHOWN = 5  # how many records a message lists


def distinct(records: Sequence[Record], notice: Callable[[str], None]) -> list[Record]:
    """Keep each (prompt, completion) once, in the records' order.

    Args:
        records: any number.
        notice: called with one sentence if duplicates were merged.

    Raises:
        DataError: one prompt has two different completions, or two records share one id.
    """
    by_prompt: dict[str, Record] = {}
    kept: list[Record] = []
    merged: list[str] = []
    conflicts: list[str] = []
    for record in records:
        key = repr(record.prompt)
        first = by_prompt.setdefault(key, record)
        if first is record:
            kept.append(record)
        elif first.completion == record.completion:
            merged.append(f"{record.id} = {first.id}")
        else:
            conflicts.append(
                f"  {first.id} and {record.id}: '{shortened(record.title)}' -> "
                f"'{shortened(first.completion)}' or '{shortened(record.completion)}'"
            )
    if conflicts:
        raise contradiction(conflicts)
    if len({r.id for r in kept}) < len(kept):
        raise DataError("two records share one id. Ids must be unique.")
    if merged:
        notice(f"{len(merged)} exact duplicate(s) merged: {_some(merged)}")
    return kept


def contradiction(conflicts: Sequence[str]) -> DataError:
    """The error for prompts with different completions; `conflicts` has one line for each."""
    more = f"\n  and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
    return DataError(
        f"{len(conflicts)} prompt(s) with different completions: they can't both be recalled. "
        "Keep one of each, or make the prompts differ:\n" + "\n".join(conflicts[:_SHOWN]) + more
    )


def shortened(text: str, width: int = 40) -> str:
    """The text in at most `width` characters, for a message."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (
        f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    )
