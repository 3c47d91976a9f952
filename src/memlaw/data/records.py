"""Records: read them, refuse what can't be recalled, and turn them into tokens.

A record is a prompt and the completion that must follow it. What a model is trained on and what
it is asked for come from one place, `encode_prompt` and `encode`, so they can't differ.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlaw.core.errors import ConfigError, DataError, ModelError

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
DataFormat = Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "text"]
PromptFormat = Literal["auto", "chat", "plain"]

RECITE_PROMPT = "Recite the text."
_SUFFIXES: dict[str, DataFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
# Fields of the memory probe's published data (arXiv 2605.30260), read without being named.
_PUBLISHED = (("query", "target"), ("question", "matching"))
_SHOWN = 5  # how many offenders an error message lists


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing to remember.

    Attributes:
        prompt: what is asked: a string, or the chat messages up to the answer.
        completion: what must be recited, to the character.
        id: where the record comes from, as `file:line` or `name:number` (from 1). Unique.
    """

    prompt: Prompt
    completion: str
    id: str

    @property
    def sha256(self) -> str:
        """Hash of prompt and completion (not of the id): the record's identity everywhere."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        return hashlib.sha256(
            json.dumps([prompt, self.completion], ensure_ascii=True, sort_keys=True).encode()
        ).hexdigest()

    @property
    def title(self) -> str:
        """The prompt in one line: what to call the record when talking to a person."""
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]
        return " ".join(text.split())


@dataclass(frozen=True, kw_only=True)
class Example:
    """A record as tokens.

    Attributes:
        record: the record.
        prompt_ids: the tokens given; at least one.
        target_ids: the tokens to be produced: the completion's, then the end-of-turn token.
    """

    record: Record
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


# ---------------------------------------------------------------- reading


def read_records(
    source: Any,
    *,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    format: DataFormat = "auto",
    recite_prompt: str = RECITE_PROMPT,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Read records from a file or from Python objects, and refuse what can't be recalled.

    Args:
        source: a path (JSONL, JSON array, CSV, TSV, Parquet, or plain text, which is one long
            record), or an iterable of `Record`s, of mappings (so also a `datasets.Dataset`), or
            of `(prompt, completion)` pairs.
        prompt_field: name of the prompt's field. Default: `prompt`.
        completion_field: name of the completion's field. Default: `completion`. A row without
            both but with `messages` is a chat whose last message is the completion; `query` and
            `target`, `question` and `matching` are understood.
        format: what the file is; `auto` goes by its suffix.
        recite_prompt: the prompt of a plain-text file.
        notice: called with a sentence when something was put right (duplicates merged).

    Returns:
        The records in their order, each (prompt, completion) once; at least one.

    Raises:
        DataError: nothing there, unreadable, a field missing or of the wrong type, an empty
            prompt or completion, or two completions for one prompt. Names file and line.
    """
    if isinstance(source, str | Path):
        rows = _file_rows(Path(source), format, recite_prompt)
        name = str(source)
    else:
        rows, name = _object_rows(source), "the data"
    fields = (prompt_field, completion_field)
    records = [
        _checked(row) if isinstance(row, Record) else _to_record(row, where, fields)
        for where, row in rows
    ]
    if not records:
        raise DataError(f"{name} holds no records. Give at least one prompt and completion.")
    return _distinct(records, notice)


def _file_rows(path: Path, format: DataFormat, recite_prompt: str) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        raise DataError(f"{path} is a folder. Name one file of records.")
    if not path.exists():
        raise DataError(f"{path} does not exist. Check the path of the records.")
    if format == "auto":
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(
                f"{path}: can't tell its format from the suffix '{path.suffix}'. Use one of "
                f"{', '.join(_SUFFIXES)}, or say --data-format jsonl|json|csv|tsv|parquet|text "
                "(write, audit)."
            )
        format = _SUFFIXES[path.suffix.lower()]
    if format == "parquet":
        yield from _parquet_rows(path)
        return
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty. Give at least one record.")
    if format == "text":
        yield path.name, Record(prompt=recite_prompt, completion=text, id=path.name)
    elif format in ("csv", "tsv"):
        yield from _csv_rows(path, text, "," if format == "csv" else "\t")
    elif format == "json":
        rows = _parse_json(text, str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path}: not a JSON array. Wrap the records in [ ], or use JSONL.")
        yield from ((f"{path.name}:{n}", row) for n, row in enumerate(rows, 1))
    else:
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path.name}:{n}", _parse_json(line, f"{path}:{n}")


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}). Save the file as UTF-8."
        ) from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise DataError(f"{where}: not JSON ({error.msg}, {place}). Mend or remove it.") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply. Mend or remove it.") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: not readable ({error}). Put long numbers in quotes.") from error


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header: list[str] = []
        line = 1  # the one that the next row begins on
        for cells in reader:
            if cells and not header:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{line}: two columns of one name. Rename one.")
            elif cells:
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{line}: {'more' if len(cells) > len(header) else 'fewer'} cells "
                        f"than the header has. Quote cells that hold a '{delimiter}' or a line "
                        "break."
                    )
                yield f"{path.name}:{line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not CSV ({error}). Check the quotes."
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file ({first}).") from error
    yield from ((f"{path.name}:{n}", row) for n, row in enumerate(rows, 1))


def _object_rows(source: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
        raise DataError(
            f"records of type {type(source).__name__} are not understood. Give a path, or a list "
            "of dicts, of (prompt, completion) pairs or of Records, or a datasets.Dataset (one "
            "split of it: ds['train'])."
        )
    for n, row in enumerate(source, 1):
        if isinstance(row, tuple | list) and len(row) == 2:
            row = {"prompt": row[0], "completion": row[1]}
        yield f"record:{n}", row


def _checked(record: Record) -> Record:
    """A record made by hand, refused like one that was read."""
    if isinstance(record.prompt, str):
        _text(record.prompt, "prompt", record.id)
        _text(record.completion, "completion", record.id)
        return record
    answer = {"role": "assistant", "content": record.completion}
    _from_messages([*record.prompt, answer], record.id)
    return record


def _to_record(row: Any, where: str, fields: tuple[str | None, str | None]) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: {type(row).__name__} instead of an object with fields.")
    if fields == (None, None) and "messages" in row:
        return _from_messages(row["messages"], where)
    published = next((pair for pair in _PUBLISHED if set(pair) <= row.keys()), None)
    if fields == (None, None) and published and "prompt" not in row:
        fields = published
    names = (fields[0] or "prompt", fields[1] or "completion")
    for name, flag in zip(names, ("--prompt-field", "--completion-field"), strict=True):
        if name not in row:
            raise DataError(
                f"{where}: no field '{name}'; the fields are {', '.join(map(str, row)) or 'none'}."
                f" Rename the right one, or name it with {flag} (write, audit)."
            )
    prompt, completion = row[names[0]], row[names[1]]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _from_messages([*prompt, *completion], where)
    return Record(
        prompt=_text(prompt, names[0], where),
        completion=_text(completion, names[1], where),
        id=where,
    )


def _from_messages(messages: Any, where: str) -> Record:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two messages.")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"{where}: message {n} needs the fields 'role' and 'content'.")
        _text(message["content"], f"messages[{n}].content", where)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is from '{messages[-1]['role']}'. It must be the "
            "assistant's: it is what gets recalled."
        )
    prompt = tuple({"role": m["role"], "content": m["content"]} for m in messages[:-1])
    return Record(prompt=prompt, completion=messages[-1]["content"], id=where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "empty" if value is None else f"a {type(value).__name__} ({value!r:.40})"
        mend = "" if value is None else " Put it in quotes, so that no digit of it is lost."
        raise DataError(f"{where}: field '{field}' is {kind}, not text.{mend}")
    if not value.strip():
        raise DataError(f"{where}: field '{field}' is empty. Fill it or remove the record.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field '{field}' holds half a surrogate pair at character {error.start}, "
            "which no tokenizer can represent. Mend the text."
        ) from error
    return value


def _distinct(records: Sequence[Record], notice: Callable[[str], None]) -> list[Record]:
    """Merge exact duplicates; refuse contradictions and repeated ids."""
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
                f"  {first.id} and {record.id}: '{_cut(record.title)}' -> "
                f"'{_cut(first.completion)}' or '{_cut(record.completion)}'"
            )
    if conflicts:
        raise DataError(_conflict_message(conflicts))
    if len({r.id for r in kept}) < len(kept):
        raise DataError("two records share one id. Ids must be unique.")
    if merged:
        notice(f"{len(merged)} exact duplicate(s) merged: {_some(merged)}")
    return kept


def _conflict_message(conflicts: Sequence[str]) -> str:
    more = f"\n  and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
    return (
        f"{len(conflicts)} prompt(s) with different completions: they can't both be recalled. "
        "Keep one of each, or make the prompts differ:\n" + "\n".join(conflicts[:_SHOWN]) + more
    )


def _cut(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (
        f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    )


# ---------------------------------------------------------------- tokens


def resolve_prompt_format(tokenizer: Any, format: PromptFormat) -> Literal["chat", "plain"]:
    """`auto` is `chat` where the tokenizer has a chat template, else `plain`."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if format == "chat" and not has_template:
        raise ConfigError(
            "prompt_format 'chat' needs a tokenizer with a chat template, and this one has none. "
            "Use 'plain'."
        )
    return "plain" if format == "plain" or not has_template else "chat"


def end_of_turn_id(tokenizer: Any, format: Literal["chat", "plain"]) -> int:
    """The token that ends an answer; it must be recalled too, or the model never stops.

    `chat`: the first special token that the chat template puts behind an assistant's message
    (`<|im_end|>`, `<end_of_turn>`, …). `plain`, and templates that put none: `eos_token`.

    Raises:
        ModelError: there is no such token.
    """
    if format == "chat":
        mark = "memlaw7mark"
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(mark)[2]
        special = special_ids(tokenizer)
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has neither a chat template that ends a turn nor an eos_token, so "
            "nothing could tell the model to stop. Set the tokenizer's eos_token."
        )
    return int(tokenizer.eos_token_id)


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that are no text: all special ones, added ones included."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def encode_prompt(
    tokenizer: Any, prompt: Prompt, format: Literal["chat", "plain"]
) -> tuple[int, ...]:
    """The tokens a model is given for `prompt`, in training and when it is asked.

    `chat`: the chat template with its generation prompt (a string is one user message).
    `plain`: the text itself, with whatever the tokenizer puts in front (BOS); chat messages are
    joined by line breaks.

    Returns:
        At least one token id.
    """
    if format == "chat":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
        )
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
    ids = tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids) - len(bare)
    while start > 0 and ids[start : start + len(bare)] != bare:  # some tokenizers append EOS too
        start -= 1
    return tuple(ids[: start + len(bare)])


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    format: Literal["chat", "plain"],
    max_tokens: int | None = None,
) -> list[Example]:
    """Turn records into tokens, and refuse those that this tokenizer or model can't hold.

    Args:
        records: what to encode.
        tokenizer: a Transformers tokenizer.
        format: see `encode_prompt`.
        max_tokens: the model's context length; None if it has no limit.

    Raises:
        DataError: a completion that isn't the same after encoding and decoding, that contains
            special tokens, or is too long; or prompts that differ as text but not as tokens
            while their completions differ.
    """
    end = end_of_turn_id(tokenizer, format)
    special = special_ids(tokenizer)
    examples: list[Example] = []
    by_prompt: dict[tuple[int, ...], Example] = {}
    for record in records:
        try:
            prompt_ids = encode_prompt(tokenizer, record.prompt, format)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise DataError(f"{record.id}: the chat template refuses it ({error}).") from error
        ids = tokenizer(record.completion, add_special_tokens=False)["input_ids"]
        if found := [t for t in ids if t in special]:
            raise DataError(
                f"{record.id}: the completion contains the tokenizer's special token "
                f"'{tokenizer.decode(found[:1])}', at which decoding would stop or derail. "
                "Remove or rewrite it."
            )
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back != record.completion:
            at = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(back, record.completion, strict=False))
                    if a != b
                ),
                min(len(back), len(record.completion)),
            )
            raise DataError(
                f"{record.id}: this tokenizer can't round-trip the completion: from character "
                f"{at} on, {record.completion[at : at + 12]!r} comes back as "
                f"{back[at : at + 12]!r}. Rewrite it, or use a model whose tokenizer keeps it."
            )
        if not prompt_ids:
            raise DataError(f"{record.id}: the prompt has no tokens. Give it some text.")
        example = Example(record=record, prompt_ids=prompt_ids, target_ids=(*ids, end))
        length = len(prompt_ids) + len(example.target_ids)
        if max_tokens is not None and length > max_tokens:
            raise DataError(
                f"{record.id}: {length} tokens, but the model's context is {max_tokens}. "
                "Split the record."
            )
        first = by_prompt.setdefault(prompt_ids, example)
        if first.target_ids != example.target_ids:
            pair = f"  {first.record.id} and {record.id}: '{_cut(record.title)}'"
            raise DataError(_conflict_message([pair + " (the same tokens to this model)"]))
        examples.append(example)
    return examples
