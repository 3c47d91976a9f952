"""Files of prompts without completions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.content import text_of
from memlaw.data.messages import checked_chat
from memlaw.data.readers import Reading, file_rows, has_fields
from memlaw.data.record import Prompt


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, each once.

    Args:
        path: JSONL, JSON, CSV, TSV, Parquet or Arrow with the field `prompt` (or `messages`, the
            last of them the user's), as files of records have it; any other file is text: a prompt
            a line.

    Raises:
        DataError: it can't be read, it has no prompt, or a row has none. Names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist. Say where the prompts lie, with --keep or --near.")
    found: dict[str, Prompt] = {}
    if path.read_bytes().strip():
        for prompt in _prompts(path):
            found.setdefault(repr(prompt), prompt)
    if not found:
        raise DataError(f"{path} has no prompt. Give at least one, or leave the file out.")
    return list(found.values())


def _prompts(path: Path) -> Iterator[Prompt]:
    if has_fields(path):
        yield from (_prompt(row, where) for where, row in file_rows(path, Reading()))
    else:
        yield from filter(None, map(str.strip, text_of(path).splitlines()))


def _prompt(row: Any, where: str) -> Prompt:
    if isinstance(row, DataError):
        raise row
    said = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if isinstance(said, str) and said.strip():
        return said
    if isinstance(said, list) and said and all(isinstance(m, dict) for m in said):
        messages = checked_chat(said, where, row)
        if messages[-1]["role"] == "user":
            return tuple(messages)
    raise DataError(
        f"{where}: no prompt. Give each row a field 'prompt' with text, or 'messages' that end "
        "with the user's."
    )
