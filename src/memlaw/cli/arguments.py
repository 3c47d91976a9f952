"""What the commands take: the settings of the functions they call, and what only they need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress, arg

from memlaw.probe.bench import VARIANTS
from memlaw.settings.audit import AuditConfig
from memlaw.settings.choices import Objective, OnEmpty
from memlaw.settings.probe import ProbeConfig
from memlaw.settings.write import WriteConfig


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
class ProbeArguments(ProbeConfig):
    """Train an adapter for each rank and length of a grid, and measure what it remembers.

    Attributes:
        out: folder of cells; only cells that it doesn't hold yet are run.
        launcher: local runs one group of cells after the other; ray runs them as Ray tasks.
        ray_address: of a Ray cluster (default: the one this machine belongs to, or a new one).
        ray_cpus: CPUs a Ray task claims.
        ray_gpus: GPUs a Ray task claims.
        json: print the grid's cells as JSON.
        config: a TOML file with settings by these names; what is given here wins.
    """

    out: Annotated[Path, arg(aliases=["-o"])]
    launcher: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    ray_cpus: float = 2
    ray_gpus: float = 0
    json: bool = False
    config: Path | None = None


@dataclass(frozen=True, kw_only=True)
class BenchObjectivesArguments(ProbeArguments):
    """Probe a grid once with each objective, and compare them with SFT pair by pair.

    Attributes:
        objectives: of sft, memft_threshold, memft_threshold:sft (plain sft where a batch has
            nothing left), memft_window, memft_curriculum, triage; sft among them.
        seeds: of the data, the initialisation and the order; what intervals are over.
    """

    objectives: tuple[str, ...] = VARIANTS
    objective: Annotated[Objective, Suppress] = "sft"
    on_empty: Annotated[OnEmpty | None, Suppress] = None
    ranks: tuple[int, ...] = (1, 2)
    lengths: tuple[int, ...] = (132, 198, 264)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    task: str = "phonebook"


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
