"""Documents: texts without a prompt, split into a prefix and what follows it.

Whether a model goes on with a document's text from its first tokens is what the literature calls
discoverable extraction: Carlini et al., "Quantifying Memorization Across Neural Language Models"
(arXiv 2202.07646), with prefixes of 50 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.bad_rows import BadRows
from memlaw.data.encoding import encode_prompt, refuse_special, special_ids
from memlaw.data.layouts import is_filled
from memlaw.data.messages import checked_text
from memlaw.data.objects import object_rows
from memlaw.data.pieces import text_after
from memlaw.data.readers import DataFormat, Reading, file_rows
from memlaw.data.record import Example, Record

_FIELD = "text"
_PROMPTS = ("prompt", "prompts", "messages", "conversations", "conversation", "instruction")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text as it is.

    Attributes:
        text: not blank.
        id: where it comes from, as `file:line`.
    """

    text: str
    id: str


def read_documents(
    source: Any,
    *,
    field: str | None = None,
    format: DataFormat = "auto",
    delimiter: str | None = None,
    bad: BadRows,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Document]:
    """Read documents from a file or from Python objects, each text once.

    Args:
        source: as for `read_records`; rows with a text and no prompt, or texts. A plain text file
            is one document.
        field: name of the text's field in the data. Default: `text`.
        format, delimiter, notice: as for `read_records`.
        bad: takes the rows that are no documents.

    Raises:
        DataError: as for `read_records`; or there is no document.
    """
    if isinstance(source, str | Path):
        reading = Reading(format=format, delimiter=delimiter, recite_prompt="", notice=notice)
        rows = file_rows(Path(source), reading)
    else:
        rows = object_rows(source)
    found: dict[str, Document] = {}
    n_again = 0
    for where, row in rows:
        try:
            text = _text(row, field or _FIELD, where, named=field is not None)
        except DataError as error:
            bad.add(where, error)
            continue
        n_again += text in found
        found.setdefault(text, Document(text=text, id=where))
    if not found:
        bad.settle(0, skip=False, notice=notice)
        raise DataError("the data hold no documents. Give at least one row with a text.")
    if n_again:
        notice(f"{n_again} document(s) are there already, and count once.")
    return list(found.values())


def _text(row: Any, field: str, where: str, *, named: bool) -> str:
    """A row's text.

    Raises:
        DataError: it has none, or a prompt beside it.
    """
    if isinstance(row, DataError):
        raise row
    if isinstance(row, str):
        return checked_text(row, field, where)
    if isinstance(row, Record):
        if row.prompt:
            raise _with_prompt(where, "prompt")
        return checked_text(row.completion, field, where)
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: {type(row).__name__} instead of an object with fields.")
    if not named and (prompts := [name for name in _PROMPTS if is_filled(row.get(name))]):
        raise _with_prompt(where, prompts[0])
    if field not in row:
        raise DataError(
            f"{where}: no field '{field}'; the fields are {', '.join(map(str, row)) or 'none'}. "
            "Name the one that holds the text with --completion-field."
        )
    return checked_text(row[field], field, where)


def _with_prompt(where: str, name: str) -> DataError:
    return DataError(
        f"{where}: the row has '{name}', so it is no document, and no prefix of its text is the "
        "prompt. Leave --prefix-tokens out, or name the text's field with --completion-field."
    )


def split_documents(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    n_prefix: int,
    n_suffix: int | None = None,
    max_tokens: int | None = None,
    bad: BadRows,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Example]:
    """Each document as an example: the prompt is its first tokens, the target those that follow.

    The document is turned into tokens as a whole, so that the cut is between two tokens of it.
    Tokens that the tokenizer puts before a text (such as BOS) stand before the prefix, and are not
    counted.

    Args:
        documents: what to split.
        tokenizer: a Transformers tokenizer.
        n_prefix: tokens of the prefix, at least 1.
        n_suffix: tokens of the continuation, at most; None: the rest of the document.
        max_tokens: the model's context length; None if it has no limit.
        bad: takes the documents that can't be split so, or not be represented.
        notice: is told of documents that begin alike and go on differently.

    Returns:
        One example for each document that isn't bad, in the same order.
    """
    examples: list[Example] = []
    special = special_ids(tokenizer)
    for document in documents:
        try:
            example = _split(document, tokenizer, special, n_prefix, n_suffix)
            length = len(example.prompt_ids) + len(example.target_ids)
            if max_tokens is not None and length > max_tokens:
                raise DataError(
                    f"{length} tokens, but the model's context is {max_tokens}. Split the "
                    "document, or measure the first tokens behind the prefix with --suffix-tokens."
                )
        except DataError as error:
            bad.add(document.id, error)
            continue
        examples.append(example)
    by_prefix: dict[tuple[int, ...], Example] = {}
    alike = [e for e in examples if by_prefix.setdefault(e.prompt_ids, e) is not e]
    differing = [e for e in alike if by_prefix[e.prompt_ids].target_ids != e.target_ids]
    if differing:
        one = differing[0]
        notice(
            f"{len(differing)} document(s) begin with the same {n_prefix} tokens as another and go "
            f"on differently (the first: {one.record.id}, as {by_prefix[one.prompt_ids].record.id})"
            ": of those that begin alike one can be extracted, at most."
        )
    return examples


def _split(
    document: Document, tokenizer: Any, special: set[int], n_prefix: int, n_suffix: int | None
) -> Example:
    text = document.text
    before = encode_prompt(tokenizer, text, "plain")
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = len(before) - len(ids)
    refuse_special(tokenizer, ids, special, "document")
    if len(ids) <= n_prefix:
        raise DataError(
            f"the document has {len(ids)} token(s), and needs {n_prefix + 1} or more: a prefix of "
            f"{n_prefix}, and something that follows it."
        )
    prompt, rest = before[: start + n_prefix], ids[n_prefix:]
    target = rest if n_suffix is None else rest[:n_suffix]
    return Example(
        record=Record(
            prompt=text_after(tokenizer, (), prompt[start:]),
            completion=text_after(tokenizer, prompt, target),
            id=document.id,
        ),
        prompt_ids=prompt,
        target_ids=target,
    )
