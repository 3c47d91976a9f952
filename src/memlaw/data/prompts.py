"""Prompts without completions, from a file."""

from __future__ import annotations

import json
from pathlib import Path

from memlaw.core.errors import DataError
from memlaw.data.record import Prompt

_MEND = "Give a text file with a prompt a line, or JSONL with the field prompt or messages."


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from a file: a line of text each, or JSONL (suffix `.jsonl`).

    A JSONL line has the field `prompt`, a text or chat messages, or `messages`; of messages that
    end with an answer, that answer is left out. Empty lines are skipped.

    Raises:
        DataError: the file can't be read, has no prompts, or has a line without one.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}). {_MEND}") from error
    is_json = path.suffix.lower() == ".jsonl"
    found = [
        _of_json(line, f"{path}:{number}") if is_json else line.strip()
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path} has no prompts. {_MEND}")
    return list(found)


def _of_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
        said = row["prompt"] if "prompt" in row else row["messages"]
        if isinstance(said, str):
            return said
        messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in said)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: no prompt there. {_MEND}") from error
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{where}: no prompt there. {_MEND}")
    return messages
