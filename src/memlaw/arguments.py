"""What the commands take: the settings of the functions they call, and what only they need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from memlaw.check import AuditConfig
from memlaw.settings import WriteConfig


@dataclass(frozen=True, kw_only=True)
class WriteArguments(WriteConfig):
    """Train an adapter until every record is recited, and certify it.

    Attributes:
        data: records: JSONL, JSON, CSV, TSV, Parquet, or a plain text file.
        out: folder to make: adapter, certificate, token table, run log, model card.
        config: a TOML file with settings by these names; what is given here wins.
    """

    data: Positional[Path]
    out: Annotated[Path, arg(aliases=["-o"])]
    config: Path | None = None


@dataclass(frozen=True, kw_only=True)
class AuditArguments(AuditConfig):
    """Measure, token by token, what an adapter or a bare model recalls.

    Attributes:
        data: records: JSONL, JSON, CSV, TSV, Parquet, or a plain text file.
        certificate: measure again what this certificate.json says of the adapter beside it.
        json: print JSON: totals, records, tokens.
        tokens: also write the token table to this Parquet file.
        config: a TOML file with settings by these names; what is given here wins.
    """

    data: Positional[Path]
    certificate: Path | None = None
    json: bool = False
    tokens: Path | None = None
    config: Path | None = None


@dataclass(frozen=True, kw_only=True)
class AskArguments:
    """Let an adapter recite.

    Attributes:
        adapter: a folder that memlaw write or PEFT wrote.
        prompt: what to ask (default: the prompt that a plain text is recited on).
        model: the base model, if it isn't the adapter's own.
        max_tokens: limit (default: the longest certified record's length, else 512).
    """

    adapter: Positional[Path]
    prompt: Positional[str | None] = None
    model: str | None = None
    max_tokens: int | None = None
