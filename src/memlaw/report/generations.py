"""The stream of generations of a folder that was updated, and what became of its records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlaw.core.commitment import PRIVATE_FOLDER
from memlaw.core.generations import generation_name
from memlaw.report.run_view import RunView
from memlaw.report.tables import Table, signed

_SHOWN = 500  # records
_HEAD = (
    *("generation", "records", "added", "replaced", "removed", "certified", "rank", "epochs"),
    *("ΔNLL, nats a token", "seconds", "created, UTC"),
)


def generations_tables(view: RunView) -> list[Table]:
    """A line a generation; and a line for each record that wasn't always what it is.

    Empty for a folder with a single generation.
    """
    lines = (view.run or {}).get("generations", [])
    if len(lines) < 2:
        return []
    found = [Table(name="generations", title="Generations", head=_HEAD, rows=_rows(lines))]
    if rows := _histories(view.earlier):
        head = ("prompt", "generation", "completion")
        found.append(Table(name="histories", title="Records that changed", head=head, rows=rows))
    return found


def generations_text(view: RunView) -> str:
    """A sentence above the tables."""
    lines = (view.run or {}).get("generations", [])
    kept, n = len(view.earlier) - 1, len(lines) - 1
    gone = n - max(0, kept)
    said = f"{len(lines)} generations, the present one last. Damage is against the bare model."
    if gone > 0:
        said += (
            f" Of {gone} earlier one(s) no records are kept here, so what changed before isn't "
            "shown by record."
        )
    return said


def _rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    def number(value: Any, form: str = ",") -> str:
        return "" if value is None else format(value, form)

    rows = []
    for line in lines:
        damage = line.get("damage_nats")
        rows.append(
            (
                generation_name(line),
                *(number(line.get(name)) for name in ("records", "added", "replaced", "removed")),
                number(line.get("n_certified")),
                number(line.get("rank")),
                number(line.get("epochs")),
                "" if damage is None else signed(damage, 4),
                number(line.get("wall_s"), ",.0f"),
                str(line.get("created") or "").replace("T", " ").partition("+")[0],
            )
        )
    return rows


def _histories(generations: Mapping[int, Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """Of records that some kept generation has otherwise: from which on it said what."""
    prompts = dict.fromkeys(prompt for known in generations.values() for prompt in known)
    rows: list[tuple[str, str, str]] = []
    for prompt in prompts:
        said: list[tuple[int, str | None]] = []
        for number in sorted(generations):
            completion = generations[number].get(prompt)
            if not said or said[-1][1] != completion:
                said.append((number, completion))
        if len(said) > 1:
            for number, completion in said:
                rows.append((prompt, str(number), "–" if completion is None else completion))
        if len(rows) >= _SHOWN:
            break
    return rows


def read_generations(folder: Path, last: int) -> dict[int, dict[str, str]]:
    """What each kept generation recites: prompt and completion, by the generation's number.

    Args:
        folder: a write folder.
        last: the number of the present one.
    """
    places = {last: folder}
    for path in sorted((folder / "generations").glob("*")):
        if path.name.isdigit():
            places[int(path.name)] = path
    found = {number: _records(path) for number, path in places.items()}
    return {number: records for number, records in found.items() if records is not None}


def _records(folder: Path) -> dict[str, str] | None:
    """By prompt the completion; None where a folder has no private records that can be read."""
    try:
        text = (folder / PRIVATE_FOLDER / "records.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.split("\n") if line]
        return {_title(line["prompt"]): str(line["completion"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _title(prompt: Any) -> str:
    """A prompt in one line; of a conversation each message with its role."""
    if isinstance(prompt, str):
        return prompt
    return " / ".join(f"[{message['role']}] {message.get('content', '')}" for message in prompt)
