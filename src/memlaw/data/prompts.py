"""Files of prompts without completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.readers import file_rows, text_of
from memlaw.data.record import Prompt


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, each once.

    Args:
        path: JSONL, JSON, CSV, TSV or Parquet with the field `prompt` (or `messages`, the last of
            them the user's), as files of records have it; any other file is text: a prompt a line.

    Raises:
        DataError: it can't be read, or a row has no prompt. Names file and line.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() not in _TABLES:
        lines = (line.strip() for line in text_of(path).splitlines())
        return list(dict.fromkeys(line for line in lines if line))
    found: dict[str, Prompt] = {}
    for where, row in file_rows(path, "auto", ""):
        prompt = _prompt(row, where)
        found.setdefault(repr(prompt), prompt)
    return list(found.values())


_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def _prompt(row: Any, where: str) -> Prompt:
    said = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if isinstance(said, str) and said.strip():
        return said
    messages = said if isinstance(said, list) and all(_is_message(m) for m in said) else []
    if messages and messages[-1]["role"] == "user":
        return tuple({"role": m["role"], "content": m["content"]} for m in messages)
    raise DataError(
        f"{where}: no prompt. Give each row a field 'prompt' with text, or 'messages' that end "
        "with the user's."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )
