"""The tokenizer that an adapter was trained with, where its folder has one of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memlaw.model.base import BaseModel, has_tokenizer, read_tokenizer
from memlaw.model.hashes import tokenizer_sha256

_TEMPLATE_FILE = "chat_template.jinja"
# What save_pretrained of tokenizers writes; the last is a folder of further templates.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    *(_TEMPLATE_FILE, "merges.txt", "vocab.txt", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "sentencepiece.bpe.model"),
    "additional_chat_templates",
)


def with_tokenizer(
    base: BaseModel, asked: str | None, folder: Path | None, notice: Callable[[str], None]
) -> BaseModel:
    """The base model with the tokenizer that was asked for, else the adapter folder's own.

    Args:
        base: a loaded base model, with its own tokenizer.
        asked: folder or hub id of a tokenizer; None: none was asked for.
        folder: an adapter's; None: there is none.
        notice: is told of a tokenizer in the folder that differs from the base model's.

    Raises:
        ModelError: the tokenizer can't be read.
    """
    if asked is not None:
        return _exchanged(base, read_tokenizer(asked))
    if folder is None:
        return base
    if has_tokenizer(folder):
        own = _exchanged(base, read_tokenizer(str(folder)))
    elif (folder / _TEMPLATE_FILE).is_file():
        words = read_tokenizer(base.path) if Path(base.path).is_dir() else base.tokenizer
        words.chat_template = (folder / _TEMPLATE_FILE).read_text(encoding="utf-8")
        own = _exchanged(base, words)
    else:
        return base
    if own.tokenizer_sha256 == base.tokenizer_sha256:
        return base
    templates = [getattr(b.tokenizer, "chat_template", None) for b in (own, base)]
    others = " and its chat template" if templates[0] != templates[1] and templates[0] else ""
    notice(
        f"The tokenizer in {folder}{others}, not the base model's, is used: they differ. "
        "--tokenizer names another."
    )
    return own


def _exchanged(base: BaseModel, tokenizer: Any) -> BaseModel:
    return dataclasses.replace(
        base, tokenizer=tokenizer, tokenizer_sha256=tokenizer_sha256(tokenizer)
    )
